"""Rows of a `Weight`, gathered from the stored tensors that it is made of; decoded only where that cannot be avoided."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .. import codecs
from ..archs.weight import Piece, Rows, Weight, numbers, rows_of, width
from ..arrays import F32
from ..codecs import Codec, Encoded
from ..codecs.plain import PlainCodec
from ..errors import FormatError
from .base import Source


def read_rows(source: Source, weight: Weight, a: int = 0, b: int | None = None) -> Encoded | F32:
    """Rows a:b (default: all) of a weight: as they are stored where no number changes and rows can be had, else decoded.

    A matrix [b − a, in], or [n] for the whole of a vector.
    """
    if weight.constant is not None:
        return weight.constant if len(weight.shape) == 1 else weight.constant.reshape(-1, weight.shape[-1])[a:b]
    if len(weight.shape) == 1:
        a, b = 0, rows_of(weight.shape)
    b = rows_of(weight.shape) if b is None else b
    if weight.single:
        n = weight.shape[-1]
        w = decoded(_in_order(source, weight, a * n, b * n)).reshape(-1, n)
        return w if weight.value is None else weight.value.forward(w)
    gathered = _across(source, weight, a, b) if weight.groups else _in_order(source, weight, a, b)
    if isinstance(gathered, Encoded) and weight.value is None and weight.columns is None:
        return gathered
    w = decoded(gathered)
    w = w if weight.columns is None else w[:, weight.columns]
    w = w if weight.value is None else weight.value.forward(w)
    return w.reshape(-1) if len(weight.shape) == 1 else w


def read_encoded(source: Source, weight: Weight) -> Encoded | None:
    """The whole of a matrix as it is stored; None where only its numbers can be had."""
    e: Encoded | F32 | None
    if weight.plain:
        e = source.read(weight.sources[0])
        e = e if e.shape == weight.shape else None
    else:
        e = read_rows(source, weight) if len(weight.shape) == 2 else None
    return e if isinstance(e, Encoded) and not e.codec.virtual else None


def decoded(x: Encoded | F32, threads: int = 1) -> F32:
    """The numbers."""
    return x.decode(threads=threads) if isinstance(x, Encoded) else x


def codec_of(source: Source, weight: Weight) -> Codec:
    """What the stored tensors of a weight are in: the first one's; F32 where there is none."""
    return source.weights[weight.sources[0]].codec if weight.sources else codecs.get("F32")


def check_numbers(source: Source, weights: Iterable[Weight]) -> None:
    """Raise FormatError where a weight is stored as integers and nothing says what these stand for."""
    for w in weights:
        for name in w.sources:
            codec = source.weights[name].codec
            if isinstance(codec, PlainCodec) and codec.dtype.kind in "iub":
                raise FormatError(
                    source.path,
                    f"tensor {name} holds integers ({codec.name}), and no quantization_config says what numbers they stand for: "
                    "fetch the config.json that belongs to this checkpoint",
                )


def by_rows(source: Source, weight: Weight) -> bool:
    """Can any rows of it be had without reading the rest?"""
    if weight.groups or any(p.groups for p in weight.pieces):
        return all(isinstance(source.weights[s].codec, PlainCodec) for s in weight.sources)
    return all(source.weights[s].codec.sliceable for s in weight.sources)


def origin(weight: Weight, row: int, column: int) -> tuple[str, tuple[int, ...]]:
    """The stored tensor and the index there (all axes but the last merged) of a number of the weight."""
    if not weight.pieces:
        return weight.name, (row, column)
    if len(weight.shape) == 1:
        row, column = column, 0
    if weight.single:
        row, column = row * weight.shape[-1] + column, 0
    if weight.groups:
        return weight.sources[0], (row, column)
    column = column if weight.columns is None else int(weight.columns[column])
    at = row if weight.order is None else int(numbers(weight.order)[row])
    for piece in weight.pieces:
        if at < piece.count:
            if piece.groups:
                per = piece.count // piece.groups
                row, column = at // per * width(weight.shape) + column, at % per
            else:
                row = at
            row = row if piece.rows is None else int(numbers(piece.rows)[row])
            return piece.source, (row,) if weight.row_width == 1 else (row, column)
        at -= piece.count
    raise AssertionError(weight.name)


def _across(source: Source, weight: Weight, a: int, b: int) -> F32:
    """Rows a:b where the rows in order are groups to be transposed."""
    inner = sum(p.count for p in weight.pieces) if weight.order is None else len(numbers(weight.order))
    high, per = inner // weight.groups, rows_of(weight.shape) // weight.groups
    wide = Weight(weight.name, (inner, per), weight.pieces, weight.order)
    pieces = []
    while a < b:
        group = a // per
        stop = min(b, (group + 1) * per)
        rows = decoded(_in_order(source, wide, group * high, (group + 1) * high))
        pieces.append(rows.T[a - group * per : stop - group * per])
        a = stop
    return np.ascontiguousarray(np.concatenate(pieces) if len(pieces) > 1 else pieces[0])


def _in_order(source: Source, weight: Weight, a: int, b: int) -> Encoded | F32:
    wanted: Rows = slice(a, b) if weight.order is None else numbers(weight.order)[a:b]
    wide = weight.row_width
    if len(weight.pieces) == 1:
        return _of_piece(source, weight.pieces[0], wanted, wide)
    runs: list[Encoded | F32] = []
    places: list[NDArray[np.int64]] = []
    first = 0
    for piece in weight.pieces:
        last = first + piece.count
        if isinstance(wanted, slice):
            if wanted.start < last and wanted.stop > first:
                runs.append(_of_piece(source, piece, slice(max(a, first) - first, min(b, last) - first), wide))
        else:
            inside = np.flatnonzero((wanted >= first) & (wanted < last))
            if len(inside):
                runs.append(_of_piece(source, piece, wanted[inside] - first, wide))
                places.append(inside)
        first = last
    if len(runs) == 1:
        return runs[0]  # what is wanted is all in one: in its order already
    joined = _joined(runs)
    if not places:
        return joined
    back = np.argsort(np.concatenate(places))
    return joined.rows(back) if isinstance(joined, Encoded) else joined[back]


def _joined(runs: list[Encoded | F32]) -> Encoded | F32:
    encoded = [e for e in runs if isinstance(e, Encoded)]
    codec = encoded[0].codec if encoded else None
    if codec is not None and codec.row_local and len(encoded) == len(runs) and all(e.codec is codec for e in encoded):
        parts = {k: np.concatenate([e.parts[k] for e in encoded]) for k in encoded[0].parts}
        return Encoded(codec, (sum(e.shape[0] for e in encoded), encoded[0].shape[-1]), parts)
    return np.concatenate([decoded(x) for x in runs])


def _of_piece(source: Source, piece: Piece, wanted: Rows, wide: int) -> Encoded | F32:
    """Rows of a piece; wanted: of those that it gives."""
    e = source.read(piece.source)
    if piece.groups:
        return _transposed(e, piece, numbers(wanted))
    rows = wanted if piece.rows is None else _composed(piece.rows, wanted)
    if e.codec.sliceable and len(e.shape) > 1 and e.shape[-1] == wide:
        return e.flat().rows(rows)
    return e.decode().reshape(-1, wide)[rows]


def _composed(outer: Rows, inner: Rows) -> Rows:
    if isinstance(outer, slice):
        if isinstance(inner, slice):
            return slice(outer.start + inner.start, outer.start + inner.stop)
        return np.add(inner, outer.start)
    chosen: NDArray[np.int64] = outer[inner]
    return chosen


def _transposed(e: Encoded, piece: Piece, wanted: NDArray[np.int64]) -> F32:
    plain = isinstance(e.codec, PlainCodec)
    w = (e.parts["data"] if plain else e.decode()).reshape(-1, e.shape[-1])
    w = w if piece.rows is None else w[piece.rows]
    columns = w.shape[1]
    stacked = w.reshape(piece.groups, -1, columns).swapaxes(1, 2)  # a view: only what is wanted is copied
    some = np.ascontiguousarray(stacked[wanted // columns, wanted % columns])
    return e.codec.decode({"data": some}, some.shape) if plain else some
