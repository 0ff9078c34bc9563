"""AWQ: before rounding, make the columns that see large inputs larger, and what feeds them smaller by as much.

Source: Lin et al., "AWQ", arXiv 2306.00978. Scales (root mean square of x)ᵅ / (mean magnitude of w)ᵝ, by search on the
output error of the whole block, are folded into the preceding norm or linear, so that every output format profits; then
the ranges of the weights are searched. Different here: a range is judged with the whole Hessian, knowing what the columns
before have become, where AutoAWQ sees each group alone; and the target is the unquantized model's output (see `aim`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..arrays import Parts
from ..codecs import Codec
from ..codecs.base import Encoded
from .base import Method, Stats, aim, factor, get, register

_BETAS = (0.25, 0.5, 0.75, 1.0)
_CLIPS = tuple(1 - i / 20 for i in range(13))
_DAMPING = 0.01
"""As `GPTQ.damping`."""

Loss = Callable[[Sequence[torch.Tensor]], float]


@dataclass(frozen=True)
class AWQ:
    """Scale search per group of matrices that share an input; then `inner` chooses the codes."""

    inner: str | Method = "rtn"
    """The method that chooses the codes."""
    steps: int = 20
    """α = 0, 1/steps, ... with β = 0; then, with the best, β in quarters."""
    clip: bool | None = None
    """Also search, of every group of every row, how much of its largest weight to cut off: see `clipped`.
    None: where `inner` is rtn; GPTQ fits its ranges itself."""

    @property
    def name(self) -> str:
        """awq, or awq+gptq."""
        inner = get(self.inner).name
        return "awq" if inner == "rtn" else f"awq+{inner}"

    @property
    def needs(self) -> frozenset[str]:
        """See `Method.needs`."""
        return get(self.inner).needs | {"importance", "inputs", "hessian"}

    def scales(
        self,
        ws: Sequence[torch.Tensor],
        codecs: Sequence[Codec],
        importance: torch.Tensor,
        loss: Loss,
        judge: Loss,
        share: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
    ) -> torch.Tensor:
        """Factors of the columns, f32[in], that make `loss` smallest; all 1 if `judge` likes those better.

        ws: f32[out, in] each; importance: f32[in], mean x². loss, judge: of decoded matrices that take
        the place of ws, on the windows that choose and on the held-out ones.
        share: makes equal what must be equal (one value head feeds several query heads).
        """
        x, w = share(importance.clamp_min(0).sqrt()), share(_magnitudes(ws, codecs))
        one, floor = torch.ones_like(x), float(x.max()) * 1e-6
        if not floor > 0:
            return one

        def rounded(s: torch.Tensor) -> list[torch.Tensor]:
            return [_rounded(w, codec, importance, s) for w, codec in zip(ws, codecs, strict=True)]

        def powers(a: float, b: float) -> torch.Tensor:
            s = x.clamp_min(floor) ** a / w**b
            return s / (s.max() * s.min()).sqrt()

        losses = {(a, 0.0): loss(rounded(powers(a, 0.0))) for a in (step / self.steps for step in range(self.steps))}
        a, _ = min(losses, key=losses.__getitem__)
        losses |= {(a, b): loss(rounded(powers(a, b))) for b in _BETAS}
        best = powers(*min(losses, key=losses.__getitem__))
        return best if judge(rounded(best)) < judge(rounded(one)) else one

    def settings(self) -> Mapping[str, Any]:
        """Those of the inner method."""
        return get(self.inner).settings()

    def takes(self, codec: Codec) -> bool:
        """As the inner method."""
        return get(self.inner).takes(codec)

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`; w and stats are those after scaling. Raises CalibrationError, NonFiniteError."""
        inner = get(self.inner)
        if stats is None:
            return inner.quantize(w, codec, stats)
        rounds = inner.name == "rtn"
        if rounds and stats.shift is not None:
            upper, _ = factor(stats.hessian, _DAMPING)
            w = aim(w, stats.shift, upper.float(), torch.arange(w.shape[1], device=w.device))
        if not (rounds if self.clip is None else self.clip):
            return inner.quantize(w, codec, stats)
        w, parts = clipped(w, codec, stats)
        return parts if rounds else inner.quantize(w, codec, stats)


def clipped(w: torch.Tensor, codec: Codec, stats: Stats) -> tuple[torch.Tensor, Parts]:
    """w with the largest weights of every group of columns cut to a part of their magnitude, and its codes.

    Of every group of every row the part, 1 to 0.4, and the codec's encoding, without or with importance, that make the
    output error d H dᵀ smallest: d the errors of the groups before, already chosen, and its own. w: f32[out, in].
    Groups are the codec's blocks, or rows; of codecs whose rows share something (NVFP4's scale) nothing is cut off.
    """
    if not codec.row_local:
        return w, codec.encode(w.cpu().numpy(), stats.importance.cpu().numpy())
    n = w.shape[1]
    size = codec.block_size if 1 < codec.block_size < n else n
    importance = stats.importance.cpu().numpy()
    best, errors, found = w.clone(), torch.zeros_like(w), []
    for first in range(0, n, size):
        span = slice(first, first + size)
        x, h = w[:, span], stats.hessian[:, span]
        before, largest = 2 * (errors[:, :first] @ h[:first]), x.abs().amax(1, keepdim=True)
        least = torch.full_like(largest, float("inf"))
        chosen: Parts = {}
        for part, weighted in _trials(codec):
            trial = x.clamp(-largest * part, largest * part)
            parts = codec.encode(trial.contiguous().cpu().numpy(), importance[span] if weighted else None)
            d = torch.from_numpy(codec.decode(parts, tuple(x.shape))).to(w) - x
            error = ((d @ h[span] + before) * d).sum(1, keepdim=True)
            better = error < least
            least = error.minimum(least)
            best[:, span] = torch.where(better, trial, best[:, span])
            errors[:, span] = torch.where(better, d, errors[:, span])
            rows = better.cpu().numpy()
            chosen = {k: np.where(rows.reshape(-1, *[1] * (p.ndim - 1)), p, chosen.get(k, p)) for k, p in parts.items()}
        found.append(chosen)
    return best, {k: np.concatenate([c[k] for c in found], -1) for k in found[0]}


def _trials(codec: Codec) -> list[tuple[float, bool]]:
    """(part that is left of the largest weight, with importance): encoders that know importance search ranges themselves."""
    if codec.needs_importance:
        return [(part, True) for part in _CLIPS]
    return [(part, False) for part in _CLIPS] + [(part, True) for part in _CLIPS[:7:2]]


def _magnitudes(ws: Sequence[torch.Tensor], codecs: Sequence[Codec]) -> torch.Tensor:
    """Mean over all rows of |w| relative to the largest in its group, f32[in]; at least a hundredth."""
    found = []
    for w, codec in zip(ws, codecs, strict=True):
        size = codec.block_size if codec.block_size > 1 else w.shape[1]
        groups = w.abs().reshape(len(w), -1, size)
        found.append((groups / groups.amax(-1, keepdim=True).clamp_min(1e-30)).reshape(w.shape))
    return torch.cat(found).mean(0).clamp_min(0.01)


def _rounded(w: torch.Tensor, codec: Codec, importance: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """w as it is after scaling by s, rounding and scaling back."""
    parts = codec.encode((w * s).cpu().numpy(), (importance / s**2).cpu().numpy() if codec.needs_importance else None)
    return torch.from_numpy(Encoded(codec, tuple(w.shape), parts).decode()).to(w) / s


register(AWQ())
register(AWQ("gptq"))
