"""Tensors of an output as rows of the matrices that a model multiplies its activations with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..archs.weight import Weight, numbers
from .stored import StoredModel


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a tensor that follow one another and are rows of one matrix."""

    matrix: str
    """As `observing` names it."""
    at: int
    """The first of them in the tensor, all axes but the last merged."""
    count: int
    rows: NDArray[np.int64] | None
    """Which rows of the matrix, [out, in]; None: all, as they are."""


def runs(model: StoredModel, made: Weight) -> list[Run]:
    """What a tensor has of the model's matrices; none where its rows are no matrix's, as those of a matrix that is stored
    the other way round.

    made: of checkpoint tensors. Its `value` and `columns` are not looked at.
    """
    if made.single or made.groups or len(made.shape) < 2 or any(s not in model.places for s in made.sources):
        return []
    matrices: list[str] = []
    which, row = [], []
    for piece in made.pieces:
        shape = model.places[piece.source].shape
        crosswise = piece.groups > 0
        if len(shape) < 2 or crosswise != (piece.source in model.crosswise) or (crosswise and piece.rows is not None):
            return []
        high, wide = (shape[-1], shape[-2]) if crosswise else (shape[-2], shape[-1])
        if wide != made.shape[-1] or (len(shape) > 2 and high == 1):  # a convolution's
            return []
        rows = np.arange(piece.count) if piece.rows is None else numbers(piece.rows)
        which.append(len(matrices) + rows // high)
        row.append(rows % high)
        matrices += [piece.source] if len(shape) == 2 else [f"{piece.source}[{e}]" for e in range(shape[0])]
    return list(_cut(model, matrices, np.concatenate(which), np.concatenate(row), made)) if which else []


def _cut(
    model: StoredModel, matrices: list[str], which: NDArray[np.int64], row: NDArray[np.int64], made: Weight
) -> Iterator[Run]:
    if made.order is not None:
        which, row = which[made.order], row[made.order]
    cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(which)]
    for a, b in pairwise(cuts):
        name, own = matrices[int(which[a])], row[a:b]
        yield Run(name, a, b - a, None if np.array_equal(own, np.arange(model.height(name))) else own)
