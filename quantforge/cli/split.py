"""quantforge split."""

from __future__ import annotations

import click

from .. import sizes
from .shared import print_files


@click.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--max-size", metavar="SIZE", required=True, help="Largest file, as 2GB or 500MB; one tensor may exceed it.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
def split(model: str, out: str, max_size: str, force: bool) -> None:
    """Cut a GGUF file into OUT-00001-of-0000N.gguf, which llama.cpp loads by the first one."""
    from .. import split as run

    print_files(run(model, out, sizes.parse(max_size, "--max-size", least=1), force=force))


COMMAND = split
