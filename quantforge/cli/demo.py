"""quantforge demo."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False), default="demo-out", show_default=True, help="Where the files go."
)
@click.option("--prompt", metavar="TEXT", help="What llama.cpp is asked to complete.")
def demo(out: str, prompt: str | None) -> None:
    """Convert the shipped 5.8 M-parameter model to several types and let real llama.cpp speak with each."""
    from ..demo import PROMPT, run

    run(Path(out), click.echo, prompt=prompt or PROMPT)


COMMAND = demo
