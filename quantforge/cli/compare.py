"""quantforge compare."""

from __future__ import annotations

from typing import Any

import click

from .shared import evaluation_options, listed


@click.command()
@click.argument("model")
@click.option("--types", metavar="LIST", help="Types to compare; default Q8_0 down to IQ2_XXS.")
@click.option(
    "--imatrix", metavar="FILE", default="auto", show_default=True, help="Importance; auto: a file beside the model; none."
)
@click.option("--memory", metavar="SIZE", help="Name the best type that fits into this memory, e.g. 6GB.")
@click.option("--context", metavar="N", type=click.IntRange(1), help="Tokens of context for --memory; default: the model's.")
@click.option("--out", metavar="DIR", help="Keep the converted files in DIR.")
@click.option("--lora", metavar="DIR[:SCALE]", multiple=True, help="Merge an adapter of PEFT into MODEL; repeatable.")
@evaluation_options
def compare(model: str, types: str | None, imatrix: str, **options: Any) -> Any:
    """Convert MODEL to several types, evaluate and rank them."""
    from .. import compare as run

    chosen: dict[str, Any] = {} if types is None else {"types": listed(types)}
    return run(model, imatrix=None if imatrix == "none" else imatrix, **chosen, **options)


COMMAND = compare
