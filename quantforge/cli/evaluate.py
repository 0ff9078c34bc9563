"""quantforge evaluate."""

from __future__ import annotations

from typing import Any

import click

from .shared import evaluation_options


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--reference", metavar="REF", required=True, help="What the models are compared with: a directory or file.")
@click.option("--lora", metavar="DIR[:SCALE]", multiple=True, help="Merge an adapter of PEFT into the reference; repeatable.")
@evaluation_options
def evaluate(models: tuple[str, ...], **options: Any) -> Any:
    """Compare MODELs with a reference: perplexity, KL divergence, flips, answers."""
    from .. import evaluate as run

    return run(models, **options)


COMMAND = evaluate
