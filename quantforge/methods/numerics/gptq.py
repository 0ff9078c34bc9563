"""GPTQ's loops over the columns of a matrix, and the order in which they are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...codecs import GridCodec
from ...codecs.base import Codes, Params


class Loop:
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
