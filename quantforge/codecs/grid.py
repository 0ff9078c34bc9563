"""Affine grids on torch tensors (CPU or CUDA): where a block's integers lie in its bytes, which
numbers they stand for, and the fit of the stored scales and mins to weights.

    value = d·(sc − sc.zero) · (q − q.zero) − dmin·m        d, dmin: f16 per block; sc, m: per sub-block
    value = d · (q − q.zero) [+ m]                          types without sub-blocks; m: f16

Sums are trees of plain additions and nothing is contracted, so that CPU and CUDA, any instruction
set and any number of threads choose the same parameters, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..arrays import Array

if TYPE_CHECKING:
    import torch

_A = TypeVar("_A", "torch.Tensor", Array)


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits place:place+width of the values `to` are bits shift:shift+width of the bytes `at`."""

    to: slice
    at: slice
    shift: int
    width: int
    place: int = 0


def planes(at: int, n: int, run: int, width: int, place: int = 0) -> tuple[Bits, ...]:
    """`n` values of `width` bits from byte `at` on: `run` bytes hold `run` values in their lowest
    bits, the next `run` values in the bits above, and so on; then come the next `run` bytes."""
    per = 8 // width
    if run == 1:  # neighbours share a byte: a stride instead of many runs of one
        bytes_ = slice(at, at + n // per)
        return tuple(Bits(slice(s, n, per), bytes_, s * width, width, place) for s in range(per))
    return tuple(
        Bits(
            slice((k * per + s) * run, (k * per + s + 1) * run), slice(at + k * run, at + (k + 1) * run), s * width, width, place
        )
        for k in range(n // (per * run))
        for s in range(per)
    )


@dataclass(frozen=True, slots=True)
class Field:
    """Unsigned integers of a block; `zero` is the one that stands for 0."""

    n: int
    lo: int
    hi: int
    zero: int
    bits: tuple[Bits, ...]
    flip: int = 0
    """XORed to what is stored: 0x80 turns two's complement into offset binary."""

    def read(self, data: torch.Tensor) -> torch.Tensor:
        """data: u8[..., type_size] -> u8[..., n]."""
        values = data.new_zeros((*data.shape[:-1], self.n))
        for b in self.bits:
            values[..., b.to] |= ((data[..., b.at] >> b.shift) & ((1 << b.width) - 1)) << b.place
        return values ^ self.flip

    def write(self, values: _A, data: _A) -> None:
        """Put values: u8[..., n] into zeroed data: u8[..., type_size]; both torch's or both NumPy's."""
        values = values ^ self.flip
        for b in self.bits:
            data[..., b.at] |= ((values[..., b.to] >> b.place) & ((1 << b.width) - 1)) << b.shift


class Spacing(NamedTuple):
    """Evenly spaced numbers that the codes of some columns stand for: step · (code − zero) − offset."""

    step: torch.Tensor
    """f32[out, columns], or [out, 1] where all columns have one."""
    offset: torch.Tensor | None
    """The same; None: 0."""
    zero: int
    lowest: int
    highest: int
    """Codes are lowest .. highest."""


_UNIT = Field(1, 1, 1, 0, ())  # the sub-scale of types that have none
FITTED_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights: stay in cache, fill the device
_LEVELS = tuple(i / 4 for i in range(-4, 7))  # added to the number of levels that a range is cut into
_PHASES = (0.0, 0.5, 1.0)  # parts of the range cut off that lie at its lower end
_RANGES = tuple(1.03 - i * 0.03 for i in range(8))  # parts of the integers' range that the largest value maps to
_MAX = 1e9  # more than any grid reaches, and its square is finite
_ROUNDS = 3  # of coordinate descent


@dataclass(frozen=True)
class AffineGrid:
    """One block type: the table of its fields.  Params are those tables read: f16[out, blocks]
    and u8[out, sub-blocks], by name; codes are q: u8[out, in]."""

    type_size: int
    q: Field
    floats: Mapping[str, int]
    """Name -> byte of an f16: d; dmin or m."""
    ints: Mapping[str, Field] = field(default_factory=dict)
    """Sub-block scales and mins: sc, m; or none."""

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks per block."""
        return self.ints["sc"].n if self.ints else 1

    def read(self, data: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(codes, params) of u8[out, row_bytes]."""
        import torch

        out = data.shape[0]
        data = data.reshape(out, -1, self.type_size)
        params = {k: data[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1) for k, at in self.floats.items()}
        params |= {k: f.read(data).reshape(out, -1) for k, f in self.ints.items()}
        return self.q.read(data).reshape(out, -1), params

    def write(self, codes: torch.Tensor, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """u8[out, row_bytes] of codes and params."""
        import torch

        out, blocks = params["d"].shape
        data = codes.new_zeros((out, blocks, self.type_size), dtype=torch.uint8)
        for k, at in self.floats.items():
            data[..., at : at + 2] = params[k].contiguous().unsqueeze(-1).view(torch.uint8)
        for k, f in (*self.ints.items(), ("", self.q)):
            f.write((params[k] if k else codes).reshape(out, blocks, f.n), data)
        return data.reshape(out, -1)

    def _lattice(self, params: Mapping[str, torch.Tensor], at: int, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Step and offset (value = step·(q − zero) − offset) of columns at:at+n: f32[out, n] or [out, 1]."""
        per, width = self.sub_blocks, self.q.n // self.sub_blocks
        first, last = at // width, (at + n - 1) // width
        start = first // per

        def block(name: str) -> torch.Tensor:
            t = params[name][:, start : last // per + 1].float()
            return _repeat(t, per, first - start * per, last + 1 - first)

        def sub_block(name: str) -> torch.Tensor:
            return params[name][:, first : last + 1].float()

        offset = None
        step = block("d")
        if "sc" in self.ints:
            step = step * (sub_block("sc") - self.ints["sc"].zero)
        if "dmin" in self.floats:
            offset = block("dmin") * sub_block("m")
        elif "m" in self.floats:
            offset = -block("m")
        cut = at - first * width
        return _repeat(step, width, cut, n), None if offset is None else _repeat(offset, width, cut, n)

    def spacing(self, params: Mapping[str, torch.Tensor], at: int, n: int) -> Spacing:
        """What codes of columns at:at+n stand for."""
        return Spacing(*self._lattice(params, at, n), self.q.zero, self.q.lo, self.q.hi)

    def round(self, w: torch.Tensor, params: Mapping[str, torch.Tensor], at: int) -> torch.Tensor:
        """Nearest codes u8[out, n] of columns at:at+n."""
        import torch

        step, offset = self._lattice(params, at, w.shape[1])
        return (self._nearest(w.float(), step, offset) + self.q.zero).to(torch.uint8)

    def expand(self, codes: torch.Tensor, params: Mapping[str, torch.Tensor], at: int) -> torch.Tensor:
        """f32[out, n], with the operations of the decode kernels in their order."""
        step, offset = self._lattice(params, at, codes.shape[1])
        value = step * (codes.float() - self.q.zero)
        return value if offset is None else value - offset

    def _nearest(self, w: torch.Tensor, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """q − zero, as floats. A step of 0 gives 0, which keeps the value's sign and bits plain."""
        y = w if offset is None else w + offset
        y = y / step.masked_fill(step == 0, float("inf"))
        return y.round_().clamp_(self.q.lo - self.q.zero, self.q.hi - self.q.zero)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Stored params that make Σ importance (w − ŵ)² small; w: f32[out, in], importance: f32[in] or f32[out, in]."""
        import torch

        w = w.detach()
        if importance is not None:
            importance = importance.detach().to(w.device, torch.float32)
            # the largest is 1, so that no product overflows; where all are 0, all are equal
            importance = (importance / importance.amax().clamp_min(1e-30) + 1e-12).expand(w.shape)
        step = max(1, FITTED_AT_ONCE.get(w.device.type, 1 << 18) // max(1, w.shape[1]))
        fitted = []
        for i in range(0, w.shape[0], step):
            x = self._columns(w[i : i + step].float().clamp(-_MAX, _MAX))
            c = x.new_ones((1, 1, 1)) if importance is None else self._columns(importance[i : i + step])
            fitted.append(_Fit(self, x, c).run())
        rows = w.shape[0]
        return {k: torch.cat([p[k] for p in fitted]).reshape(rows, -1) for k in fitted[0]}

    def _columns(self, w: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [weight in sub-block, sub-block, block]: reductions over whole planes."""
        return w.reshape(-1, self.sub_blocks, self.q.n // self.sub_blocks).permute(2, 1, 0).contiguous()


def _repeat(t: torch.Tensor, times: int, start: int, n: int) -> torch.Tensor:
    """Columns start:start+n of t with each column repeated; one column stays one, to broadcast."""
    return t if t.shape[1] == 1 else t if times == 1 else t.repeat_interleave(times, 1)[:, start : start + n]


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis (a power of two), halving: the same bits on every device."""
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x[0]


def _f16(x: torch.Tensor) -> torch.Tensor:
    """f32 values rounded to what f16 can hold, without overflow."""
    return x.clamp(-65504.0, 65504.0).half().float()


def _ratio(a: torch.Tensor, b: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """a / b where b > 0, else `otherwise`."""
    return (a / b).where(b > 0, otherwise)


class _Fit:
    """The search for one chunk.  x: [weight, sub-block, block]; c: its importance, or one 1.

    First the real-valued step and offset of every sub-block (many ranges, each improved by least
    squares), then d and dmin by sweeps over what the largest of them maps to, then coordinate
    descent on what is stored: sub-scales and mins by one, d and dmin by least squares. From the
    sweeps on, every trial measures the error of the final numbers and only a lower one is kept.
    CUDA divides by a Python number through its reciprocal, the CPU does not: nothing here divides by one.
    Steps, offsets, sc and m: [sub-block, block]; d, dmin: [block]. Symmetric types ignore offsets.
    """

    def __init__(self, grid: AffineGrid, x: torch.Tensor, c: torch.Tensor) -> None:
        self.grid, self.x, self.c = grid, x, c
        self.lo, self.hi = grid.q.lo - grid.q.zero, grid.q.hi - grid.q.zero
        self.sc, self.m = grid.ints.get("sc", _UNIT), grid.ints.get("m", _UNIT)
        self.affine = len(grid.floats) > 1
        self.sum_c = _sum(c if c.numel() > 1 else c.expand(x.shape))
        self.sum_cx = _sum(x * c)

    def run(self) -> dict[str, torch.Tensor]:
        """The stored params, blocks first."""
        import torch

        step, offset = self.asymmetric() if self.affine else self.symmetric()
        d, sc = self.sweep(step, self.sc, lambda s: self.error(s, offset))
        dmin, m = self.sweep(offset, self.m, lambda o: self.error(d * sc, o))
        d, sc, dmin, m = self.descend(d, sc, dmin, m)
        floats = {"d": d, "dmin": dmin, "m": 0 - dmin}
        halves = {k: floats[k].half() for k in self.grid.floats}
        ints = {"sc": sc, "m": m}
        return halves | {k: (ints[k] + f.zero).t().to(torch.uint8) for k, f in self.grid.ints.items()}

    def error(self, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Σ c (x − x̂)² of each sub-block."""
        value = self.nearest(step, offset).mul_(step)
        if self.affine:
            value -= offset
        return _sum(value.sub_(self.x).square_().mul_(self.c))

    def nearest(self, step: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The nearest codes, less their zero."""
        return self.grid._nearest(self.x, step, offset if self.affine else None)

    def moments(self, step: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Σ c q², Σ c q x, Σ c q of each sub-block for the nearest codes q."""
        q = self.nearest(step, offset)
        cq = q * self.c
        return _sum(q.mul_(cq)), _sum(self.x * cq), _sum(cq) if self.affine else offset

    def symmetric(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step of each sub-block, and offsets of 0."""
        low, high = self.x.amin(0), self.x.amax(0)
        top = low.where(-low >= high, high)
        step, best = top.new_zeros(top.shape), top.new_full(top.shape, -1.0)
        zero = step
        for levels in (self.lo, self.hi):  # the farthest weight at either end
            for more in _LEVELS:
                qq, qx, _ = self.moments(top * (1 / (levels + (more if levels > 0 else -more))), zero)
                gain = _ratio(qx * qx, qq, best)  # least squares leaves Σ c x² − qx²/qq
                step, best = (qx / qq).where(gain > best, step), gain.maximum(best)
        for _ in range(2):
            qq, qx, _ = self.moments(step, zero)
            step = _ratio(qx, qq, step)
        return step, zero

    def asymmetric(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and offset of each sub-block."""
        low, high = self.x.amin(0), self.x.amax(0)
        if self.grid.ints:
            low = low.clamp_max(0)
        width = high.maximum(low) - low
        step, offset, best = width * (1 / self.hi), -low, width.new_full(width.shape, float("inf"))
        for more in _LEVELS:
            s = width * (1 / (self.hi + more))
            for part in _PHASES:
                fitted, shift, e = self.line(s, -(low + s * (more * part)))
                better = e < best
                step, offset, best = fitted.where(better, step), shift.where(better, offset), e.minimum(best)
        for _ in range(2):
            step, offset, _ = self.line(step, offset)
        return step, offset

    def line(self, step: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Least-squares step and offset for the nearest codes, and the error they leave, less Σ c x²."""
        qq, qx, q = self.moments(step, offset)
        # codes that are (almost) all equal, up to rounding, say nothing about the step
        spread = self.sum_c * qq - q * q
        spread = spread * (spread > 1e-6 * self.sum_c * qq)
        fitted = _ratio(self.sum_c * qx - q * self.sum_cx, spread, step)
        shift = (fitted * q - self.sum_cx) / self.sum_c
        if self.grid.ints:  # stored mins are not negative
            fitted = fitted.where(shift >= 0, _ratio(qx, qq, step))
            shift = shift.clamp_min(0)
        return fitted, shift, shift * self.sum_cx - fitted * qx

    def sweep(
        self, values: torch.Tensor, stored: Field, error: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Split values into an f16 scale per block and integers; error: the sub-blocks' errors if
        these were the values."""
        if stored is _UNIT:
            return _f16(values[0]), values.new_ones(values.shape)
        lo, hi = stored.lo - stored.zero, stored.hi - stored.zero
        low, high = values.amin(0), values.amax(0)
        top = low.where(-low >= high, high)
        scale, integers, best = top, values, top.new_full(top.shape, float("inf"))
        for levels in (lo, hi) if lo < 0 else (hi,):
            for part in _RANGES:
                d = _f16(top * (1 / (levels * part)))
                i = (values / d.masked_fill(d == 0, float("inf"))).round_().clamp_(lo, hi)
                e = _sum(error(d * i))
                better = e < best
                scale, integers, best = d.where(better, scale), i.where(better, integers), e.minimum(best)
        return scale, integers

    def descend(
        self, d: torch.Tensor, sc: torch.Tensor, dmin: torch.Tensor, m: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Improve what is stored."""
        up_down = {k: (-1, 0, 1) if k in self.grid.ints else (0,) for k in ("sc", "m")}
        best = self.error(d * sc, dmin * m)
        # weights below f16's resolution are best left at 0
        nothing = self.error(d * 0 * sc, dmin * 0 * m)
        better = _sum(best) <= _sum(nothing)
        d, dmin, best = d * better, dmin * better, best.where(better, nothing)
        for _ in range(_ROUNDS):
            for i in up_down["sc"]:
                for j in up_down["m"]:
                    if i == j == 0:
                        continue
                    new_sc = (sc + i).clamp_(self.sc.lo - self.sc.zero, self.sc.hi - self.sc.zero)
                    new_m = (m + j).clamp_(self.m.lo, self.m.hi)
                    e = self.error(d * new_sc, dmin * new_m)
                    better = e < best
                    sc, m, best = new_sc.where(better, sc), new_m.where(better, m), e.minimum(best)
            new_d, new_dmin = self.refit(d, sc, dmin, m)
            e = self.error(new_d * sc, new_dmin * m)
            better = _sum(e) < _sum(best)
            d, dmin, best = new_d.where(better, d), new_dmin.where(better, dmin), e.where(better, best)
        return d, sc, dmin, m

    def refit(self, d: torch.Tensor, sc: torch.Tensor, dmin: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least-squares d and dmin of each block for the nearest codes and given integers, rounded to f16."""
        qq, qx, q = self.moments(d * sc, dmin * m)
        aa, ax = _sum(sc * sc * qq), _sum(sc * qx)
        if not self.affine:
            return _f16(_ratio(ax, aa, d)), dmin
        ab, bb, bx = _sum(sc * m * q), _sum(m * m * self.sum_c), _sum(m * self.sum_cx)
        det = aa * bb - ab * ab
        return _f16(_ratio(ax * bb - ab * bx, det, d)), _f16(_ratio(ab * ax - aa * bx, det, dmin))
