"""What models make of every token of a text: a few numbers each, kept while logits stream by.

Logits stream through `Score.add`, some tokens and some of the vocabulary at a time; what is kept is a few numbers per
scored token, never vocabulary × tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ...arrays import Array, to_numpy
from ...errors import NonFiniteError, ShapeError
from .bootstrap import F64

if TYPE_CHECKING:
    import torch


class Collector(Protocol):
    """Keeps what a metric needs of logits beyond `Tokens`."""

    def add(self, model: int, logits: torch.Tensor, reference: torch.Tensor, at: slice, column: int) -> None:
        """Take a slice of a model's logits and the same of the reference's; both are to be left as they are.

        model: 0 is the reference. logits, reference: float32 [n, columns], not normalized, on the device of the run. at:
        which n scored tokens; column: the vocabulary's token that the first column is. Every token meets every column
        once for each model.
        """


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

    def __init__(
        self, names: Sequence[str], targets: torch.Tensor | Array, device: str = "cpu", collectors: Sequence[Collector] = ()
    ) -> None:
        """targets: int[tokens], what follows at each position; device: where logits will be. collectors: see the logits too."""
        import torch

        self.names, self._collectors = list(names), collectors
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
        z_ref = y_ref = e_ref = scratch = None  # of the reference: logits less the highest, and the exponentials of those
        for i, (name, logit) in enumerate(zip(self.names, logits, strict=True)):
            z = torch.as_tensor(logit, device=wanted.device).float()
            if y_ref is not None and z.shape != y_ref.shape:
                raise ShapeError(f"{name}: logits {list(z.shape)} but {self.names[0]} has {list(y_ref.shape)}")
            if self._collectors:
                z_ref = z.clone() if z_ref is None else z_ref
                for collector in self._collectors:
                    collector.add(i, z, z_ref, at, column)
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
