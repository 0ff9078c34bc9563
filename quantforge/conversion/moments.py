"""Sums over the inputs of a matrix while calibration text runs: what a method needs to choose codes, and to be judged by."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import reduce

import torch

from ..calibration.gather import FEW_TOKENS
from ..methods import Stats

EXPERT_TOKENS = 4 * FEW_TOKENS
"""An expert that saw fewer is lent the mean of all experts for what is missing."""
_STRIPE = 1024
"""Columns of a Hessian that are summed together."""


class Moments:
    """Of inputs that some matrices share: on the windows that choose, and on the held-out ones that judge."""

    def __init__(self, needs: AbstractSet[str]) -> None:
        """needs: as in `Method.needs`. Judges always have second moments."""
        self.choosing, self.judging = _Sums(needs), _Sums({"hessian"}, drift=True)
        self.seen = 0
        """Tokens that were really there."""

    def add(self, x: torch.Tensor, full: torch.Tensor | None, judges: torch.Tensor) -> None:
        """x: inputs [tokens, in]; full: those of the unquantized model; judges: bool[tokens]."""
        for sums, rows in ((self.choosing, ~judges), (self.judging, judges)):
            at = rows.nonzero()[:, 0].to(x.device)  # on the host: a mask on a device would have it wait
            if len(at):
                sums.add(x[at], None if full is None else full[at])
        self.seen += len(x)


class _Sums:
    """Sums of outer products, or of squares, or the inputs themselves."""

    def __init__(self, needs: AbstractSet[str], drift: bool = False) -> None:
        self.needs, self.drift = needs, drift
        self.sums: dict[str, torch.Tensor] = {}
        self.inputs: list[torch.Tensor] = []
        self.tokens = 0

    def add(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        if "hessian" in self.needs:
            n = x.shape[1]
            hessian = self._sum("hessian", x, (n, n))
            for j in range(0, n, _STRIPE):  # symmetric: the lower triangle is enough
                hessian[j:, j : j + _STRIPE].addmm_(x[:, j:].T, x[:, j : j + _STRIPE])
            if full is not None:
                stray = full - x
                self._sum("shift", x, (n, n)).addmm_(stray.T, x)
                if self.drift:
                    drift = self._sum("drift", x, (n, n))
                    for j in range(0, n, _STRIPE):
                        drift[j:, j : j + _STRIPE].addmm_(stray[:, j:].T, stray[:, j : j + _STRIPE])
        elif "importance" in self.needs:
            self._sum("squares", x, (x.shape[1],)).add_(x.square().sum(0))
        if "inputs" in self.needs:
            self.inputs.append(x)
        self.tokens += len(x)

    def _sum(self, kind: str, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if kind not in self.sums:
            self.sums[kind] = like.new_zeros(shape)
        return self.sums[kind]

    def stats(self) -> Stats | None:
        """The means, or None if there was no token; the sums are used up."""
        n = self.tokens
        if not n:
            return None
        for kind, total in self.sums.items():
            total.mul_(1 / n if kind == "squares" else 2 / n)
            for j in range(0, len(total) if kind in ("hessian", "drift") else 0, _STRIPE):
                total[j : j + _STRIPE, j + _STRIPE :] = total[j + _STRIPE :, j : j + _STRIPE].T
        hessian, shift, drift, squares = (self.sums.get(k) for k in ("hessian", "shift", "drift", "squares"))
        inputs = torch.cat(self.inputs) if self.inputs else None
        return Stats(hessian, n, shift, drift, importance=squares, inputs=inputs)


def lend(experts: Sequence[Moments]) -> None:
    """Give experts that saw too few tokens the mean of all experts' sums for what is missing."""
    for all_sums, need in (([m.choosing for m in experts], EXPERT_TOKENS), ([m.judging for m in experts], FEW_TOKENS)):
        total = sum(s.tokens for s in all_sums)
        kinds = dict.fromkeys(k for s in all_sums for k in s.sums)
        means = {k: reduce(torch.add, [s.sums[k] for s in all_sums if k in s.sums]) * (1 / total) for k in kinds}
        for s in all_sums:
            missing = need - s.tokens
            if missing > 0 and means:
                s.sums = {k: s.sums[k] + missing * mean if k in s.sums else missing * mean for k, mean in means.items()}
                s.tokens = need
