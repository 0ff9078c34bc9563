"""quantforge inspect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click


@click.command()
@click.argument("paths", metavar="MODEL...", nargs=-1, required=True, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON; of several models, an array.")
@click.option("--tensors", is_flag=True, help="List the tensors.")
@click.option("--hash", "hashes", is_flag=True, help="sha256 of each tensor's bytes (implies --tensors).")
def inspect(paths: tuple[str, ...], as_json: bool, tensors: bool, hashes: bool) -> None:
    """Show what is in a model: metadata, tensors, types, sizes."""
    from ..inspection import describe

    described = [describe(path, hashes=hashes) for path in paths]
    if as_json:
        click.echo(json.dumps(described if len(paths) > 1 else described[0], ensure_ascii=False))
        return
    for i, (path, model) in enumerate(zip(paths, described, strict=True)):
        if len(paths) > 1:
            click.echo(f"{chr(10) if i else ''}{click.format_filename(path)}:")
        _show(model, tensors or hashes, hashes)


def _show(model: Mapping[str, Any], tensors: bool, hashes: bool) -> None:
    for key, value in model["metadata"].items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and len(text) > 80:
            text = f"[{len(value)} values] {text[:60]}..."
        elif len(text) > 160:
            text = f"{text[:150]}... ({len(text)} characters)"
        click.echo(f"{key} = {text}")
    if tensors:
        width = max((len(t["name"]) for t in model["tensors"]), default=4)
        for t in model["tensors"]:
            digest = f"  {t['sha256']}" if hashes else ""
            click.echo(f"{t['name']:<{width}}  {'×'.join(map(str, t['shape'])):>14}  {t['type']:<8} {t['bytes']:>14,}{digest}")
    if made := model["provenance"]:
        click.echo("made by quantforge: " + ", ".join(_told(made)))
    for kind, row in model["types"].items():
        click.echo(f"{kind:<10} {row['tensors']:>5} tensors  {row['bytes']:>16,} bytes")
    click.echo(f"{len(model['tensors'])} tensors, {model['total_bytes']:,} bytes, {model['bpw']:.3f} bits per weight")


def _told(made: Mapping[str, Any]) -> Iterator[str]:
    for key, value in made.items():
        if key == "calibration":
            yield from (f"calibrated with {text['name']} (sha256 {text['sha256'][:12]}...)" for text in value)
        else:
            yield f"{key} {value[:12]}..." if key.endswith("sha256") else f"{key} {value}"


COMMAND = inspect
