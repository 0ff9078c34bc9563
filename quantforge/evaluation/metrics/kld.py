"""KL divergence from the reference, and what it does to the most likely token and to the one that followed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..report import Figure
from .base import Measured, Metric, Seen
from .bootstrap import F64, Interval
from .score import Tokens

PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9}


def divergence(tokens: Tokens, reference: Tokens) -> dict[str, float]:
    """Mean, percentiles and maximum of KL(reference ‖ model); same-top-1 and Δp, both in percent."""
    dp = delta_p(tokens, reference)
    figures = {
        "kld_mean": float(tokens.kld.mean()),
        "kld_max": float(tokens.kld.max()),
        "same_top": float(100 * (tokens.top == reference.top).mean()),
        "dp_mean": float(100 * dp.mean()),
        "dp_rms": float(100 * np.sqrt((dp**2).mean())),
    }
    return figures | {f"kld_{k}": float(np.percentile(tokens.kld, q)) for k, q in PERCENTILES.items()}


def delta_p(tokens: Tokens, reference: Tokens) -> F64:
    """Change of the probability of the token that followed: float[tokens]."""
    return np.asarray(np.exp(-tokens.nll) - np.exp(-reference.nll))


class Divergence(Metric):
    """KL(reference ‖ model) of full logits."""

    name = "kld"
    figures = (
        Figure("kld_mean", "mean KLD", "nats", "lower"),
        *(Figure(f"kld_{k}", f"KLD {f'{q:g}%' if k != 'median' else k}", "nats", "lower") for k, q in PERCENTILES.items()),
        Figure("kld_max", "KLD max", "nats", "lower"),
        Figure("same_top", "same top-1", "%", "higher"),
        Figure("dp_mean", "mean Δp", "%"),
        Figure("dp_rms", "RMS Δp", "%", "lower"),
    )

    def measure(self, seen: Seen) -> Measured:
        """Percentiles have no intervals."""
        tokens, reference, interval = seen.tokens, seen.reference, seen.bootstrap.interval
        dp = delta_p(tokens, reference)
        intervals = {
            "kld_mean": interval(tokens.kld),
            "same_top": interval(100.0 * (tokens.top == reference.top)),
            "dp_mean": interval(100 * dp),
            "dp_rms": interval(dp**2, lambda m: 100 * np.sqrt(m)),
        }
        return Measured(divergence(tokens, reference), intervals)

    def paired(self, a: Seen, b: Seen) -> Mapping[str, Interval]:
        """Of the mean divergence and same-top-1."""
        same = (a.tokens.top == a.reference.top).astype(np.float64) - (b.tokens.top == b.reference.top)
        return {
            "kld_mean": a.bootstrap.interval(a.tokens.kld - b.tokens.kld),
            "same_top": a.bootstrap.interval(100.0 * same),
        }


METRIC = Divergence()
