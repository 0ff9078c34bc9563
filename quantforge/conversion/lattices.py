"""Is a tensor of a source on a lattice already, as quantization-aware training leaves it, and which type keeps it?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import codecs
from ..archs.weight import Weight, rows_of
from ..arrays import BF16, F32
from ..codecs import Codec
from ..codecs.base import AffineCodec, GgmlCodec
from ..codecs.lattice import BLOCK, levels, on_lattice, possible
from ..codecs.plain import PlainCodec
from ..errors import RangeError
from ..formats import Source
from ..formats.rows import by_rows, codec_of, read_rows
from ..formats.rows import decoded as numbers

_FIRST, _ROWS = 2, 12
"""Rows that are looked at first, and where they seem to be on a lattice."""
_SPAN = 256
"""Columns of a row that are looked at: the most that share a step in any type."""
_KEEPERS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


@dataclass(frozen=True, slots=True)
class Lattice:
    """What a tensor that is to be rounded to a ggml type lies on."""

    bits: int
    """Its levels are at most 2 to that."""
    kept: Codec | None
    """The type, storing the lattice as it is; None: it cannot."""
    keeper: str | None
    """Where it cannot: a type that can, if there is one."""


def look(source: Source, weight: Weight, codec: Codec) -> Lattice | None:
    """The lattice of a tensor of floats that is rounded to `codec`; None: it is on none. Reads a few rows."""
    stored = codec_of(source, weight)
    floats = isinstance(stored, PlainCodec) and stored.name in ("F32", "F16", "BF16", "F64")
    rounded = isinstance(codec, GgmlCodec) and weight.constant is None and len(weight.shape) > 1
    if not (floats and rounded and by_rows(source, weight)):
        return None
    if not possible(_blocks(_rows(source, weight, _FIRST), BLOCK)):
        return None
    rows = _rows(source, weight, _ROWS)
    n = levels(_blocks(rows, BLOCK))
    if not n:
        return None

    def keeping(codec: Codec) -> Codec | None:
        if weight.shape[-1] % codec.block_size:
            return None
        blocks = _blocks(rows, codec.block_size)
        if isinstance(codec, AffineCodec):
            return on_lattice(codec) if on_lattice(codec).keeps(blocks) else None
        try:
            decoded = codecs.quantize(blocks, codec).decode()
        except RangeError:
            return None
        return codec if (decoded.astype(BF16) == blocks.astype(BF16)).mean() > 0.9 else None

    kept = keeping(codec)
    keeper = None if kept else next((c for c in _KEEPERS if keeping(codecs.get(c))), None)
    return Lattice((n - 1).bit_length(), kept, keeper)


def _rows(source: Source, weight: Weight, n: int) -> F32:
    """The first columns of about n rows, evenly over the tensor: f32[n, columns]."""
    rows = rows_of(weight.shape)
    chosen = sorted({int((i + 0.5) * rows / n) for i in range(n)})
    return np.concatenate([numbers(read_rows(source, weight, r, r + 1)).reshape(1, -1)[:, :_SPAN] for r in chosen])


def _blocks(rows: F32, size: int) -> F32:
    """f32[n, size] of f32[rows, columns]."""
    return np.ascontiguousarray(rows[:, : rows.shape[1] // size * size]).reshape(-1, size)
