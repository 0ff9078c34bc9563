"""NF4 and FP4 (QLoRA, arXiv 2305.14314): a table of 16 numbers under an absmax per 64 weights, which double
quantization stores in 8 bits."""

from __future__ import annotations

import numpy as np

from .. import native
from ..arrays import F32, Array, Parts, TensorInfo
from .base import Codec, check_block, check_parts, check_weights, raise_non_finite, register

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""Quantiles of a normal distribution: what codes 0 to 15 stand for."""

_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, -_FP4])
"""bitsandbytes' E2M1, its largest number 1; the code's highest bit is the sign."""

NESTED_BLOCK = 256
_MAX = np.finfo(np.float32).max


def _dynamic_map() -> F32:
    """Dynamic tree quantization (arXiv 1511.04561): 256 numbers in −1..1 whose steps grow with their magnitude."""
    numbers = [0.0, 1.0]
    low, high = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i
        step, at = float((high - low) / np.float32(n)), np.arange(n + 1)
        # as torch.linspace rounds: from either end to the middle, an f32 step, one rounding of the product and sum
        edges = np.where(at < (n + 1) // 2, low + step * at, high - step * (n - at)).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (i - 6))
        numbers += [*means, *-means]
    return np.sort(np.array(numbers, np.float32))


DYNAMIC = _dynamic_map()


def _nearest(x: Array, table: F32) -> Array:
    """Indices u8 of the entries nearest to x."""
    order = np.argsort(table, kind="stable")
    numbers = table[order]
    middles = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2
    return order.astype(np.uint8)[np.searchsorted(middles.astype(np.float32), x)]


class LookupCodec(Codec):
    """w = table[code] · absmax of 64 neighbours.

    Parts: codes: u8[..., in/2], the even weight in the high nibble; absmax: f32[..., in/64]. With
    double quantization absmax is u8, codes of a dynamic map under nested_absmax: f32 per 256 of
    them (in order of rows), plus nested_offset: f32[1], their mean.
    """

    block_size = 64

    def __init__(self, name: str, table: F32, *, double: bool = False) -> None:
        self.name, self.table, self.double = name, table, double
        self.row_local = not double

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Parts codes and absmax; doubled, also nested_absmax and nested_offset."""
        check_block(shape, self)
        blocks = (*shape[:-1], shape[-1] // self.block_size)
        f32, u8 = np.dtype(np.float32), np.dtype(np.uint8)
        arrays = {
            "codes": TensorInfo(u8, (*shape[:-1], shape[-1] // 2)),
            "absmax": TensorInfo(u8 if self.double else f32, blocks),
        }
        if self.double:
            n = int(np.prod(blocks, dtype=object))
            arrays["nested_absmax"] = TensorInfo(f32, (-(-n // NESTED_BLOCK),))
            arrays["nested_offset"] = TensorInfo(f32, (1,))
        return arrays

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Round to the nearest number of the table. Importance does not matter here."""
        w = check_weights(w, self)
        absmax = np.abs(w.reshape(*w.shape[:-1], w.shape[-1] // self.block_size, self.block_size)).max(-1, initial=0)
        if not np.isfinite(absmax).all():
            raise_non_finite(w, self.name)
        parts: Parts = {"absmax": absmax}
        if self.double:
            offset = np.float32(absmax.mean(dtype=np.float64)) if absmax.size else np.float32(0)
            x = absmax.reshape(-1) - offset
            x = np.pad(x, (0, -x.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
            nested = np.abs(x).max(-1, initial=0)
            codes = _nearest(x / np.where(nested > 0, nested, 1)[:, None], DYNAMIC).reshape(-1)[: absmax.size]
            parts = {"absmax": codes.reshape(absmax.shape), "nested_absmax": nested, "nested_offset": np.array([offset])}
        # a table's numbers are relative to the true absmax, which is what bitsandbytes rounds with
        x = w.reshape(*absmax.shape, self.block_size) / np.where(absmax > 0, absmax, 1)[..., None]
        codes = _nearest(x, self.table).reshape(w.shape)
        return {"codes": codes[..., ::2] << np.uint8(4) | codes[..., 1::2], **parts}

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        arrays = dict(zip(self.layout(shape), check_parts(parts, shape, self), strict=True))
        absmax = arrays["absmax"]
        if self.double:
            nested = np.repeat(arrays["nested_absmax"], NESTED_BLOCK)[: absmax.size].reshape(absmax.shape)
            with np.errstate(over="ignore"):
                absmax = np.clip(DYNAMIC[absmax] * nested + arrays["nested_offset"], -_MAX, _MAX)
        codes = np.stack([arrays["codes"] >> 4, arrays["codes"] & 15], -1).reshape(*absmax.shape, self.block_size)
        return np.asarray((self.table[codes] * absmax[..., None]).reshape(shape), np.float32)

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`. Activations stay floats, as the table's numbers are."""
        codes, absmax, *nested = check_parts(parts, shape, self)
        sources = [codes, self.table, absmax, *([DYNAMIC] if nested else []), *nested]
        return native.product("nibbles", x, sources, shape[0], threads)


for _name, _table in (("nf4", NF4), ("fp4", FP4)):
    register(LookupCodec(_name, _table))
    register(LookupCodec(f"{_name}-dq", _table, double=True))
