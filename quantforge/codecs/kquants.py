"""ggml's K-quants: super-blocks of 256 weights with quantized scales (and mins) per 16 or 32."""

from __future__ import annotations

from .base import AffineCodec, register
from .grid import AffineGrid, Bits, Field, planes


def _six_bits(first: int, second: int, nibble: int, n: int = 4) -> tuple[Bits, ...]:
    """Eight 6-bit numbers of Q4_K and Q5_K: four plain ones, whose bytes' top two bits belong to
    the other four; `second` holds those four's low nibbles, at shift `nibble`."""
    low, high = slice(0, n), slice(n, 2 * n)
    plain, rest = slice(first, first + n), slice(second, second + n)
    return Bits(low, plain, 0, 6), Bits(high, rest, nibble, 4), Bits(high, plain, 6, 2, place=4)


_SCALES_45 = {
    "sc": Field(8, 0, 63, 0, _six_bits(4, 12, 0)),
    "m": Field(8, 0, 63, 0, _six_bits(8, 12, 4)),
}

_GRIDS = {
    # scales and mins u8[16]; codes u8[64]; d, dmin
    "Q2_K": AffineGrid(
        84,
        Field(256, 0, 3, 0, planes(16, 256, 32, 2)),
        {"d": 80, "dmin": 82},
        {
            "sc": Field(16, 0, 15, 0, (Bits(slice(0, 16), slice(0, 16), 0, 4),)),
            "m": Field(16, 0, 15, 0, (Bits(slice(0, 16), slice(0, 16), 4, 4),)),
        },
    ),
    # high bits u8[32]; low bits u8[64]; scales u8[12]; d
    "Q3_K": AffineGrid(
        110,
        Field(256, 0, 7, 4, planes(32, 256, 32, 2) + planes(0, 256, 32, 1, place=2)),
        {"d": 108},
        {"sc": Field(16, 0, 63, 32, planes(96, 16, 8, 4) + planes(104, 16, 4, 2, place=4))},
    ),
    # d, dmin; scales and mins u8[12]; codes u8[128]
    "Q4_K": AffineGrid(144, Field(256, 0, 15, 0, planes(16, 256, 32, 4)), {"d": 0, "dmin": 2}, _SCALES_45),
    # d, dmin; scales and mins u8[12]; high bits u8[32]; low bits u8[128]
    "Q5_K": AffineGrid(
        176, Field(256, 0, 31, 0, planes(48, 256, 32, 4) + planes(16, 256, 32, 1, place=4)), {"d": 0, "dmin": 2}, _SCALES_45
    ),
    # low bits u8[128]; high bits u8[64]; scales i8[16]; d
    "Q6_K": AffineGrid(
        210,
        Field(256, 0, 63, 32, planes(0, 256, 64, 4) + planes(128, 256, 32, 2, place=4)),
        {"d": 208},
        {"sc": Field(16, 0, 255, 128, planes(192, 16, 16, 8), flip=0x80)},
    ),
}

for _name, _grid in _GRIDS.items():
    register(AffineCodec(_name, _grid))
