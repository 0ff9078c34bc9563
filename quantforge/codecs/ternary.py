"""ggml's types of two to four evenly spaced levels: TQ1_0, TQ2_0 (ternary), Q2_0, Q1_0 (signs)."""

from __future__ import annotations

from .base import GgmlCodec, register

register(GgmlCodec("TQ1_0", halves=(52,)))
register(GgmlCodec("TQ2_0", halves=(64,)))
# newer than the gguf package's tables: (id, weights per block, bytes per block)
register(GgmlCodec("Q1_0", size=(41, 128, 18), halves=(0,)))
register(GgmlCodec("Q2_0", size=(42, 64, 18), halves=(0,)))
