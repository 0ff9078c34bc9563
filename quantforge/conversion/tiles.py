"""What rows of a planned tensor become: from the source's bytes to the output's, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from .. import device
from ..arrays import F32, Parts
from ..codecs import Encoded, repack, repacks
from ..codecs.base import GgmlCodec
from ..codecs.plain import PlainCodec
from ..errors import NonFiniteError
from ..formats import Source
from ..formats.rows import by_rows, codec_of, decoded, origin, read_rows
from .plan import Plan, PlannedTensor

TILE = 1 << 18
"""Weights decoded and encoded at once by one thread: 1 MiB of f32, which stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a tensor, done."""

    parts: Parts
    """What is stored."""
    before: Encoded | F32 | None
    """What they were made of; None where bytes were copied."""
    importance: F32 | None
    """What they were rounded with: f32[in], or f32[experts, in] for the whole of a stacked tensor."""

    @property
    def weights(self) -> F32 | None:
        """The numbers before rounding; None where nothing was rounded."""
        return None if self.before is None else decoded(self.before)


class Tiles:
    """The tensors of a plan, to be made some rows at a time, by any thread in any order."""

    def __init__(self, job: Plan, encoder: device.Encoder | None) -> None:
        """encoder: what encodes on a device; None: the CPU does."""
        self.job, self.encoder = job, encoder
        self._magnitudes: dict[str, float] = {}

    def cut(self, t: PlannedTensor) -> Iterator[tuple[int, int]]:
        """(first row, last row) of every tile of a tensor, leading axes merged."""
        rows = prod(t.shape[:-1])
        if not (t.codec.row_local and t.target.row_local) or not by_rows(self.job.source, t.weight):
            yield 0, rows
            return
        step = max(1, (device.TILE if self._goes_up(t) else TILE) // max(1, t.shape[-1]))
        # a tile never spans two sources or two experts
        q = self.job.importance.get(t.name)
        experts = len(q) if q is not None and q.ndim > 1 and rows % len(q) == 0 else 1
        pieces = max(1, len(t.weight.pieces), experts)
        within = max(1, rows // pieces) if rows % pieces == 0 else rows
        for b in range(0, rows, within):
            for a in range(b, b + within, step):
                yield a, min(a + step, b + within)

    def make(self, t: PlannedTensor, a: int, b: int) -> Tile:
        """Rows a:b of a tensor. Raises NonFiniteError naming the source's tensor and index."""
        q = self._importance(t, a, b)
        return Tile(*self._encode(t, a, b, q), q)

    def _encode(self, t: PlannedTensor, a: int, b: int, q: F32 | None) -> tuple[Parts, Encoded | F32 | None]:
        """Stored parts of rows a:b, and what they were made of (None where bytes were copied)."""
        source = self.job.source
        same = t.weight.plain and codec_of(source, t.weight) is t.codec
        if same and b - a == prod(t.shape[:-1]) and not isinstance(t.codec, PlainCodec):
            return source.read(t.weight.sources[0]).parts, None
        stored = read_rows(source, t.weight, a, b)
        if isinstance(stored, Encoded):
            if stored.codec is t.codec and not isinstance(t.codec, PlainCodec):
                return stored.parts, None
            if t.via is None and repacks(stored.codec, t.codec, stored.shape):
                return repack(stored, t.codec).parts, stored
        if self._goes_up(t) and self.encoder is not None and isinstance(t.codec, GgmlCodec):
            parts = self.encoder.encode(t.codec, stored, q)
            if parts is not None:
                return parts, stored
        w = decoded(stored)
        if not t.codec.row_local or len(t.shape) == 1:
            w = w.reshape(t.shape)
        try:
            codec = t.sharing(self._largest)
            return t.stored(Encoded(codec, w.shape, codec.encode(w, q))), w
        except NonFiniteError as e:
            if not e.index:
                raise NonFiniteError(f"{t.weight.name}: {e}", ()) from None
            row, column = (0, e.index[0]) if len(e.index) == 1 else (a + e.index[-2], e.index[-1])
            value = w.reshape(-1, w.shape[-1])[e.index[-2] if len(e.index) > 1 else 0, column]
            where, index = origin(t.weight, row, column)
            raise NonFiniteError(
                f"{where}: weight {list(index)} is {value}; the checkpoint is damaged or overflowed", index
            ) from None

    def _importance(self, t: PlannedTensor, a: int, b: int) -> F32 | None:
        """Importance of a tile: f32[in], or f32[experts, in] for a whole stacked tensor."""
        q = self.job.importance.get(t.name)
        if q is None or q.ndim == 1:
            return q
        per_expert = prod(t.weight.shape[:-1]) // len(q)
        whole = b - a > per_expert
        return q if whole else np.asarray(q[a // per_expert])

    def _largest(self, name: str) -> float:
        """The largest magnitude in a tensor of the output."""
        if name not in self._magnitudes:
            w = next(t.weight for t in self.job.tensors if t.name == name)
            self._magnitudes[name] = float(np.abs(decoded(read_rows(self.job.source, w))).max())
        return self._magnitudes[name]

    def _goes_up(self, t: PlannedTensor) -> bool:
        """True if the device encodes that tensor."""
        up = t.codec.row_local and t.via is None and len(t.shape) > 1 and t.weight.value is None
        return up and self.encoder is not None and device.has_kernel(t.codec, "encode")


def original(source: Source, t: PlannedTensor, a: int, b: int) -> F32:
    """Rows a:b of a tensor as another source has it, in the output's order."""
    return decoded(read_rows(source, t.weight, a, b))
