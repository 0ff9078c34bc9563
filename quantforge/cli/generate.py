"""quantforge generate."""

from __future__ import annotations

import sys
from typing import Any

import click


@click.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", metavar="TEXT", help="What the answer continues, as it is; default: what comes from standard input.")
@click.option(
    "--max-tokens", "--max-new-tokens", "max_tokens", metavar="N", type=click.IntRange(1), default=64, show_default=True,
    help="Tokens of the answer, at most.",
)  # fmt: skip
@click.option(
    "--temperature", metavar="T", type=click.FloatRange(0), default=0.0, show_default=True,
    help="0: the likeliest token every time; 1: tokens as likely as the model has them.",
)  # fmt: skip
@click.option("--top-k", metavar="N", type=click.IntRange(0), default=0, help="Draw from the N likeliest tokens; 0: from all.")
@click.option(
    "--top-p", metavar="P", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(0), help="The same draws every time.")
@click.option("--lora", metavar="DIR[:SCALE]", multiple=True, help="Merge an adapter of PEFT into MODEL; repeatable.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--activations", type=click.Choice(["int8", "float"]), default="int8", show_default=True, help="Precision on the CPU."
)
def generate(model: str, prompt: str | None, **options: Any) -> None:
    """Continue a text with MODEL as it is stored."""
    from ..runtime.loading import answer

    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("--prompt TEXT is missing, and nothing comes from standard input")
        prompt = sys.stdin.read().removesuffix("\n")
    pieces = answer(model, prompt, **options)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:  # a shell's prompt begins a line, after Ctrl-C too
        click.echo()


COMMAND = generate
