"""Perplexity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..report import Figure
from .base import Measured, Metric, Seen
from .bootstrap import F64, Interval
from .score import Tokens


def perplexity(tokens: Tokens) -> dict[str, float]:
    """`ppl`, and `ppl_stderr` as llama-perplexity computes it: every token taken as independent."""
    nll = tokens.nll
    ppl = float(np.exp(nll.mean()))
    stderr = float(ppl * nll.std() / np.sqrt(max(1, len(nll) - 1)))
    return {"ppl": ppl, "ppl_stderr": stderr}


class Perplexity(Metric):
    """exp of the mean negative log-likelihood, and the logarithm of its ratio to the reference's."""

    name = "ppl"
    figures = (
        Figure("ppl", "PPL", "", "lower"),
        Figure("ppl_stderr", "standard error of PPL", ""),
        Figure("ln_ppl_ratio", "ln PPL ratio", "nats per token"),
    )
    against_reference = False

    def values(self, seen: Seen) -> Mapping[str, F64]:
        """`ln_ppl_ratio` is linear in tokens, the perplexity is not."""
        return {"ln_ppl_ratio": seen.tokens.nll - seen.reference.nll}

    def measure(self, seen: Seen) -> Measured:
        """The reference has no ratio to itself."""
        figures, intervals = perplexity(seen.tokens), {"ppl": seen.bootstrap.interval(seen.tokens.nll, np.exp)}
        if seen.model:
            figures["ln_ppl_ratio"] = float(seen.tokens.nll.mean() - seen.reference.nll.mean())
            intervals["ln_ppl_ratio"] = seen.bootstrap.interval(self.values(seen)["ln_ppl_ratio"])
        return Measured(figures, intervals)

    def paired(self, a: Seen, b: Seen) -> Mapping[str, Interval]:
        """`ln_ppl_ratio`: ln(ppl a / ppl b)."""
        return {"ln_ppl_ratio": a.bootstrap.interval(a.tokens.nll - b.tokens.nll)}


METRIC = Perplexity()
