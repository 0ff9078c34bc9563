"""What of a model goes where: the matrices as a block computes with them, and the tensors that a plan writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..archs.weight import Weight
from ..arrays import F32, Parts
from ..codecs.plain import PlainCodec
from ..errors import UnsupportedError
from ..runtime import Model
from ..runtime.matrices import runs
from ..runtime.stored import expert_of
from .plan import PlannedTensor

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)\.weight")
"""A matrix of one expert, as `observing` names it where a checkpoint has them one by one."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where rows of a matrix of the model go."""

    tensor: PlannedTensor
    rows: NDArray[np.int64] | None = None
    """Which of its rows, in the output's order; None: all, as they are."""
    row: int = 0
    """Where they begin in `tensor`: experts are stacked."""
    columns: NDArray[np.int64] | None = None
    """The order of its columns in the output, where it is another one."""

    def take(self, w: torch.Tensor) -> torch.Tensor:
        """These numbers of the matrix."""
        w = w if self.rows is None else w[torch.from_numpy(self.rows).to(w.device)]
        return w if self.columns is None else w[:, torch.from_numpy(self.columns).to(w.device)]

    def put(self, w: torch.Tensor, numbers: torch.Tensor) -> None:
        """The inverse of `take`, in place."""
        if self.columns is not None:
            numbers = numbers[:, torch.from_numpy(np.argsort(self.columns)).to(w.device)]
        if self.rows is None:
            w.copy_(numbers)
        else:
            w[torch.from_numpy(self.rows).to(w.device)] = numbers.to(w.dtype)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of a tensor done."""

    output: Output
    parts: Parts
    """As they are stored."""
    weights: F32
    """What they were, in the output's row order."""
    method: str
    """Which one was kept: the one that was asked for, or rtn."""
    output_error: float | None = None
    """Relative squared error of the outputs on held-out windows; see `methods.output_error`."""
    rtn_error: float | None = None
    tokens: int | None = None
    """Calibration tokens that reached it; of an expert, those routed to it."""
    expert: bool = False


@dataclass(frozen=True, slots=True)
class Outputs:
    """The tensors of the output in terms of the model's own."""

    made: Mapping[str, Weight]
    """Tensor of the output -> what it is made of: checkpoint tensors."""
    of: Mapping[str, Sequence[Output]]
    """Matrix of the model, as `observing` names it -> where its rows go, unchanged but for their order."""
    tensors: Mapping[str, PlannedTensor]

    @classmethod
    def find(cls, model: Model, tensors: Sequence[PlannedTensor]) -> Outputs:
        """Those of a plan. Raises UnsupportedError for experts that cannot be stored one by one."""
        forward = model.gguf if model.source.gguf_names else {}
        made: dict[str, Weight] = {}
        of: dict[str, list[Output]] = {}
        for t in tensors:
            if t.weight.constant is not None:
                continue
            if t.name != t.weight.name:  # a checkpoint's tensor: the model's own
                made[t.name] = Weight.of(t.name, t.shape)
            else:
                made[t.name] = forward.get(t.weight.sources[0], t.weight) if t.weight.plain else t.weight
            for matrix, output in _rows(model, t, made[t.name]):
                of.setdefault(matrix, []).append(output)
        return cls(made, of, {t.name: t for t in tensors})


def _rows(model: Model, t: PlannedTensor, made: Weight) -> Iterator[tuple[str, Output]]:
    """The model's matrices that a tensor has rows of; none where numbers change on the way, or rows are no rows there."""
    parts = runs(model, made) if made.value is None else []
    if len(parts) > 1 and not t.target.row_local and not isinstance(t.target, PlainCodec):
        raise UnsupportedError(f"{t.name}: {t.target.name} cannot hold matrices that are quantized one by one; use method rtn")
    for r in parts:
        yield r.matrix, Output(t, r.rows, r.at, made.columns)


def role_of_experts(name: str) -> str:
    """What all experts' matrices of a kind are called, with a star for the number; empty where it is no expert's."""
    stem, e = expert_of(name)
    match = _EXPERT.fullmatch(name)
    return f"{stem}[*]" if e is not None else f"{match[1]}.*.{match[3]}" if match else ""


def is_expert(name: str) -> bool:
    """Is a matrix, as `observing` names it, one expert's?"""
    return role_of_experts(name) != ""
