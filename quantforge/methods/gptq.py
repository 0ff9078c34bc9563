"""GPTQ on any grid: round columns one after the other and let the columns to come make up for the error.

Source: Frantar et al., "GPTQ", arXiv 2210.17323 (the letters H, U, E are the paper's). Different here: block
parameters are fitted with the weights 1/U²ⱼⱼ, what an error in column j costs after all that follows has
made up for it; and the target is the output of the *unquantized* model, w·x₀, for the inputs x that quantized
predecessors give (‖ŵx − wx₀‖² = ‖(ŵ − w′)x‖² + const with w′ = w(1 + S H⁻¹), S = mean (x₀ − x)xᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..arrays import Parts
from ..codecs import Codec, GridCodec
from ..codecs.base import Codes, Encoded, Params, check_matrix
from ..codecs.integers import ActOrderCodec, reorder
from ..errors import CalibrationError, NonFiniteError, RecipeError, UnsupportedError
from .base import Method, Stats, register

if TYPE_CHECKING:
    import torch

SEGMENT = 128
"""Columns whose errors reach the columns behind them in one matrix product."""
_INNER = 16
"""The same among the columns of a segment."""


def gptq(
    w: torch.Tensor,
    codec: GridCodec,
    hessian: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    segment: int = SEGMENT,
) -> tuple[Codes, Params]:
    """Codes and block parameters that make ‖ŵx − wx₀‖² small; without shift x₀ = x and this is (ŵ − w) H (ŵ − w)ᵀ.

    w: f32[out, in]; hessian, shift: f32[in, in], of `Stats`. act_order: columns in the order of falling diag H; with
    static_groups any column may follow any other and all parameters are fitted to w beforehand, else whole blocks
    follow each other and each is fitted to what the errors before have made of it.
    Raises ShapeError, NonFiniteError, CalibrationError.
    """
    import torch

    from .numerics.gptq import Loop, column_order
    from .numerics.moments import aim, factor

    n, v = w.shape[1], codec.vector
    check_matrix(w, None, codec)
    size = codec.block_size if codec.block_size > 1 else n  # 1: parameters for whole rows
    if size < n and size % segment and segment % size:  # a block is fitted when all errors before it have arrived
        segment = size
    order = column_order(hessian.diagonal(), size, v, act_order, static_groups)
    inverse = order.argsort()
    w = w.float().clone()
    exact, dead = factor(hessian[order][:, order] if act_order else hessian, damping)
    if shift is not None:
        w = aim(w, shift, exact.float(), order)
    w[:, order[dead]] = 0  # never multiplied by anything
    cost = (1 / exact.diagonal() ** 2).float()[inverse]
    u = exact.float()
    del exact
    whole = codec.fit(w, cost) if static_groups else None
    loop = Loop(codec, u, order, cost, size, whole)
    codes = loop.run(w[:, order].t().contiguous(), segment, _INNER)
    params = whole or {k: torch.cat([p[k] for p in loop.blocks], 1) for k in loop.blocks[0]}
    if not bool(loop.finite):
        raise NonFiniteError(f"{codec.name}: errors that columns hand on have grown out of all bounds; give more --damping", ())
    codec.verify(w, params)
    return codes, params


@dataclass(frozen=True)
class GPTQ(Method):
    """Error feedback on the codec's grid; see `gptq`.

    An `ActOrderCodec` says of each column to which group it belongs: there the groups are cut from the sorted columns.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    sequential: bool = True

    name = "gptq"
    needs = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not 0 <= self.damping < 1:
            raise RecipeError(f"--damping {self.damping:g}: give a part of the Hessian's mean diagonal, 0 to 1; usual is 0.01")

    def settings(self) -> Mapping[str, Any]:
        """In AutoGPTQ's words."""
        return {
            "desc_act": self.act_order,
            "static_groups": self.static_groups,
            "damp_percent": self.damping,
            "true_sequential": self.sequential,
        }

    @property
    def one_pass(self) -> bool:
        """See `Method.one_pass`."""
        return not self.sequential

    def takes(self, codec: Codec) -> bool:
        """Every grid."""
        return isinstance(codec, GridCodec | ActOrderCodec)

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`. Raises UnsupportedError for codecs that are no GridCodec."""
        if stats is None:
            raise CalibrationError("GPTQ needs a Hessian: calibrate")
        h, shift = stats.hessian, stats.shift
        if isinstance(codec, ActOrderCodec):
            falling = h.diagonal().argsort(descending=True, stable=True)
            shift = None if shift is None else shift[falling][:, falling]
            codes, params = gptq(w[:, falling], codec.plain, h[falling][:, falling], shift, damping=self.damping)
            sorted_columns = Encoded(codec.plain, tuple(w.shape), codec.plain.pack(codes, params))
            return reorder(sorted_columns, falling.cpu().numpy()).parts
        if not isinstance(codec, GridCodec):
            raise UnsupportedError(f"{codec.name} has no grid that error feedback could round to; use method rtn")
        return codec.pack(
            *gptq(w, codec, h, shift, damping=self.damping, act_order=self.act_order, static_groups=self.static_groups)
        )


register(GPTQ())
