"""AWQ: before rounding, make the columns that see large inputs larger, and what feeds them smaller by as much.

Source: Lin et al., "AWQ", arXiv 2306.00978. Scales s = (root mean square of x)ᵅ, α by search on the output error of
the whole block; they are folded into the preceding norm or linear, so that every output format profits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..arrays import Parts
from ..codecs import Codec
from ..codecs.base import Encoded
from .base import Method, Stats, get, register

_CLIPS = tuple(1 - i / 20 for i in range(11))

Loss = Callable[[Sequence[torch.Tensor]], float]


@dataclass(frozen=True)
class AWQ:
    """Scale search per group of matrices that share an input; then `inner` chooses the codes."""

    inner: str | Method = "rtn"
    """The method that chooses the codes."""
    steps: int = 20
    """α = 0, 1/steps, ...; 0 changes nothing."""
    clip: bool = False
    """Also search, of every group of every row, how much of its largest weight to cut off: see `clipped`."""

    @property
    def name(self) -> str:
        """awq, or awq+gptq."""
        inner = get(self.inner).name
        return "awq" if inner == "rtn" else f"awq+{inner}"

    @property
    def needs(self) -> frozenset[str]:
        """See `Method.needs`."""
        return get(self.inner).needs | {"importance", "inputs"} | ({"hessian"} if self.clip else set())

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
        rms = share(importance.clamp_min(0).sqrt())
        one = torch.ones_like(rms)
        floor = rms.max() * 1e-6
        if not float(floor) > 0:
            return one
        best, least = one, float("inf")
        for step in range(self.steps):
            s = rms.clamp_min(floor) ** (step / self.steps)
            s = s / (s.max() * s.min()).sqrt()
            trial = loss([_rounded(w, codec, importance, s) for w, codec in zip(ws, codecs, strict=True)])
            if trial < least:
                best, least = s, trial
        chosen, plain = ([_rounded(w, c, importance, s) for w, c in zip(ws, codecs, strict=True)] for s in (best, one))
        return best if judge(chosen) < judge(plain) else one

    def settings(self) -> Mapping[str, Any]:
        """Those of the inner method."""
        return get(self.inner).settings()

    def takes(self, codec: Codec) -> bool:
        """As the inner method."""
        return get(self.inner).takes(codec)

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`; w and stats are those after scaling."""
        if self.clip and stats is not None:
            w = clipped(w, codec, stats)
        return get(self.inner).quantize(w, codec, stats)


def clipped(w: torch.Tensor, codec: Codec, stats: Stats) -> torch.Tensor:
    """w with the largest weights of every group of columns cut to the part of their magnitude, 1 to 0.5 in twentieths,
    that makes the group's share of the output error, d H dᵀ with H the group's inputs', smallest after rounding.

    w: f32[out, in]. Groups are the codec's blocks, or rows. Weights are changed only where that errs less.
    """
    out, n = w.shape
    size = codec.block_size if 1 < codec.block_size < n else n
    h = torch.stack([stats.hessian[i : i + size, i : i + size] for i in range(0, n, size)])
    importance = stats.importance.cpu().numpy()
    groups = w.reshape(out, -1, size)
    largest = groups.abs().amax(-1, keepdim=True)
    best, least = w, torch.full_like(largest[..., 0], float("inf"))
    for part in _CLIPS:
        trial = groups.clamp(-largest * part, largest * part).reshape(out, n)
        parts = codec.encode(trial.cpu().numpy(), importance)
        d = (torch.from_numpy(codec.decode(parts, (out, n))).to(w) - w).reshape(groups.shape)
        error = torch.einsum("ogi,gij,ogj->og", d, h, d)
        better = error < least
        least = error.minimum(least)
        best = torch.where(better[..., None], trial.reshape(groups.shape), best.reshape(groups.shape)).reshape(out, n)
    return best


def _rounded(w: torch.Tensor, codec: Codec, importance: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """w as it is after scaling by s, rounding and scaling back."""
    parts = codec.encode((w * s).cpu().numpy(), (importance / s**2).cpu().numpy())
    return torch.from_numpy(Encoded(codec, tuple(w.shape), parts).decode()).to(w) / s


register(AWQ())
register(AWQ("gptq"))
