"""GPTQ's loops over the columns of a matrix, and the order in which they are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import native
from ...codecs import GridCodec
from ...codecs.base import Codes, Params
from ...device import launch

FUSED = 128
"""Columns that a kernel takes at once, at most."""


def fuses(codec: GridCodec, device: torch.device) -> bool:
    """Whether a kernel rounds columns and hands on their errors: where numbers are evenly spaced, on a GPU."""
    return codec.even and device.type == "cuda" and native.cuda_has("", "feedback")


class Loop:
    """The columns in turn. Weights lie [column, row] here: what is done to one column is done to neighbours in memory.

    On a GPU nothing waits for it, if the codec's `search` does not: what went wrong shows in `finite` at the end.
    """

    def __init__(
        self, codec: GridCodec, u: torch.Tensor, order: torch.Tensor, cost: torch.Tensor, size: int, whole: Params | None
    ) -> None:
        self.codec, self.u, self.order, self.cost, self.size, self.whole = codec, u, order, cost, size, whole
        self.at = order.tolist()
        self.blocks: list[Params] = [{} for _ in range(len(u) // size)]
        self.codes: list[Codes] = []
        self.finite = torch.ones((), dtype=torch.bool, device=u.device)
        """Whether what was fitted was finite."""
        self.fused = fuses(codec, u.device)

    def run(self, w: torch.Tensor, segment: int, inner: int) -> Codes:
        """The codes of w: f32[in, out], which is used up. segment, inner: columns whose errors reach those behind them, and
        those of their segment, in one matrix product; a kernel takes more than `inner`.
        """
        if self.fused:
            inner = min(FUSED, segment, self.size if self.whole is None else segment)
        threads = torch.get_num_threads()
        try:
            self.part(w, torch.empty_like(w[:segment]), 0, len(w), (len(w), segment, inner), threads)
        finally:
            torch.set_num_threads(threads)
        first = self.order[:: self.codec.vector]
        return torch.cat(self.codes, 1)[:, first.argsort()]

    def part(self, w: torch.Tensor, errors: torch.Tensor, first: int, last: int, steps: Sequence[int], threads: int) -> None:
        """Columns first:last, in parts whose errors reach the rest of them in one matrix product; into errors[: last - first]."""
        if len(steps) == 1:
            if self.fused:
                self.columns(w, errors, first, last)
                return
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
        codec, v = self.codec, self.codec.vector
        params, inside = self.params(w, j)
        x, own = w[j : j + v], self.u[j : j + v, j : j + v]
        if v == 1:
            q = codec.round(x.t(), params, inside)
        else:  # what errors of the vector cost after the columns to come: its part of the inverse, inverted
            q = codec.round_weighted(x.t(), params, inside, torch.cholesky_inverse(own, upper=True).diagonal())
        d = x - codec.expand(q, params, inside).t()
        self.codes.append(q)
        error = d / own if v == 1 else torch.linalg.solve_triangular(own.t(), d, upper=False)
        if j + v < last:
            w[j + v : last].addmm_(self.u[j : j + v, j + v : last].t(), error, alpha=-1)
        errors[:v] = error

    def columns(self, w: torch.Tensor, errors: torch.Tensor, first: int, last: int) -> None:
        """`column` of all of them by one kernel. They share a block, or parameters were fitted beforehand."""
        params, inside = self.params(w, first)
        n, start = last - first, self.at[first] - inside
        if self.at[first:last] == list(range(self.at[first], self.at[first] + n)):
            spaced = self.codec.spacing(params, inside, n)
            own: slice | torch.Tensor = slice(None)
        else:
            spaced = self.codec.spacing(params, 0, len(w) if self.whole is not None else self.size)
            own = self.order[first:last] - start
        step, offset = (
            torch.empty(0, device=w.device) if t is None else t[:, own if t.shape[1] > 1 else slice(None)].t().expand(n, -1)
            for t in (spaced.step, spaced.offset)
        )
        levels = torch.tensor([spaced.zero, spaced.lowest, spaced.highest], dtype=torch.int32)
        codes = torch.empty((n, w.shape[1]), dtype=torch.uint8, device=w.device)
        u = self.u[first:last, first:last].contiguous()
        launch("", "feedback", [w[first:last], u, step.contiguous(), offset.contiguous(), levels], [codes, errors[:n]], w.device)
        self.codes.append(codes.t())

    def params(self, w: torch.Tensor, j: int) -> tuple[Params, int]:
        """Parameters of the j-th column, and its place in what they are of. Those of a block are fitted when it is reached,
        to what all errors before have made of it."""
        at, size = self.at[j], self.size
        if self.whole is not None:
            return self.whole, at
        b = at // size
        if not self.blocks[b]:
            now = w[j : j + size][self.order[j : j + size].argsort()].t().contiguous()
            self.finite &= now.isfinite().all()
            self.blocks[b] = self.codec.search(now, self.cost[b * size : (b + 1) * size])
        return self.blocks[b], at - b * size


def column_order(diagonal: torch.Tensor, size: int, vector: int, act_order: bool, static_groups: bool) -> torch.Tensor:
    """Columns in the order in which they are rounded; vectors stay together, and without static groups blocks do."""
    columns = torch.arange(len(diagonal), device=diagonal.device)
    if not act_order:
        return columns

    def falling(groups: torch.Tensor) -> torch.Tensor:
        return groups[diagonal[groups].reshape(len(groups), -1).sum(1).argsort(descending=True, stable=True)]

    if static_groups:
        return falling(columns.reshape(-1, vector)).reshape(-1)
    return torch.cat([falling(block.reshape(-1, vector)).reshape(-1) for block in falling(columns.reshape(-1, size))])
