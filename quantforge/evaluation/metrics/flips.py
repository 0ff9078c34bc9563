"""Flips: positions whose most likely token is another than the reference's."""

from __future__ import annotations

from ...arrays import Array
from ..report import Figure
from .base import Measured, Metric, Seen


def flips(top: Array, reference: Array, targets: Array) -> dict[str, float]:
    """Positions whose top token changed, split by who agrees with the text; counts, and `percent` of all positions."""
    was, now, changed = reference == targets, top == targets, top != reference
    counts = {
        "right_to_wrong": int((was & ~now).sum()),
        "wrong_to_right": int((~was & now).sum()),
        "wrong_to_wrong": int((changed & ~was & ~now).sum()),
    }
    total = sum(counts.values())
    return {**counts, "total": total, "percent": 100 * total / max(1, len(targets))}


class Flips(Metric):
    """Counts of flips by kind."""

    name = "flips"
    figures = (Figure("flips", "flips", "positions; percent: of scored tokens", "lower"),)

    def measure(self, seen: Seen) -> Measured:
        """One figure, a mapping of counts."""
        return Measured({"flips": flips(seen.tokens.top, seen.reference.top, seen.targets)})


METRIC = Flips()
