"""quantforge verify."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .shared import stages

if TYPE_CHECKING:
    from ..verification.report import Verification

_WORDS = {"ok": "ok", "differs": "DIFFERS", "unknown": "unknown", "note": "note"}
_SHOWN = 20


@click.command()
@click.argument("out", type=click.Path())
@click.option("--against", metavar="MODEL", type=click.Path(), help="The model that OUT was made of.")
@click.option("--derived-from", metavar="BASE", type=click.Path(), help="Is OUT, bit by bit, what plain rounding makes of BASE?")
@click.option("--fast", is_flag=True, help="No forward pass; runs without torch.")
@click.option("--imatrix", "importance", metavar="FILE", type=click.Path(dir_okay=False), help="The imatrix OUT was made with.")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads; default: all CPUs.")
@click.option("--tensors", is_flag=True, help="List every tensor, not only those that differ.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def verify(out: str, tensors: bool, as_json: bool, **options: Any) -> int:
    """Is OUT what it should be? Its tensors, settings, tokenizer and logits against the model that it was made of.

    Exit code 0: yes; 1: something differs; 2: something cannot be told.
    """
    from .. import verify as run

    if options["against"] is None and options["derived_from"] is None:
        raise click.UsageError("give the model that OUT was made of: --against MODEL, or --derived-from BASE")
    with stages() as progress:
        done = run(out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(done.to_json(), ensure_ascii=False))
    else:
        _print(done, tensors)
    return done.code


def _print(done: Verification, everything: bool) -> None:
    listed = [t for t in done.tensors if everything or t.status != "ok"]
    width = max((len(t.name) for t in listed), default=0)
    for t in listed if everything else listed[:_SHOWN]:
        error = "" if t.error is None else f"{t.error:.4f}"
        rounding = "" if t.rounding_error is None else f"{t.rounding_error:.4f}"
        said = "bit by bit" if t.equal and not t.detail else t.detail
        click.echo(f"{t.name:<{width}}  {t.type:<8} {_WORDS[t.status]:<8} {error:>7} {rounding:>7}  {said}".rstrip())
    if not everything and len(listed) > _SHOWN:
        click.echo(f"... {len(listed) - _SHOWN} more (--tensors)")
    for c in done.checks:
        click.echo(f"{c.name:<11} {_WORDS[c.status]:<8} {c.detail}")


COMMAND = verify
