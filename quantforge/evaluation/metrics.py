"""Statistics of a model's predictions against a reference's: perplexity, KL divergence, flips, answer similarity,
and their intervals by a bootstrap over clusters of tokens.

Logits stream through `Score.add`, some tokens and some of the vocabulary at a time; what is kept is a few numbers per
scored token, never vocabulary × tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, to_numpy
from ..errors import NonFiniteError, ShapeError

if TYPE_CHECKING:
    import torch

F64 = NDArray[np.float64]
PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9}


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, the point estimate inside it, and the bootstrap's standard error."""

    estimate: float
    low: float
    high: float
    stderr: float


@dataclass(slots=True)
class Tokens:
    """What one model said at every scored position: arrays [tokens]."""

    nll: F64
    """-ln p(next token), nats."""
    top: NDArray[np.int64]
    """The most likely token."""
    kld: F64
    """KL(reference ‖ model), nats; zeros for the reference itself."""


class Score:
    """Collects the predictions of a reference and its candidates on the same positions.

    Model 0 is the reference. Logits may come in any slices of positions and, for each position, of the vocabulary: sums
    of exponentials run under the highest logit so far. Exponentials and differences of logits are float32, sums over
    slices of the vocabulary float64.
    """

    def __init__(self, names: Sequence[str], targets: torch.Tensor | Array, device: str = "cpu") -> None:
        """targets: int[tokens], what follows at each position; device: where logits will be."""
        import torch

        self.names = list(names)
        self.targets = np.asarray(to_numpy(targets), np.int64)
        """The tokens that followed: int[tokens]."""
        self._wanted = torch.as_tensor(self.targets, device=device)
        shape = (len(self.names), len(self.targets))

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._highest, self._top = full(-torch.inf, torch.float32), full(-1, torch.int64)
        self._sum = full(0, torch.float64)  # of exp(logit - highest)
        self._hit = full(torch.nan, torch.float32)  # the logit of the token that followed
        self._gap = full(0, torch.float64)  # sum of exp(reference - its highest) · (reference - model)

    def add(self, logits: Iterable[torch.Tensor | Array], at: slice = slice(None), column: int = 0) -> None:
        """Take logits of every model.

        logits: of each model in turn, [n, columns], any float dtype; float32 is overwritten. at: which n positions
        they are at; column: the token that their first column is. Raises NonFiniteError with the index (model, position,
        token), ShapeError where vocabularies differ.
        """
        import torch

        wanted = self._wanted[at] - column
        y_ref = e_ref = scratch = None  # of the reference: logits less the highest, and the exponentials of those
        for i, (name, logit) in enumerate(zip(self.names, logits, strict=True)):
            z = torch.as_tensor(logit, device=wanted.device).float()
            if y_ref is not None and z.shape != y_ref.shape:
                raise ShapeError(f"{name}: logits {list(z.shape)} but {self.names[0]} has {list(y_ref.shape)}")
            inside = (wanted >= 0) & (wanted < z.shape[-1])
            hit = z.gather(1, wanted.clamp(0, z.shape[-1] - 1)[:, None])[:, 0]
            best, top = z.max(-1)
            before = self._highest[i, at]
            highest = torch.maximum(before, best)
            y = z.sub_(highest[:, None])
            shrink = (before.double() - highest).exp()
            if y_ref is None or e_ref is None or scratch is None:
                y_ref, e_ref, scratch, shrink_ref, highest_ref = y, y.exp(), torch.empty_like(y), shrink, highest
                part = part_ref = e_ref.sum(-1).double()
            else:
                # differences of what lies under the highest come first, in float32: nothing large cancels
                gap = torch.sub(y_ref, y, out=scratch).mul_(e_ref).sum(-1).double()
                gap += (highest_ref.double() - highest) * part_ref
                self._gap[i, at] = self._gap[i, at] * shrink_ref + gap
                part = y.exp_().sum(-1).double()
            if not bool(torch.isfinite(part).all()):
                position = int((~torch.isfinite(part)).nonzero()[0])
                index = (i, (at.start or 0) + position, column + int(top[position]))
                raise NonFiniteError(f"{name}: logit {index[2]} of scored token {index[1]} is not finite", index)
            self._hit[i, at] = torch.where(inside, hit, self._hit[i, at])
            self._top[i, at] = torch.where(best > before, top + column, self._top[i, at])
            self._sum[i, at] = self._sum[i, at] * shrink + part
            self._highest[i, at] = highest

    def tokens(self, model: int) -> Tokens:
        """Everything collected for one model, position by position."""
        log_sum = self._highest.double() + self._sum.log()
        nll = log_sum[model] - self._hit[model]
        # KL = Σ p·(reference - model) + ln Σe - ln Σe of the reference
        kld = (self._gap[model] / self._sum[0] + log_sum[model] - log_sum[0]).clamp_min_(0)
        return Tokens(nll.cpu().numpy(), self._top[model].cpu().numpy(), (kld if model else kld * 0).cpu().numpy())


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


def perplexity(tokens: Tokens) -> dict[str, float]:
    """`ppl`, and `ppl_stderr` as llama-perplexity computes it: every token taken as independent."""
    nll = tokens.nll
    ppl = float(np.exp(nll.mean()))
    stderr = float(ppl * nll.std() / np.sqrt(max(1, len(nll) - 1)))
    return {"ppl": ppl, "ppl_stderr": stderr}


def divergence(tokens: Tokens, reference: Tokens) -> dict[str, float]:
    """Mean, percentiles and maximum of KL(reference ‖ model), same-top-1 and Δp (both in percent), ln of the PPL ratio."""
    dp = delta_p(tokens, reference)
    found = {
        "ln_ppl_ratio": float(tokens.nll.mean() - reference.nll.mean()),
        "kld_mean": float(tokens.kld.mean()),
        "kld_max": float(tokens.kld.max()),
        "same_top": float(100 * (tokens.top == reference.top).mean()),
        "dp_mean": float(100 * dp.mean()),
        "dp_rms": float(100 * np.sqrt((dp**2).mean())),
    }
    return found | {f"kld_{k}": float(np.percentile(tokens.kld, q)) for k, q in PERCENTILES.items()}


def delta_p(tokens: Tokens, reference: Tokens) -> F64:
    """Change of the probability of the token that followed: float[tokens]."""
    return np.asarray(np.exp(-tokens.nll) - np.exp(-reference.nll))


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


def intervals(tokens: Tokens, reference: Tokens, bootstrap: Bootstrap) -> dict[str, dict[str, float]]:
    """Confidence intervals of a model's own figures, in their units."""
    dp = delta_p(tokens, reference)
    found = {
        "ppl": bootstrap.interval(tokens.nll, np.exp),
        "ln_ppl_ratio": bootstrap.interval(tokens.nll - reference.nll),
        "kld_mean": bootstrap.interval(tokens.kld),
        "same_top": bootstrap.interval(100.0 * (tokens.top == reference.top)),
        "dp_mean": bootstrap.interval(100 * dp),
        "dp_rms": bootstrap.interval(dp**2, lambda m: 100 * np.sqrt(m)),
    }
    return {k: asdict(v) for k, v in found.items()}


def difference(a: Tokens, b: Tokens, reference: Tokens, bootstrap: Bootstrap) -> dict[str, dict[str, float]]:
    """Paired intervals of a minus b on the same tokens; `ln_ppl_ratio` is ln(ppl a / ppl b)."""
    same = (a.top == reference.top).astype(np.float64) - (b.top == reference.top)
    found = {
        "ln_ppl_ratio": bootstrap.interval(a.nll - b.nll),
        "kld_mean": bootstrap.interval(a.kld - b.kld),
        "same_top": bootstrap.interval(100.0 * same),
    }
    return {k: asdict(v) for k, v in found.items()}


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
