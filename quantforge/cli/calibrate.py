"""quantforge calibrate."""

from __future__ import annotations

import json
from typing import Any

import click

from .shared import stages


@click.command()
@click.argument("model", type=click.Path())
@click.argument("out", metavar="OUT.gguf", type=click.Path(dir_okay=False))
@click.option("--text", metavar="FILE", default="builtin", show_default=True, help="Calibration text; builtin: the shipped one.")
@click.option("--ctx", metavar="N", type=click.IntRange(4), help="Tokens per window; default: 512, or less if the model's is.")
@click.option("--chunks", metavar="N", type=click.IntRange(1), help="At most N windows; default: the whole text.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--lora", metavar="DIR[:SCALE]", multiple=True, help="Merge an adapter of PEFT into MODEL; repeatable.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def calibrate(model: str, out: str, as_json: bool, **options: Any) -> None:
    """Run text through MODEL and write its importance matrix, as llama-imatrix does, to OUT.gguf."""
    from .. import calibrate as run

    with stages() as progress:
        done = run(model, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(done.to_json(), ensure_ascii=False))
        return
    for name, counts in done.experts.items():
        click.echo(f"{name}: tokens per expert {min(counts)} to {max(counts)}")
    click.echo(f"{done.path}: {done.entries} matrices, {done.chunks} windows of {done.ctx} tokens, {done.seconds:.1f} s")


COMMAND = calibrate
