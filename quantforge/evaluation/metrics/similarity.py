"""How alike are answers: token by token, and by meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...arrays import Array
from ..report import Figure
from .base import Answers, Measured, Metric
from .bootstrap import F64

_CEILING = 1


def cosine(a: Array, b: Array) -> F64:
    """Cosine of each row of a with the same row of b: float[n, d] each; rows of zeros give 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.where(norm == 0, 1, norm))


def first_divergence(a: Sequence[Any], b: Sequence[Any]) -> int | None:
    """Index of the first token that differs (a missing one differs), or None if the answers are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def equal_share(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Share of positions of the longer answer at which both have the same token; 1 for two empty answers."""
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


class Similarity(Metric):
    """Greedy answers against the reference's, between a ceiling and a floor."""

    name = "similarity"
    figures = (Figure("similarity", "similarity of answers", "cosine, shares of tokens, tokens, answers", "higher"),)
    needs = "answers"

    def judge(self, answers: Answers, model: int) -> Measured:
        """One figure, a mapping; `scaled` is where the cosine lies between floor (0) and ceiling (1)."""
        cosines = cosine(answers.vectors[0], answers.vectors[model])
        figures = _alike(answers.ids[0], answers.ids[model], cosines)
        low, high = (bound["cosine"] for bound in bounds(answers))
        figures["scaled"] = (figures["cosine"] - low) / (high - low) if high > low else float("nan")
        equal = np.asarray([equal_share(a, b) for a, b in zip(answers.ids[0], answers.ids[model], strict=True)])
        interval = answers.bootstrap.interval
        return Measured({"similarity": figures}, {"cosine": interval(cosines), "equal_tokens": interval(equal)})


def bounds(answers: Answers) -> tuple[dict[str, float], dict[str, float]]:
    """The floor, the reference's answers to other prompts, and the ceiling, its answers in bf16."""
    ref, vectors = answers.ids[0], answers.vectors
    others = np.roll(np.arange(len(answers.prompts)), 1).tolist()
    return (
        _alike(ref, [ref[i] for i in others], cosine(vectors[0], vectors[0][others])),
        _alike(ref, answers.ids[_CEILING], cosine(vectors[0], vectors[_CEILING])),
    )


def _alike(ref: Sequence[Sequence[int]], mine: Sequence[Sequence[int]], cosines: F64) -> dict[str, float]:
    parted = [first_divergence(a, b) for a, b in zip(ref, mine, strict=True)]
    return {
        "cosine": float(cosines.mean()),
        "equal_tokens": float(np.mean([equal_share(a, b) for a, b in zip(ref, mine, strict=True)])),
        # an answer that stays equal parts at its end
        "first_divergence": float(np.median([len(a) if p is None else p for a, p in zip(ref, parted, strict=True)])),
        "unchanged": sum(p is None for p in parted),
    }


METRIC = Similarity()
