"""A tensor's numbers against those that it was made of: are they what its type gives on such data?

Exact where its bytes are those of plain rounding. Else the codes were chosen in another way (an importance matrix, GPTQ,
AWQ, another program), and what is known is how far plain rounding to the same type is off, patch by patch: some 32 to 256
numbers of a row that share a scale. A tensor is right where

- no patch is more than `ERROR` times as far off as plain rounding, there or in the rows around it,
- no patch points elsewhere: its cosine with the original is at least `COSINE` times that of plain rounding,
- no row, and not the whole, is larger or smaller than chance and shrinking explain: the factor by which it follows the
  original is at most e² below plain rounding's, or e² / 2 above, and ROW e / √n (the whole: WHOLE e / √n) for chance, e
  being the relative error of a row of n numbers.

The first finds what is wrong in types of 3 bits and more; the second swapped, permuted and missing rows in types of one
bit, whose error is as large as a wrong row's; the third wrong scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import F32, Array
from ..codecs.plain import PlainCodec
from ..conversion.plan import PlannedTensor
from ..conversion.tiles import Tiles
from ..errors import QuantForgeError
from ..formats import Source
from ..formats.rows import decoded, read_rows
from .report import TensorCheck

ERROR, COSINE, ROW, WHOLE = 6.0, 0.5, 6.0, 2.0
_TWICE = {"F32": 2.0**-20, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Relative error of floats that were rounded twice: scaled in between, or changed and changed back."""
_TRADED = 6.25
"""How many times plain rounding's squared error a tensor of GPTQ's has."""
_SUMMED = 1e-5
"""Relative error that sums in f32 may have."""
_SMALL = 1e-4
"""Part of the mean square below which the direction of a patch says nothing."""


@dataclass(slots=True)
class Sums:
    """What tiles of one tensor come to."""

    equal: bool = True
    error: float = 0.0
    rounding: float = 0.0
    norm: float = 0.0
    product: float = 0.0
    rounded_product: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        """Those of other tiles."""
        self.equal &= other.equal
        self.error += other.error
        self.rounding += other.rounding
        self.norm += other.norm
        self.product += other.product
        self.rounded_product += other.rounded_product
        self.faults += other.faults


class Comparer:
    """Tensors of `out` against what they were made of; tiles may be compared by any thread in any order."""

    def __init__(self, tiles: Tiles, out: Source) -> None:
        self.tiles, self.out, self.model = tiles, out, tiles.job.source

    def cut(self, t: PlannedTensor) -> list[tuple[int, int]]:
        """(first row, last row) of its tiles."""
        rows = int(np.prod(t.shape[:-1], dtype=np.int64))
        return list(self.tiles.cut(t)) if t.codec.encodes else [(0, rows)]

    def tile(self, t: PlannedTensor, a: int, b: int, columns: F32 | None = None, rows: F32 | None = None) -> Sums:
        """Rows a:b. columns, rows: factors of the original's, where it was scaled before it was rounded."""
        stored = self.out.read(t.name)
        whole = b - a == int(np.prod(t.shape[:-1], dtype=np.int64))
        if not whole:
            stored = stored.flat().rows(slice(a, b))
        scaled = columns is not None or rows is not None
        rounded = None
        if not scaled and t.codec.encodes:
            rounded = self.tiles.make(t, a, b).parts
            if rounded.keys() == stored.parts.keys() and all(_same(rounded[k], p) for k, p in stored.parts.items()):
                return self._exact(t, a, b, stored.decode())
        w = decoded(read_rows(self.model, t.weight, a, b)).reshape(-1, t.shape[-1])
        w = w if columns is None else w * columns
        w = w if rows is None else w * rows[a:b, None]
        shape = t.shape if whole else w.shape
        if rounded is None and t.codec.encodes:
            rounded = t.codec.encode(w.reshape(shape), self.tiles.job.importance.get(t.name))
        d = stored.decode().reshape(w.shape)
        r = d if rounded is None else t.codec.decode(rounded, shape).reshape(w.shape)
        return self._compared(t, a, w, d, r, scaled)

    def _exact(self, t: PlannedTensor, a: int, b: int, d: F32) -> Sums:
        w, d = decoded(read_rows(self.model, t.weight, a, b)).reshape(-1), d.reshape(-1)
        off = d - w
        error, product = float(np.vdot(off, off)), float(np.vdot(d, w))
        return Sums(True, error, error, float(np.vdot(w, w)), product, product)

    @staticmethod
    def _compared(t: PlannedTensor, a: int, w: F32, d: F32, r: F32, scaled: bool) -> Sums:
        if not (fine := np.isfinite(d)).all():
            row, column = (int(i) for i in np.unravel_index(int(np.argmin(fine)), d.shape))
            return Sums(False, faults=[f"weight {[a + row, column]} is {d[row, column]}"])
        patch = t.codec.block_size if t.codec.block_size > 1 else 32
        if w.shape[1] < 32:  # rows too short to say anything one by one
            w, d, r = w.reshape(1, -1), d.reshape(1, -1), r.reshape(1, -1)
        patches = _Patches.of(w, d, r, min(256, max(32, patch)))
        kept = not scaled and t.source_codec is t.codec and t.codec.name != "F32"
        return patches.judged(a, 0.0 if kept else _TWICE.get(t.codec.name, 0.0), plain=isinstance(t.codec, PlainCodec))

    def check(self, t: PlannedTensor, sums: Sums, note: str = "") -> TensorCheck:
        """What all tiles of a tensor come to."""
        faults = list(sums.faults)
        norm = sums.norm or 1.0
        if not sums.equal and sums.norm and not faults:
            e = float(_off(sums.error / norm, sums.rounding / norm))
            off = (sums.product - sums.rounded_product) / norm
            chance = WHOLE * (e / t.shape[-1]) ** 0.5 + _SUMMED
            if off > e / 2 + chance or off < -e - chance:
                faults.append(
                    f"{sums.product / norm:.3g} times as large as the original; plain rounding {sums.rounded_product / norm:.3g}"
                )
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return TensorCheck(
            t.name,
            t.codec.name,
            tuple(t.shape),
            "differs" if faults else "ok",
            faults[0] + more if faults else note,
            sums.equal,
            (sums.error / norm) ** 0.5,
            (sums.rounding / norm) ** 0.5 if t.codec.encodes else None,
        )


def _off(error: Any, rounding: Any) -> Any:
    """Squared relative error that methods can be held to, who trade it for less error of the outputs."""
    return np.clip(error, rounding, _TRADED * rounding)


def _same(a: Array, b: Array) -> bool:
    """Bit by bit; of a scale for a whole tensor a layout may store the reciprocal, which is one rounding more."""
    if a.size == b.size == 1 and a.dtype == b.dtype == np.float32:
        return bool(np.isclose(a.item(), b.item(), rtol=2.0**-22, atol=0))
    return np.array_equal(_bytes(a), _bytes(b))


def _bytes(part: Array) -> Array:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class _Patches:
    """Sums of squares and products of each patch of rows: f32[rows, patches]."""

    ww: Array
    dd: Array
    rr: Array
    dw: Array
    rw: Array
    error: Array
    rounding: Array
    size: int
    width: int

    @classmethod
    def of(cls, w: F32, d: F32, r: F32, size: int) -> _Patches:
        """w: the original, d: what is stored, r: plainly rounded, all f32[rows, n]."""
        starts = np.arange(0, w.shape[1], size)

        def sums(x: F32, y: F32) -> Array:
            return np.asarray(np.add.reduceat(x * y, starts, axis=1))

        off, rounding = d - w, r - w
        return cls(
            sums(w, w), sums(d, d), sums(r, r), sums(d, w), sums(r, w), sums(off, off), sums(rounding, rounding), size, w.shape[1]
        )

    def judged(self, first: int, floor: float, plain: bool) -> Sums:
        """The sums, and what is wrong. first: the first row's number; floor: relative error that floats may have.

        plain: floats, whose rounding leaves nothing to choose.
        """
        ww, total = self.ww, float(self.ww.sum())
        mean = total / max(1, ww.size)
        usual = float(self.rounding.sum()) / total if total else 0.0
        bound = self.rounding + usual * (ww + 0.05 * mean) + (floor / ERROR) ** 2 * ww
        sums = Sums(False, float(self.error.sum()), float(self.rounding.sum()), total, float(self.dw.sum()), float(self.rw.sum()))

        bad = self.error > (2 * self.rounding + floor**2 * ww if plain else ERROR**2 * bound)
        if bad.any():
            row, patch = self._worst(np.where(bad, self.error / np.maximum(ww, 1e-30), -1))
            e, n = self.error[row, patch], max(float(ww[row, patch]), 1e-30)
            usual_there = (float(bound[row, patch]) / n) ** 0.5
            sums.faults.append(
                self._fault(first, row, patch, f"relative error {(e / n) ** 0.5:.3g}, plain rounding some {usual_there:.2g}", bad)
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.nan_to_num(self.dw / np.sqrt(self.dd * ww))
            rounded = np.nan_to_num(self.rw / np.sqrt(self.rr * ww))
        bad = (cosine < COSINE * rounded) & (ww > _SMALL * mean)
        if bad.any() and not sums.faults:
            row, patch = self._worst(np.where(bad, rounded - cosine, -1))
            sums.faults.append(
                self._fault(
                    first,
                    row,
                    patch,
                    f"cosine with the original {cosine[row, patch]:.2g}, of plain rounding {rounded[row, patch]:.2g}",
                    bad,
                )
            )
        norms = ww.sum(1)
        large = norms > _SMALL * norms.mean()
        with np.errstate(invalid="ignore", divide="ignore"):
            e = _off(self.error.sum(1) / norms, self.rounding.sum(1) / norms)
            gain, usual_gain = self.dw.sum(1) / norms, self.rw.sum(1) / norms
            above, chance = gain - usual_gain, ROW * np.sqrt(e / self.width) + floor + _SUMMED
            off = large & ((above > e / 2 + chance) | (above < -e - chance))
        if off.any() and not sums.faults:
            row = int(np.argmax(np.where(off, np.abs(gain - usual_gain), -1)))
            sums.faults.append(
                f"row {first + row}: {gain[row]:.3g} times as large as the original, plain rounding {usual_gain[row]:.3g}"
            )
        return sums

    @staticmethod
    def _worst(x: Array) -> tuple[int, int]:
        row, patch = np.unravel_index(int(np.argmax(x)), x.shape)
        return int(row), int(patch)

    def _fault(self, first: int, row: int, patch: int, what: str, bad: Array) -> str:
        a = patch * self.size
        n = int(bad.sum())
        more = f"; {n} such places" if n > 1 else ""
        return f"row {first + row}, columns {a} to {min(self.width, a + self.size) - 1}: {what}{more}"


def compared(comparer: Comparer, t: PlannedTensor, columns: F32 | None = None, rows: F32 | None = None) -> Iterator[Sums]:
    """All tiles of a tensor, in order; what cannot be read is a fault."""
    for a, b in comparer.cut(t):
        try:
            yield comparer.tile(t, a, b, columns, rows)
        except QuantForgeError as e:
            yield Sums(False, faults=[str(e)])
