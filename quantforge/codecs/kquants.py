"""ggml's K-quants: super-blocks of 256 weights with quantized scales (and mins) per 16 or 32."""

from __future__ import annotations

from .base import GgmlCodec, register

for _name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
    register(GgmlCodec(_name, takes_importance=True))
