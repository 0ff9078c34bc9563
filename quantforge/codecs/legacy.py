"""ggml's types with one or two f16 parameters per 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""

from __future__ import annotations

from .base import AffineCodec, register
from .grid import AffineGrid, Field, planes

# ggml never stores -128 in Q8_0
_CODES_8 = Field(32, 1, 255, 128, planes(2, 32, 32, 8), flip=0x80)


def _nibbles(at: int, zero: int) -> Field:
    return Field(32, 0, 15, zero, planes(at, 32, 16, 4))


def _five_bits(at: int, zero: int) -> Field:
    """32 high bits as one little-endian word, then nibbles."""
    return Field(32, 0, 31, zero, planes(at + 4, 32, 16, 4) + planes(at, 32, 1, 1, place=4))


register(AffineCodec("Q4_0", AffineGrid(18, _nibbles(2, zero=8), {"d": 0})))
register(AffineCodec("Q4_1", AffineGrid(20, _nibbles(4, zero=0), {"d": 0, "m": 2})))
register(AffineCodec("Q5_0", AffineGrid(22, _five_bits(2, zero=16), {"d": 0})))
register(AffineCodec("Q5_1", AffineGrid(24, _five_bits(4, zero=0), {"d": 0, "m": 2})))
register(AffineCodec("Q8_0", AffineGrid(34, _CODES_8, {"d": 0}), takes_importance=False))
