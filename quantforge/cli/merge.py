"""quantforge merge."""

from __future__ import annotations

import click

from .shared import print_files


@click.command()
@click.argument("first", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def merge(first: str, out: str, force: bool) -> None:
    """Put the files of a split GGUF together: FIRST is any of NAME-00001-of-0000N.gguf."""
    from .. import merge as run

    print_files(run(first, out, force=force))


COMMAND = merge
