"""Confidence intervals of means by a bootstrap over clusters of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, the point estimate inside it, and the bootstrap's standard error."""

    estimate: float
    low: float
    high: float
    stderr: float


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of whole clusters (documents), the same for every statistic: differences are paired.

    clusters: int[tokens], equal for tokens that belong together. Intervals are percentile intervals
    with the small-sample expansion of Hesterberg (2015, arXiv 1411.5279): without it they
    are too short by the factor sqrt((n-1)/n) and the normal quantile.
    """

    clusters: NDArray[np.int64]
    resamples: int = 2000
    level: float = 0.95
    seed: int = 0
    _index: NDArray[np.int64] = field(init=False, repr=False)
    _sizes: F64 = field(init=False, repr=False)
    _weights: F64 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _, index, sizes = np.unique(self.clusters, return_inverse=True, return_counts=True)
        n = len(sizes)
        rng = np.random.default_rng(self.seed)
        weights = rng.multinomial(n, np.full(n, 1 / n), self.resamples).astype(np.float64)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_sizes", sizes.astype(np.float64))
        object.__setattr__(self, "_weights", weights)

    @property
    def n(self) -> int:
        """Number of clusters."""
        return len(self._sizes)

    def interval(self, values: Array, of: Callable[[F64], F64] | None = None) -> Interval:
        """Interval of the mean over tokens of `values` (float[tokens]), or of a function `of` that mean.

        With fewer than two clusters nothing can be said: low and high are NaN.
        """
        of = of or (lambda mean: mean)
        values = np.asarray(values, np.float64)
        estimate = float(of(np.asarray(values.mean())))
        if self.n < 2:
            return Interval(estimate, float("nan"), float("nan"), float("nan"))
        sums = np.bincount(self._index, values, minlength=self.n)
        means = of((self._weights @ sums) / (self._weights @ self._sizes))
        n = self.n
        tail = NormalDist().cdf(-((n / (n - 1)) ** 0.5) * _student(0.5 + self.level / 2, n - 1))
        low, high = np.quantile(means, [tail, 1 - tail])
        return Interval(estimate, float(low), float(high), float(means.std(ddof=1) * (n / (n - 1)) ** 0.5))


def _student(p: float, df: int) -> float:
    """Quantile of Student's t: Hill's expansion (1970, Algorithm 396) from the normal quantile, exact for df ≤ 2."""
    if df == 1:
        return float(np.tan(np.pi * (p - 0.5)))
    if df == 2:
        return float((2 * p - 1) * np.sqrt(2 / (4 * p * (1 - p))))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(t / df**k for k, t in enumerate(terms)))
