"""GPTQ on any grid: round columns one after the other and let the columns to come make up for the error.

Source: Frantar et al., "GPTQ", arXiv 2210.17323 (the letters H, U, E are the paper's). Different here: block
parameters are fitted with the weights 1/U²ⱼⱼ, what an error in column j costs after all that follows has
made up for it; and the target is the output of the *unquantized* model, w·x₀, for the inputs x that quantized
predecessors give (‖ŵx − wx₀‖² = ‖(ŵ − w′)x‖² + const with w′ = w(1 + S H⁻¹), S = mean (x₀ − x)xᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..arrays import Parts
from ..codecs import Codec, GridCodec
from ..codecs.base import Codes, Encoded, Params, check_matrix
from ..codecs.integers import ActOrderCodec, reorder
from ..errors import CalibrationError, RecipeError, UnsupportedError
from .base import Stats, aim, factor, register

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
    n, v = w.shape[1], codec.vector
    check_matrix(w, None, codec)
    size = codec.block_size if codec.block_size > 1 else n  # 1: parameters for whole rows
    if size < n and size % segment and segment % size:  # a block is fitted when all errors before it have arrived
        segment = size
    order = _order(hessian.diagonal(), size, v, act_order, static_groups)
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
    loop = _Loop(codec, u, order, cost, size, whole)
    codes = loop.run(w[:, order].t().contiguous(), (n, segment, _INNER))
    params = whole or {k: torch.cat([p[k] for p in loop.blocks], 1) for k in loop.blocks[0]}
    return codes, params


class _Loop:
    """The columns in turn. Weights lie [column, row] here: what is done to one column is done to neighbours in memory."""

    def __init__(
        self, codec: GridCodec, u: torch.Tensor, order: torch.Tensor, cost: torch.Tensor, size: int, whole: Params | None
    ) -> None:
        self.codec, self.u, self.order, self.cost, self.size, self.whole = codec, u, order.tolist(), cost, size, whole
        self.blocks: list[Params] = [{} for _ in range(len(u) // size)]
        self.codes: list[Codes | None] = [None] * (len(u) // codec.vector)

    def run(self, w: torch.Tensor, steps: Sequence[int]) -> Codes:
        """The codes of w: f32[in, out], which is used up."""
        threads = torch.get_num_threads()
        try:
            self.part(w, torch.empty_like(w[: steps[1]]), 0, len(w), steps, threads)
        finally:
            torch.set_num_threads(threads)
        return torch.cat([c for c in self.codes if c is not None], 1)

    def part(self, w: torch.Tensor, errors: torch.Tensor, first: int, last: int, steps: Sequence[int], threads: int) -> None:
        """Columns first:last, in parts whose errors reach the rest of them in one matrix product; into errors[: last - first]."""
        if len(steps) == 1:
            torch.set_num_threads(1)  # many small operations: waiting for a second thread takes longer than they do
            for j in range(first, last, self.codec.vector):
                self.column(w, errors[j - first :], j, last)
            torch.set_num_threads(threads)
            return
        for s in range(first, last, steps[1]):
            e = min(s + steps[1], last)
            mine = errors[s - first :] if len(steps) < 3 else errors
            self.part(w, mine, s, e, steps[1:], threads)
            if e < last:
                w[e:last].addmm_(self.u[s:e, e:last].t(), mine[: e - s], alpha=-1)

    def column(self, w: torch.Tensor, errors: torch.Tensor, j: int, last: int) -> None:
        """Round a column, or those that share a code, and take the error off those up to `last`."""
        codec, v, at = self.codec, self.codec.vector, self.order[j]
        params, inside = (self.whole, at) if self.whole is not None else self.block(w, j)
        x, own = w[j : j + v], self.u[j : j + v, j : j + v]
        if v == 1:
            q = codec.round(x.t(), params, inside)
        else:  # what errors of the vector cost after the columns to come: its part of the inverse, inverted
            q = codec.round_weighted(x.t(), params, inside, torch.cholesky_inverse(own, upper=True).diagonal())
        d = x - codec.expand(q, params, inside).t()
        self.codes[at // v] = q
        error = d / own if v == 1 else torch.linalg.solve_triangular(own.t(), d, upper=False)
        if j + v < last:
            w[j + v : last].addmm_(self.u[j : j + v, j + v : last].t(), error, alpha=-1)
        errors[:v] = error

    def block(self, w: torch.Tensor, j: int) -> tuple[Params, int]:
        """Parameters of the block of the j-th column, fitted when it is reached to what all errors before have made of it."""
        at, size = self.order[j], self.size
        b = at // size
        if not self.blocks[b]:
            sorted_ = torch.tensor(self.order[j : j + size], device=w.device).argsort()
            now = w[j : j + size][sorted_].t().contiguous()
            self.blocks[b] = self.codec.fit(now, self.cost[b * size : (b + 1) * size])
        return self.blocks[b], at - b * size


def _order(diagonal: torch.Tensor, size: int, vector: int, act_order: bool, static_groups: bool) -> torch.Tensor:
    """Columns in the order in which they are rounded; vectors stay together, and without static groups blocks do."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    if not act_order:
        return columns

    def falling(groups: torch.Tensor) -> torch.Tensor:
        return groups[diagonal[groups].reshape(len(groups), -1).sum(1).argsort(descending=True, stable=True)]

    if static_groups:
        return falling(columns.reshape(-1, vector)).reshape(-1)
    return torch.cat([falling(block.reshape(-1, vector)).reshape(-1) for block in falling(columns.reshape(-1, size))])


@dataclass(frozen=True)
class GPTQ:
    """Error feedback on the codec's grid; see `gptq`.

    An `ActOrderCodec` says of each column to which group it belongs: there the groups are cut from the sorted columns.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    name: str = "gptq"
    needs: frozenset[str] = frozenset({"importance", "hessian"})

    def __post_init__(self) -> None:
        if not 0 <= self.damping < 1:
            raise RecipeError(f"--damping {self.damping:g}: give a part of the Hessian's mean diagonal, 0 to 1; usual is 0.01")

    def settings(self) -> Mapping[str, Any]:
        """In AutoGPTQ's words."""
        return {
            "desc_act": self.act_order,
            "static_groups": self.static_groups,
            "damp_percent": self.damping,
            "true_sequential": True,
        }

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
