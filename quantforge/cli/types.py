"""quantforge types."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def types(as_json: bool) -> None:
    """List the types that tensors can be stored in."""
    from ..inspection import list_types

    rows = list_types()
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'name':<10} {'block':>6} {'bytes':>6} {'bpw':>8} {'id':>4}")
    for row in rows:
        kind = "" if row["ggml_type"] is None else row["ggml_type"]
        note = "  wants importance" if row["needs_importance"] else ""
        click.echo(f"{row['name']:<10} {row['block_size']:>6} {row['type_size']:>6} {row['bpw']:>8.4f} {kind:>4}{note}")


COMMAND = types
