"""AWQ: before rounding, make the columns that see large inputs larger, and what feeds them smaller by as much.

Source: Lin et al., "AWQ", arXiv 2306.00978. Scales (root mean square of x)ᵅ / (mean magnitude of w)ᵝ, by search on the
output error of the whole block, are folded into the preceding norm or linear, so that every output format profits; then
the ranges of the weights are searched. Different here: a range is judged with the whole Hessian, knowing what the columns
before have become, where AutoAWQ sees each group alone; and the target is the unquantized model's output (see `aim`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arrays import Parts
from ..codecs import Codec
from .base import Block, Method, Stats, get, register

if TYPE_CHECKING:
    import torch

_BETAS = (0.25, 0.5, 0.75, 1.0)
_DAMPING = 0.01
"""As `GPTQ.damping`."""

Loss = Callable[[Sequence["torch.Tensor"]], float]


@dataclass(frozen=True)
class AWQ(Method):
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
    def rewrite(self) -> str:
        """What `prepare` does is awq, whatever chooses the codes."""
        return "awq"

    @property
    def needs(self) -> AbstractSet[str]:
        """Ranges are judged with the Hessian."""
        return get(self.inner).needs | {"hessian"}

    def prepare(self, block: Block) -> None:
        """Scale the columns of every group of matrices that share an input."""
        for group in block.groups():
            s = self.scales(group.matrices, group.codecs, group.importance, group.loss, group.judge, group.share)
            if not bool((s == 1).all()):
                group.scale(s)

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
        from .numerics.awq import magnitudes, rounded

        x, w = share(importance.clamp_min(0).sqrt()), share(magnitudes(ws, codecs))
        one, floor = x.new_ones(x.shape), float(x.max()) * 1e-6
        if not floor > 0:
            return one

        def scaled(s: torch.Tensor) -> list[torch.Tensor]:
            return [rounded(w, codec, importance, s) for w, codec in zip(ws, codecs, strict=True)]

        def powers(a: float, b: float) -> torch.Tensor:
            s = x.clamp_min(floor) ** a / w**b
            return s / (s.max() * s.min()).sqrt()

        losses = {(a, 0.0): loss(scaled(powers(a, 0.0))) for a in (step / self.steps for step in range(self.steps))}
        a, _ = min(losses, key=losses.__getitem__)
        losses |= {(a, b): loss(scaled(powers(a, b))) for b in _BETAS}
        best = powers(*min(losses, key=losses.__getitem__))
        return best if judge(scaled(best)) < judge(scaled(one)) else one

    def settings(self) -> Mapping[str, Any]:
        """Those of the inner method."""
        return get(self.inner).settings()

    def takes(self, codec: Codec) -> bool:
        """As the inner method."""
        return get(self.inner).takes(codec)

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`; w and stats are those after scaling. Raises CalibrationError, NonFiniteError."""
        from .numerics.awq import clipped
        from .numerics.moments import aim, factor

        inner = get(self.inner)
        if stats is None:
            return inner.quantize(w, codec, stats)
        rounds = inner.name == "rtn"
        if rounds and stats.shift is not None:
            upper, _ = factor(stats.hessian, _DAMPING)
            w = aim(w, stats.shift, upper.float())
        if not (rounds if self.clip is None else self.clip):
            return inner.quantize(w, codec, stats)
        w, parts = clipped(w, codec, stats)
        return parts if rounds else inner.quantize(w, codec, stats)


register(AWQ())
register(AWQ("gptq"))
