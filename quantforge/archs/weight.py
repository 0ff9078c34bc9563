"""What a tensor of one side, checkpoint or GGUF, is made of on the other: rows of stored tensors, in an order.

A row is a run of numbers along the last axis, all axes before it merged; the numbers of a vector are rows of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import ShapeError

Shape: TypeAlias = tuple[int, ...]
Rows: TypeAlias = "slice | NDArray[np.int64]"
"""Row numbers; a slice has a start and a stop, and no step."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of one stored tensor."""

    source: str
    count: int
    """How many rows it gives."""
    rows: Rows | None = None
    """Which rows of the source; None: all."""
    groups: int = 0
    """If not 0: these rows are so many groups of equal size, and each is transposed."""


@dataclass(frozen=True, slots=True)
class Value:
    """An element-wise change of numbers, and back. Both are computed in f32: one rounding each."""

    forward: Callable[[F32], F32]
    back: Callable[[F32], F32]

    @property
    def inverse(self) -> Value:
        """The change back."""
        return Value(self.back, self.forward)


PLUS_ONE = Value(lambda w: w + np.float32(1), lambda w: w - np.float32(1))
"""Norms that a checkpoint has as an offset from one."""
MINUS_EXP = Value(lambda w: -np.exp(w), lambda w: np.log(-w))
"""Decay rates that a checkpoint has as log(−A)."""

_BLOCK = re.compile(r"((?:.*\.)?blk)\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor as rows of others: row i is row order[i] of the pieces one after another, `value` applied.

    groups: if not 0, what comes of that is so many groups of rows of equal size, and each is transposed.
    columns: if given, the order in which the numbers of each row are taken.
    """

    name: str
    """GGUF's name, "blk.0.attn_q.weight", also where the tensor is a checkpoint's, made of that one."""
    shape: Shape
    """[out, in], or [experts, out, in], or [n]."""
    pieces: tuple[Piece, ...] = ()
    """None where it is constant."""
    order: Rows | None = None
    value: Value | None = None
    groups: int = 0
    columns: NDArray[np.int64] | None = None
    single: bool = False
    """Is each number a row, though it is no vector? So are the experts' biases, [experts, out], of which fused ones alternate."""
    constant: F32 | None = None
    """The tensor itself where it is computed from the config (rope_freqs) instead of read."""

    @classmethod
    def of(cls, name: str, shape: Shape, source: str | None = None) -> Weight:
        """A tensor that is another one (default: of the same name) as it is."""
        return cls(name, shape, (Piece(name if source is None else source, rows_of(shape)),))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of, each once."""
        return tuple(dict.fromkeys(p.source for p in self.pieces))

    @property
    def row_width(self) -> int:
        """Numbers in a row."""
        return 1 if self.single else width(self.shape)

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return prod(self.shape) // self.row_width if self.row_width else 0

    @property
    def by_row(self) -> bool:
        """Are its rows the sources' rows, numbers unchanged?"""
        whole = self.value is None and self.columns is None and not self.groups
        return whole and not any(p.groups for p in self.pieces)

    @property
    def plain(self) -> bool:
        """Is it one stored tensor as it is, but for the shape?"""
        whole = len(self.pieces) == 1 and self.pieces[0].rows is None and not self.pieces[0].groups
        return whole and self.order is None and self.value is None and self.columns is None and not self.groups

    def span(self, source: str) -> slice | None:
        """The rows that are those of a source, in its order, before any transposing; None where they are no single run."""
        first = 0
        rows = None
        for p in self.pieces:
            if p.source == source:
                if rows is not None or p.rows is not None or p.groups:
                    return None
                rows = slice(first, first + p.count)
            first += p.count
        return rows if self.order is None else None

    @property
    def role(self) -> str:
        """GGUF stem without layer and suffix: "attn_q", "token_embd"."""
        match = _BLOCK.fullmatch(self.name)
        stem = match[3] if match else self.name
        return stem.removesuffix(".weight").removesuffix(".bias")

    @property
    def layer(self) -> int | None:
        """Layer number, or None outside the blocks."""
        match = _BLOCK.fullmatch(self.name)
        return int(match[2]) if match else None

    @property
    def experts(self) -> int:
        """How many experts' matrices are stacked in it; 0: it is no expert's."""
        return self.shape[0] if len(self.shape) == 3 and self.role.endswith(("_exps", "_chexps")) else 0


def width(shape: Shape) -> int:
    """Numbers in a row."""
    return shape[-1] if len(shape) > 1 else 1


def rows_of(shape: Shape) -> int:
    """Number of rows."""
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)


def inverted(weights: Iterable[Weight], sources: Mapping[str, Shape]) -> dict[str, Weight]:
    """The sources as made of the weights, those that any row is made of.

    Raises ShapeError for a source of which a row is in no weight, or in two.
    """
    held: dict[str, list[tuple[Weight, Piece, Rows, Rows]]] = {}  # source -> (weight, its piece, rows there, rows here)
    for w in weights:
        first = 0
        for piece in w.pieces:
            span = slice(first, first + piece.count)
            first += piece.count
            there: Rows
            here: Rows
            if w.order is None:
                there, here = span, slice(0, piece.count)
            else:
                order = numbers(w.order)
                inside = np.flatnonzero((order >= span.start) & (order < span.stop))
                there, here = inside, order[inside] - span.start
            if not w.single and len(sources[piece.source]) == 1 and width(w.shape) > 1:  # vectors stacked: number by number
                there, here = (_widened(rows, width(w.shape)) for rows in (there, here))
            held.setdefault(piece.source, []).append((w, piece, there, here))
    return {name: _inverse(name, sources[name], parts) for name, parts in held.items()}


def _inverse(name: str, shape: Shape, parts: list[tuple[Weight, Piece, Rows, Rows]]) -> Weight:
    values = {id(w.value): w.value for w, *_ in parts}
    if len(values) != 1:
        raise ShapeError(f"{name}: its rows change in different ways on the way to GGUF")
    value = next(iter(values.values()))
    back = value.inverse if value else None
    columns = parts[0][0].columns
    if any(w.columns is not columns for w, *_ in parts):
        raise ShapeError(f"{name}: its rows have columns in different orders in GGUF")
    columns = None if columns is None else np.argsort(columns)
    label = parts[0][0].name
    crosswise = [piece.groups for w, piece, _, _ in parts if piece.groups and w.order is not None]
    if crosswise:  # columns of it are rows there
        pieces = tuple(_piece(w.name, w.row_count, there) for w, _, there, _ in parts)
        order = _order([here for *_, here in parts], name, parts[0][1].count)
        return Weight(label, shape, pieces, order, back, crosswise[0])
    given_by: list[Piece] = []
    targets: list[Rows] = []
    for w, piece, there, here in parts:
        if piece.groups:
            if not isinstance(there, slice):
                raise AssertionError(name)
            given = piece.groups * width(w.shape)  # its columns there are rows here
            given_by.append(replace(_piece(w.name, w.row_count, there), count=given, groups=piece.groups))
            targets.append(slice(0, given) if piece.rows is None else piece.rows)
        else:
            given_by.append(_piece(w.name, w.row_count if w.single else prod(w.shape) // width(shape), there))
            targets.append(here if piece.rows is None else numbers(piece.rows)[here])
    single = parts[0][0].single
    count = prod(shape) if single else rows_of(shape)
    single = single and len(shape) > 1
    return Weight(label, shape, tuple(given_by), _order(targets, name, count), back, columns=columns, single=single)


def _widened(rows: Rows, wide: int) -> Rows:
    if not isinstance(rows, slice):
        return (rows[:, None] * wide + np.arange(wide)).reshape(-1)
    return slice(rows.start * wide, rows.stop * wide)


def _piece(source: str, all_rows: int, rows: Rows) -> Piece:
    if isinstance(rows, slice):
        count = rows.stop - rows.start
        return Piece(source, count, None if count == all_rows else rows)
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return _piece(source, all_rows, slice(int(rows[0]), int(rows[0]) + len(rows)))
    return Piece(source, len(rows), rows)


def _order(targets: list[Rows], name: str, count: int) -> Rows | None:
    """Where each of `count` rows is among the pieces one after another, from where each piece's rows belong."""
    if len(targets) == 1 and isinstance(targets[0], slice) and (targets[0].start, targets[0].stop) == (0, count):
        return None
    target = np.concatenate([numbers(t) for t in targets])
    order = np.full(count, -1, np.int64)
    order[target] = np.arange(len(target))
    if len(target) != count or (order < 0).any():
        missing = int(np.flatnonzero(order < 0)[0]) if (order < 0).any() else 0
        raise ShapeError(f"{name}: row {missing} has no place in GGUF, or two")
    return None if np.array_equal(order, np.arange(count)) else order


def numbers(rows: Rows) -> NDArray[np.int64]:
    """Row numbers as an array."""
    return np.arange(rows.start, rows.stop, dtype=np.int64) if isinstance(rows, slice) else rows


# ---- made of what others are made of


def gathered(
    name: str, shape: Shape, sources: Mapping[str, int], order: NDArray[np.int64], value: Value | None = None, groups: int = 0
) -> Weight:
    """A tensor by the numbers of its rows, those of all sources counted one after another; sources: name -> number of rows."""
    names, counts = list(sources), np.fromiter(sources.values(), np.int64, len(sources))
    ends = counts.cumsum()
    which = np.searchsorted(ends, order, "right")
    cuts = np.flatnonzero((np.diff(order) != 1) | (np.diff(which) != 0)) + 1
    starts, stops = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(order)]])
    used = np.unique(which)
    pieces: list[Piece] = []
    if len(starts) <= 4 * max(4, len(used), shape[0] if len(shape) > 2 else 0):  # a few runs of rows
        for a, b in zip(starts, stops, strict=True):
            k = int(which[a])
            first = int(order[a] - (ends[k] - counts[k]))
            pieces.append(_piece(names[k], int(counts[k]), slice(first, first + int(b - a))))
        return Weight(name, shape, tuple(pieces), None, value, groups)
    begins = np.zeros(len(names), np.int64)
    begins[used] = np.concatenate([[0], counts[used].cumsum()[:-1]])
    pieces = [Piece(names[k], int(counts[k])) for k in used]
    return Weight(name, shape, tuple(pieces), begins[which] + order - (ends - counts)[which], value, groups)


def composed(outer: Weight, inner: Mapping[str, Weight], stored: Mapping[str, Shape]) -> Weight | None:
    """A weight whose sources are themselves made of others, as made of those; None where that is no matter of rows.

    inner: by the names of outer's sources; stored: shapes of what those are made of.
    """
    parts = [inner[s] for s in outer.sources]
    if outer.plain and width(outer.shape) == width(parts[0].shape):
        return replace(parts[0], shape=outer.shape)
    crosswise = any(p.groups for w in (outer, *parts) for p in w.pieces) or any(w.groups for w in parts)
    values = {id(w.value): w.value for w in parts}
    if crosswise or outer.value is not None or len(values) != 1 or any(w.constant is not None for w in parts):
        return None
    wide = width(parts[0].shape)
    sizes = {s: prod(stored[s]) // wide for w in parts for s in w.sources}
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    flat = {}
    for s, w in zip(outer.sources, parts, strict=True):
        rows = np.concatenate([begins[p.source] + numbers(slice(0, p.count) if p.rows is None else p.rows) for p in w.pieces])
        flat[s] = rows if w.order is None else rows[w.order]
    rows = np.concatenate([flat[p.source] if p.rows is None else flat[p.source][p.rows] for p in outer.pieces])
    rows = rows if outer.order is None else rows[outer.order]
    return gathered(parts[0].name, outer.shape, sizes, rows, parts[0].value, outer.groups)
