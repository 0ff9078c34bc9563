"""Weights that lie on a lattice already: step · integer, a step for each block, rounded to bf16 or finer.

Quantization-aware training leaves such checkpoints. A type's own encoder takes its scale from the largest weight
and misses their steps; here the steps are found, and blocks stored on them come back as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, Array, Parts
from .base import AffineCodec, Params

if TYPE_CHECKING:
    import torch

BLOCK = 32
"""Weights whose step is looked for where no type says how many share one."""
REACH = 31
"""The largest integer that is looked for: bf16 cannot tell those above about 60 from their neighbours."""
_EVIDENCE = 12
"""Weights other than 0 that a block needs to prove something: fewer lie near some lattice by chance."""
_MOST = 0.5
"""Part of such blocks that has to be on a lattice before a tensor is said to be."""
_LIKELY = (8, 7, 6, 5, 4, 3, 2, 1)
_LARGEST_HALF = 65504.0

I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Range:
    """The integers that a block may have: low..high, or as many of them anywhere around 0."""

    low: int
    high: int
    shifts: bool
    """True where a zero point is stored; else the step's sign may turn the range around."""

    @property
    def reach(self) -> int:
        """The largest magnitude."""
        return min(REACH, self.high - self.low if self.shifts else max(-self.low, self.high))

    def holds(self, least: F32, most: F32) -> Bools:
        """bool[blocks]: do integers from `least` to `most` fit?"""
        if self.shifts:
            fits: Bools = np.maximum(most, 0) - np.minimum(least, 0) <= self.high - self.low
            return fits
        return self.upright(least, most) | self.upright(-most, -least)

    def upright(self, least: F32, most: F32) -> Bools:
        """bool[blocks]: do they fit without turning the range around?"""
        fits: Bools = (least >= self.low) & (most <= self.high)
        return fits


WIDEST = Range(0, REACH, True)


@dataclass(frozen=True, slots=True)
class Lattices:
    """The lattices of some blocks."""

    step: F32
    """f32[n]; 0: the block is on none."""
    least: F32
    """f32[n]: steps between this and"""
    most: F32
    """f32[n] this round to all weights in bf16."""
    integers: F32
    """f32[n, block]."""


def find(x: F32, limits: Range = WIDEST, smallest: bool = False) -> Lattices:
    """The lattices of blocks x: f32[n, block].

    smallest: look for the smallest integers first, not for the likeliest.
    """
    step, least, most = (np.zeros(len(x), np.float32) for _ in range(3))
    q = np.zeros(x.shape, np.float32)
    top = np.maximum(x.max(-1, initial=0), -x.min(-1, initial=0))
    left = np.flatnonzero((top > 0) & np.isfinite(top))
    order = range(1, limits.reach + 1)
    for k in order if smallest else (*(k for k in _LIKELY if k in order), *(k for k in order if k not in _LIKELY)):
        if not len(left):
            break
        some = x[left]
        y = some * (np.float32(k) / top[left])[:, None]
        integers = np.rint(y)
        near = _near(y, integers)
        near &= limits.holds(integers.min(-1), integers.max(-1))
        if not near.any():
            continue
        integers = integers[near]
        integers /= np.maximum(1, np.gcd.reduce(integers.astype(np.int8), axis=-1)).astype(np.float32)[:, None]
        made, hits = _steps(some[near], integers), left[near]
        step[hits], least[hits], most[hits], q[hits] = made.step, made.least, made.most, made.integers
        left = left[step[left] == 0]
    return Lattices(step, least, most, q)


def possible(x: F32) -> bool:
    """Quick, to look no further: False if most of the first of the blocks x: f32[n, block] are on no lattice."""
    x = x[np.count_nonzero(x, -1) >= _EVIDENCE][:8]
    top = np.abs(x).max(-1, initial=0)
    y = x[:, None] * (np.arange(1, REACH + 1, dtype=np.float32) / top[:, None])[:, :, None]
    return not len(x) or bool(_near(y, np.rint(y)).any(-1).mean() >= _MOST)


def levels(x: F32) -> int:
    """Levels of the lattice that most of the blocks x: f32[n, block] are on: 16 for −8..7; 0 if they are on none."""
    x = x[np.count_nonzero(x, -1) >= _EVIDENCE]
    lattice = find(x, smallest=True)
    on = lattice.step > 0
    if not len(x) or on.mean() < _MOST:
        return 0
    return int(lattice.integers[on].max() - lattice.integers[on].min()) + 1


def _near(y: F32, integers: F32) -> Bools:
    """Do weights y lie at integers, as far as bf16 can tell? Overwrites y."""
    # the largest weight, which y is in units of, is off by half of bf16's last bit, as the weight is: together 1/128
    off = np.abs(np.subtract(y, integers, out=y), out=y)
    near: Bools = np.all(off <= np.abs(integers) * np.float32(1 / 120), axis=-1)
    return near


def _steps(x: F32, q: F32) -> Lattices:
    """The steps of blocks x with integers q; 0 where no step rounds to all of x in bf16."""
    size, bits = np.abs(q), np.abs(x).view(np.uint32)
    # half of bf16's last bit, in f32's; halfway, even weights win over odd ones
    half = np.uint32(0x8000) - ((bits >> np.uint32(15)) & np.uint32(2))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 counts as nothing
        least = np.fmax.reduce((np.maximum(bits, half) - half).view(np.float32) / size, -1)
        most = np.fmin.reduce((bits + half).view(np.float32) / size, -1)
    fitted = np.einsum("ij,ij->i", x, q) / np.einsum("ij,ij->i", q, q)
    on = least <= most * np.float32(1 + 2.0**-10)  # a little more than that: some were rounded to f16 before
    return Lattices(np.where(on, np.clip(fitted, least, most), 0).astype(np.float32), least, most, q)


class LatticeCodec(AffineCodec):
    """A ggml type that stores blocks on a lattice as they are, and all others as ever.

    Same name, same layout, same decoding; the other blocks' bytes are those of `plain`.
    """

    ggml_bytes = False

    def __init__(self, plain: AffineCodec) -> None:
        super().__init__(plain.name, plain.grid, takes_importance=plain.takes_importance)
        q = plain.grid.q
        self.limits = Range(q.lo - q.zero, q.hi - q.zero, shifts=len(plain.grid.floats) > 1)

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """See `Codec.encode`; importance counts for the blocks that are on no lattice."""
        parts = super().encode(w, importance, threads=threads)
        on, codes, params = self._exact(np.ascontiguousarray(w, np.float32).reshape(-1, self.block_size))
        if on.any():
            data = parts["data"].reshape(-1, self.type_size)
            data[on] = self._written(codes[on], {k: p[on] for k, p in params.items()})
        return parts

    def search(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """See `GridCodec.search`; on a device it waits for it."""
        import torch

        params = super().search(w, importance)
        on, _, exact = self._exact(np.ascontiguousarray(w.detach().float().cpu().numpy()).reshape(-1, self.block_size))
        for k, p in params.items():
            fitted = p.reshape(len(on), -1)
            own = torch.from_numpy(exact[k]).to(p.device, p.dtype).expand_as(fitted)
            params[k] = own.where(torch.from_numpy(on).to(p.device)[:, None], fitted).reshape(p.shape)
        return params

    def keeps(self, x: F32) -> bool:
        """True if it stores most of the blocks x: f32[n, block_size] that can prove something as they are."""
        x = x[np.count_nonzero(x, -1) >= _EVIDENCE]
        return bool(len(x)) and bool(self._exact(x)[0].mean() >= _MOST)

    def _exact(self, x: F32) -> tuple[Bools, I32, dict[str, Array]]:
        """Which blocks are on a lattice, their codes i32[n, block], and their stored params by name: [n, 1] each."""
        lattice = find(x, self.limits)
        q, grid = lattice.integers, self.grid
        least, most = q.min(-1), q.max(-1)
        d, on = _as_half(lattice)
        if self.limits.shifts:
            zero = _zero_points(least, most, self.limits.high)
        else:
            zero = np.full(len(x), grid.q.zero, np.int32)
            turned = ~self.limits.upright(least, most)
            d[turned], q[turned] = -d[turned], -q[turned]
        codes = q.astype(np.int32) + zero[:, None]
        if grid.ints:  # sub-blocks share one step
            params: dict[str, Array] = {"d": d, "dmin": d, "m": zero.astype(np.uint8)}
            params["sc"] = np.full(len(x), grid.ints["sc"].zero + 1, np.uint8)
        else:
            least_value = np.clip(-d.astype(np.float32) * zero, -_LARGEST_HALF, _LARGEST_HALF)
            params = {"d": d, "m": least_value.astype(np.float16)}
        return on, codes, {k: params[k][:, None] for k in (*grid.floats, *grid.ints)}

    def _written(self, codes: I32, params: dict[str, Array]) -> Array:
        """u8[n, type_size] of blocks."""
        grid, n = self.grid, len(codes)
        data = np.zeros((n, grid.type_size), np.uint8)
        for name, at in grid.floats.items():
            data[:, at : at + 2] = params[name].astype("<f2").view(np.uint8)
        for name, field in grid.ints.items():
            field.write(np.repeat(params[name], field.n, -1), data)
        grid.q.write(codes.astype(np.uint8), data)
        return data


def _zero_points(least: F32, most: F32, high: int) -> I32:
    """The code that stands for 0 in each block: a power of two where one fits, for its product with any step is exact."""
    zero = -np.minimum(least, 0)
    for power in (1, 2, 4, 8, 16):
        zero = np.where((zero > 0) & (-least <= power) & (most <= high - power) & (power <= high), power, zero)
    return zero.astype(np.int32)


def _as_half(lattice: Lattices) -> tuple[NDArray[np.float16], Bools]:
    """Steps as f16: one that rounds to all weights in bf16, where there is one; and in which blocks it is near enough."""
    d = np.clip(lattice.step, 0, _LARGEST_HALF).astype(np.float16)
    up, down = np.nextafter(d, np.float16(np.inf)), np.nextafter(d, np.float16(0))
    d = np.where(d < lattice.least, up, np.where(d > lattice.most, down, d)).astype(np.float16)
    near = np.abs(d.astype(np.float32) - lattice.step) <= lattice.step * np.float32(2.0**-10)
    return d, near & (lattice.step > 0) & np.isfinite(d)


@cache
def on_lattice(codec: AffineCodec) -> LatticeCodec:
    """That type, storing blocks on a lattice as they are."""
    return LatticeCodec(codec)
