"""quantforge inspect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click


@click.command()
@click.argument("path", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@click.option("--tensors", is_flag=True, help="List the tensors.")
@click.option("--hash", "hashes", is_flag=True, help="sha256 of each tensor's bytes (implies --tensors).")
def inspect(path: str, as_json: bool, tensors: bool, hashes: bool) -> None:
    """Show what is in a model: metadata, tensors, types, sizes."""
    from ..inspection import describe

    found = describe(path, hashes=hashes)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found["metadata"].items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and len(text) > 80:
            text = f"[{len(value)} values] {text[:60]}..."
        elif len(text) > 160:
            text = f"{text[:150]}... ({len(text)} characters)"
        click.echo(f"{key} = {text}")
    if tensors or hashes:
        width = max((len(t["name"]) for t in found["tensors"]), default=4)
        for t in found["tensors"]:
            digest = f"  {t['sha256']}" if hashes else ""
            click.echo(f"{t['name']:<{width}}  {'×'.join(map(str, t['shape'])):>14}  {t['type']:<8} {t['bytes']:>14,}{digest}")
    if made := found["provenance"]:
        click.echo("made by quantforge: " + ", ".join(_told(made)))
    for kind, row in found["types"].items():
        click.echo(f"{kind:<10} {row['tensors']:>5} tensors  {row['bytes']:>16,} bytes")
    click.echo(f"{len(found['tensors'])} tensors, {found['total_bytes']:,} bytes, {found['bpw']:.3f} bits per weight")


def _told(made: Mapping[str, Any]) -> Iterator[str]:
    for key, value in made.items():
        if key == "calibration":
            yield from (f"calibrated with {text['name']} (sha256 {text['sha256'][:12]}...)" for text in value)
        else:
            yield f"{key} {value[:12]}..." if key.endswith("sha256") else f"{key} {value}"


COMMAND = inspect
