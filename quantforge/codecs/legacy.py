"""ggml's types with one or two f16 parameters per 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""

from __future__ import annotations

from .base import GgmlCodec, register

for _name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
    register(GgmlCodec(_name, takes_importance=True))
register(GgmlCodec("Q8_0"))
