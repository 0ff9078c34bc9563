"""What rows of a planned tensor become: from the source's bytes to the output's, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from .. import device
from ..archs.base import IDENTITY, Weight
from ..arrays import F32, Parts
from ..codecs import Encoded, repack, repacks
from ..codecs.base import GgmlCodec
from ..codecs.plain import PlainCodec
from ..errors import NonFiniteError
from ..formats import Source
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
        return None if self.before is None else _decoded(self.before)


class Tiles:
    """The tensors of a plan, to be made some rows at a time, by any thread in any order."""

    def __init__(self, job: Plan, encoder: device.Encoder | None) -> None:
        """encoder: what encodes on a device; None: the CPU does."""
        self.job, self.encoder = job, encoder
        self._magnitudes: dict[str, float] = {}

    def cut(self, t: PlannedTensor) -> Iterator[tuple[int, int]]:
        """(first row, last row) of every tile of a tensor, leading axes merged."""
        rows = prod(t.shape[:-1])
        stored = [self.job.source.weights[s].codec for s in t.weight.sources]
        if not (t.codec.row_local and t.target.row_local) or not all(c.sliceable for c in stored):
            yield 0, rows
            return
        step = max(1, (device.TILE if self._goes_up(t) else TILE) // max(1, t.shape[-1]))
        # a tile never spans two sources or two experts
        q = self.job.importance.get(t.name)
        experts = len(q) if q is not None and q.ndim > 1 and rows % len(q) == 0 else 1
        within = max(1, rows // max(1, len(t.weight.sources), experts))
        for b in range(0, rows, within):
            for a in range(b, b + within, step):
                yield a, min(a + step, b + within)

    def make(self, t: PlannedTensor, a: int, b: int) -> Tile:
        """Rows a:b of a tensor. Raises NonFiniteError naming the source's tensor and index."""
        q = self._importance(t, a, b)
        return Tile(*self._encode(t, a, b, q), q)

    def _encode(self, t: PlannedTensor, a: int, b: int, q: F32 | None) -> tuple[Parts, Encoded | F32 | None]:
        """Stored parts of rows a:b, and what they were made of (None where bytes were copied)."""
        source, names = self.job.source, t.weight.sources
        same = len(names) == 1 and source.weights[names[0]].codec is t.codec
        same = same and t.weight.transform is IDENTITY and t.weight.expert is None
        if same and b - a == prod(t.shape[:-1]) and not isinstance(t.codec, PlainCodec):
            return source.read(names[0]).parts, None
        stored = _stored_rows(source, t.weight, a, b)
        if isinstance(stored, Encoded):
            if stored.codec is t.codec and not isinstance(t.codec, PlainCodec) and t.weight.transform.value is None:
                return stored.parts, None
            if t.via is None and t.weight.transform.value is None and repacks(stored.codec, t.codec, stored.shape):
                return repack(stored, t.codec).parts, stored
        if self._goes_up(t) and self.encoder is not None and isinstance(t.codec, GgmlCodec):
            parts = self.encoder.encode(t.codec, stored, q)
            if parts is not None:
                return parts, stored
        w = _decoded(stored)
        if t.weight.transform.value is not None:
            w = t.weight.transform.value(w)
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
            where, index = _origin(t.weight, row, column)
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
            rows = _decoded(_stored_rows(self.job.source, w, 0, prod(w.shape[:-1])))
            self._magnitudes[name] = float(np.abs(rows).max())
        return self._magnitudes[name]

    def _goes_up(self, t: PlannedTensor) -> bool:
        """True if the device encodes that tensor."""
        up = t.codec.row_local and t.via is None and len(t.shape) > 1 and t.weight.transform.value is None
        return up and self.encoder is not None and device.has_kernel(t.codec, "encode")


def original(source: Source, t: PlannedTensor, a: int, b: int) -> F32:
    """Rows a:b of a tensor as another source has it, in the output's order."""
    w = _decoded(_stored_rows(source, t.weight, a, b))
    return w if t.weight.transform.value is None else t.weight.transform.value(w)


def _stored_rows(source: Source, weight: Weight, a: int, b: int) -> Encoded | F32:
    """Rows a:b of a weight in GGUF's row order, still encoded where the codec can be cut by rows."""
    if weight.constant is not None:
        return weight.constant
    n = len(weight.sources)
    rows = prod(weight.shape[:-1])
    per = rows // n
    order = weight.transform.rows
    if b - a > per:  # the whole of a stacked tensor
        return np.stack(
            [
                _decoded(_stored_rows(source, replace(weight, sources=(s,), shape=(per, weight.shape[-1])), 0, per))
                for s in weight.sources
            ]
        )
    at, first = divmod(a, per)
    if weight.expert is not None:
        first += weight.expert * rows
        order = None if order is None else order + weight.expert * rows
    e = source.read(weight.sources[at])
    if e.codec.sliceable and len(e.shape) > 1:
        return e.flat().rows(slice(first, first + b - a) if order is None else order[first : first + b - a])
    w = e.decode()
    if w.ndim == 1:
        return w if order is None else w[order]
    return w.reshape(-1, w.shape[-1])[slice(first, first + b - a) if order is None else order[first : first + b - a]]


def _decoded(x: Encoded | F32) -> F32:
    return x.decode() if isinstance(x, Encoded) else x


def _origin(weight: Weight, row: int, column: int) -> tuple[str, tuple[int, ...]]:
    """The checkpoint's own name and index of a weight."""
    if not weight.sources:
        return weight.name, (row, column)
    order = weight.transform.rows
    if len(weight.shape) == 1:
        return weight.sources[0], (int(order[column]) if order is not None else column,)
    at, row = divmod(row, prod(weight.shape[:-1]) // len(weight.sources))
    return weight.sources[at], (int(order[row]) if order is not None else row, column)
