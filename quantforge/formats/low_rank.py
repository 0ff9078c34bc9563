"""Changes of low rank, added to a stored matrix while its rows are read: what an adapter (LoRA, DoRA) makes of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..archs.weight import Rows, Weight, numbers, rows_of, width
from ..arrays import F32, Array, Parts, TensorInfo
from ..codecs import Codec, Encoded
from ..errors import UnsupportedError

_AT_ONCE = 1 << 15
"""Numbers of a product that are summed up together: they stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to a matrix [rows, in]: row i gets scale[k] · b[i] · a[k], where k = which[i]; −1: nothing.

    magnitude: what the length of each row becomes after that (DoRA): f32[rows], NaN for a row that keeps its own.
    lengths: what the length of each column becomes after that: f32[in].
    """

    a: F32
    """[k, rank, in]"""
    b: Array
    """[rows, rank], of any float dtype."""
    which: NDArray[np.int64]
    scale: F32
    magnitude: F32 | None = None
    lengths: F32 | None = None

    @classmethod
    def none(cls, rows: int, wide: int) -> Change:
        """Nothing is added to any row."""
        empty = np.zeros((rows, 0), np.float32)
        return cls(np.zeros((0, 0, wide), np.float32), empty, np.full(rows, -1, np.int64), np.zeros(0, np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, in]."""
        return len(self.b), self.a.shape[-1]

    def rows(self, at: Rows) -> Change:
        """Some rows, in any order. Raises UnsupportedError where all are needed for the lengths of columns."""
        if self.lengths is not None and not np.array_equal(np.sort(numbers(at)), np.arange(len(self.b))):
            raise UnsupportedError("DoRA's magnitudes are those of columns of which only a part is here")
        magnitude = None if self.magnitude is None else self.magnitude[at]
        return replace(self, b=self.b[at], which=self.which[at], magnitude=magnitude)

    @staticmethod
    def joined(parts: Sequence[Change]) -> Change:
        """Rows one after another; ranks are filled up with zeros."""
        if len(parts) == 1:
            return parts[0]
        if any(p.lengths is not None for p in parts):
            raise UnsupportedError("DoRA's magnitudes are those of columns that are joined with others here")
        rank = max(p.b.shape[1] for p in parts)
        firsts = np.cumsum([0, *(len(p.a) for p in parts)])
        marked = any(p.magnitude is not None for p in parts)
        return Change(
            np.concatenate([np.pad(p.a, ((0, 0), (0, rank - p.a.shape[1]), (0, 0))) for p in parts]),
            np.concatenate([np.pad(p.b.astype(np.float32), ((0, 0), (0, rank - p.b.shape[1]))) for p in parts]),
            np.concatenate([np.where(p.which < 0, -1, p.which + first) for p, first in zip(parts, firsts, strict=False)]),
            np.concatenate([p.scale for p in parts]),
            np.concatenate([_or_nan(p.magnitude, len(p.b)) for p in parts]) if marked else None,
        )

    def transposed(self, groups: int) -> Change:
        """Each of so many groups of rows transposed. Raises UnsupportedError where rows of a group change in different ways."""
        per, wide = len(self.b) // groups, self.a.shape[-1]
        which = self.which.reshape(groups, per)
        if (which != which[:, :1]).any():
            raise UnsupportedError("what is transposed here changes in several ways")
        if groups > 1 and (self.magnitude is not None or self.lengths is not None):
            raise UnsupportedError("DoRA of several matrices in one")
        first, rank = which[:, 0], self.b.shape[1]
        a = np.ascontiguousarray(self.b.astype(np.float32).reshape(groups, per, rank).swapaxes(1, 2))
        b = np.zeros((groups, wide, rank), np.float32)
        scale = np.ones(groups, np.float32)
        for g, k in enumerate(first):
            if k >= 0:
                b[g], scale[g] = self.a[k].T, self.scale[k]
        now = np.where(first < 0, -1, np.arange(groups)).repeat(wide)
        return Change(a, b.reshape(groups * wide, rank), now, scale, self.lengths, self.magnitude)

    def through(self, columns: NDArray[np.int64] | None) -> Change:
        """The numbers of each row in another order."""
        if columns is None:
            return self
        return replace(self, a=self.a[:, :, columns], lengths=None if self.lengths is None else self.lengths[columns])

    def add(self, w: F32, at: slice, factors: F32 | None) -> None:
        """Change rows `at`, which w: f32[n, in] holds. factors: of columns, where `lengths` asks for them.

        Sums go up the ranks in order, each product rounded: the same bits on every machine.
        """
        step = max(1, _AT_ONCE // max(1, w.shape[1]))
        for first in range(at.start, at.stop, step):
            stop = min(first + step, at.stop)
            some = w[first - at.start : stop - at.start]
            self._add_some(some, first, stop)
        if factors is not None:
            w *= factors

    def _add_some(self, w: F32, first: int, stop: int) -> None:
        which = self.which[first:stop]
        b = self.b[first:stop].astype(np.float32)
        for k in np.unique(which):
            if k < 0:
                continue
            here = slice(None) if (which == k).all() else np.flatnonzero(which == k)
            mine = b[here]
            total, product = np.zeros((len(mine), w.shape[1]), np.float32), np.empty((len(mine), w.shape[1]), np.float32)
            for column, row in zip(mine.T, self.a[k], strict=True):
                total += np.multiply(column[:, None], row, out=product)
            total *= self.scale[k]
            w[here] += total
        if self.magnitude is not None:
            lengths = np.sqrt(np.einsum("ij,ij->i", w, w, dtype=np.float64))
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = (self.magnitude[first:stop] / lengths).astype(np.float32)
            w *= np.where(np.isnan(self.magnitude[first:stop]), np.float32(1), factor)[:, None]


def _or_nan(values: F32 | None, n: int) -> F32:
    return np.full(n, np.nan, np.float32) if values is None else values


def changed(weight: Weight, changes: dict[str, Change], shapes: dict[str, tuple[int, ...]]) -> Change | None:
    """What becomes of a weight, given what becomes of tensors that it is made of; None: nothing.

    Raises UnsupportedError, naming it, where that is no change of low rank.
    """
    if not any(s in changes for s in weight.sources):
        return None
    try:
        if weight.value is not None or weight.single or len(weight.shape) == 1:
            raise UnsupportedError("its numbers are other ones there")
        parts = []
        for p in weight.pieces:
            shape = shapes[p.source]
            part = changes.get(p.source) or Change.none(rows_of(shape), width(shape))
            part = part if p.rows is None else part.rows(p.rows)
            parts.append(part.transposed(p.groups) if p.groups else part)
        whole = Change.joined(parts)
        whole = whole if weight.order is None else whole.rows(weight.order)
        whole = whole.transposed(weight.groups) if weight.groups else whole
        return whole.through(weight.columns)
    except UnsupportedError as e:
        raise UnsupportedError(f"{weight.name}: its change cannot be told of {', '.join(weight.sources[:3])}: {e}") from None


class Merged(Codec):
    """A stored matrix with changes on top: rows can be had and decoded like any codec's, but nothing is written so.

    Parts: those of what is below as `base.NAME`, and `row`, the number of each row.
    """

    encodes = False
    virtual = True

    def __init__(
        self, base: Codec, change: Change | None = None, factors: F32 | None = None, tokens: tuple[Array, F32] | None = None
    ) -> None:
        """factors: of the columns, as `change.lengths` asks for; tokens: rows that are others, by number, and what they are."""
        self.base, self.change, self.factors, self.tokens = base, change, factors, tokens
        self.name = f"{base.name} + adapter"
        self.block_size, self.short_blocks = base.block_size, base.short_blocks
        self.row_local = base.row_local
        self.shared = frozenset(f"base.{k}" for k in base.shared)

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """See `Codec.layout`."""
        below = {f"base.{k}": v for k, v in self.base.layout(shape).items()}
        return {**below, "row": TensorInfo(np.dtype(np.int64), (*shape[:-1], 1))}

    def over(self, e: Encoded) -> Encoded:
        """The changed tensor."""
        row = np.arange(rows_of(e.shape), dtype=np.int64).reshape(*e.shape[:-1], 1)
        return Encoded(self, e.shape, {**{f"base.{k}": p for k, p in e.parts.items()}, "row": row})

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Refused: it is no way to store a tensor."""
        raise UnsupportedError(f"{self.name}: adapters are merged while a model is read, and not written")

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """The numbers, f32."""
        below = {k.removeprefix("base."): p for k, p in parts.items() if k != "row"}
        w = self.base.decode(below, shape, threads=threads).reshape(-1, shape[-1])
        at = parts["row"].reshape(-1)
        if self.tokens is not None:
            numbers_, rows = self.tokens
            where = np.searchsorted(numbers_, at).clip(max=len(numbers_) - 1)
            here = numbers_[where] == at
            w[here] = rows[where[here]]
        if self.change is not None and len(at):
            self.change_rows(w, at)
        return w.reshape(shape)

    def change_rows(self, w: F32, at: NDArray[np.int64]) -> None:
        """Add the change of rows `at` to w."""
        assert self.change is not None
        if at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
            self.change.add(w, slice(int(at[0]), int(at[-1]) + 1), self.factors)
        else:
            some = replace(self.change, lengths=None).rows(at)
            some.add(w, slice(0, len(at)), self.factors)

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """Those of what is below."""
        return self.base.scales({k.removeprefix("base."): p for k, p in parts.items() if k != "row"}, shape)
