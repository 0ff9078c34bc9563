"""Roles: the tensors of one model's GGUF file, each with what it is made of in a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from .tensors import From, Sizes, Tensor, size
from .weight import Piece, Shape, Weight, width

_MOST_EXPERTS = 1 << 14


@dataclass(frozen=True, slots=True)
class Spelling:
    """What a role is made of in a checkpoint."""

    pieces: tuple[Piece, ...]
    shapes: Mapping[str, Shape]
    order: NDArray[np.int64] | None
    columns: NDArray[np.int64] | None

    @property
    def names(self) -> Collection[str]:
        """The checkpoint's tensors."""
        return self.shapes.keys()


@dataclass(frozen=True)
class Role:
    """One tensor of a GGUF file."""

    tensor: Tensor
    name: str
    shape: Shape
    sizes: Sizes
    bid: int | None
    trunk: int
    """Number of layers before the prediction layers."""
    is_bias: bool

    @property
    def single(self) -> bool:
        """Does `Weight.single` hold: is it a vector in a checkpoint and a matrix in GGUF?"""
        one = any(len(o.dims) == 1 for o in self.tensor.origins) and self.shape[-1] > 1  # a vector that is a matrix in GGUF
        return len(self.shape) == 2 and (self.is_bias or one)

    def made_of(self, spelling: Spelling) -> Weight:
        """It, made of what one of its spellings names."""
        pieces, order, columns = spelling.pieces, spelling.order, spelling.columns
        value = None if self.is_bias else self.tensor.value
        return Weight(self.name, self.shape, pieces, order, value, columns=columns, single=self.single)

    @cached_property
    def spellings(self) -> list[Spelling]:
        """What it can be made of; the first one is written."""
        others = [(From(o) if isinstance(o, str) else o,) for o in self.tensor.also]
        return [self._spelling(origins) for origins in (self.tensor.origins, *others)]

    def _spelling(self, origins: Sequence[From]) -> Spelling:
        pieces: list[Piece] = []
        shapes: dict[str, Shape] = {}
        order: NDArray[np.int64] | None = None
        columns: NDArray[np.int64] | None = None
        for origin in origins:
            rows = None if origin.rows is None else origin.rows(self.sizes)
            groups = size(origin.groups, self.sizes) if origin.groups and not self.is_bias else 0
            for name, shape in self._named(origin):
                shapes[name] = shape
                count = len(rows) if rows is not None else prod(shape) // max(1, 1 if self.single else width(self.shape))
                if groups:
                    count = groups * shape[-1]
                pieces.append(Piece(name, count, rows, groups))
            if origin.picked is not None:
                if len(origins) > 1:
                    raise AssertionError(self.name)
                order = origin.picked(self.sizes)
            if origin.columns is not None and not self.is_bias:
                columns = origin.columns(self.sizes)
        return Spelling(tuple(pieces), shapes, order, columns)

    def _named(self, origin: From) -> Iterator[tuple[str, Shape]]:
        words = origin.dims
        if self.is_bias and words:  # of the axes, inputs go; where they are transposed, these come last but one
            words = words[:-2] + words[-1:] if origin.groups else tuple(w for w in words[:-1] if w != "1")
        dims = tuple(size(w, self.sizes) for w in words)
        stacked = "{eid}" in origin.name
        shape = dims or (self.shape[1:] if stacked else self.shape)
        if stacked and self.shape[0] > _MOST_EXPERTS:
            raise ShapeError(f"{self.name}: {self.shape[0]} experts; the limit is {_MOST_EXPERTS}")
        suffix = ".bias" if self.is_bias and origin.suffix == ".weight" else "_bias" if self.is_bias else origin.suffix
        for eid in range(self.shape[0]) if stacked else [None]:
            nextn = None if self.bid is None else self.bid - self.trunk
            yield origin.name.format(**{**self.sizes, "bid": self.bid, "eid": eid, "nextn": nextn}) + suffix, shape


def names_kind(where: str, kinds: Collection[str]) -> bool:
    """Is a layer of these kinds one of those that "a", "!a" or "a & !b" names?"""
    return all((term[1:] not in kinds) if term.startswith("!") else (term in kinds) for term in where.split(" & ") if term)
