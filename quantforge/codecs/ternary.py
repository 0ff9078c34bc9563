"""ggml's types of two to four evenly spaced levels: TQ1_0, TQ2_0 (ternary), Q2_0, Q1_0 (signs)."""

from __future__ import annotations

from .base import GgmlCodec, register

for _name in ("TQ1_0", "TQ2_0"):
    register(GgmlCodec(_name))
# newer than the gguf package's tables: (id, weights per block, bytes per block)
register(GgmlCodec("Q1_0", size=(41, 128, 18)))
register(GgmlCodec("Q2_0", size=(42, 64, 18)))
