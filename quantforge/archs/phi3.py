"""Phi-3, 3.5 and 4: one matrix for queries, keys and values, one for gate and up, and LongRoPE's two sets of factors."""

import gguf

from .base import DECODER, Arch, Config, ScaleGroup, Tensor, longrope_factors
from .keys import METADATA
from .rope import rotated

_att, _rp = gguf.Keys.Attention, gguf.Keys.Rope
_LAYER = "model.layers.{bid}."


def _computed(h: Config) -> dict[str, object]:
    rope = h["rope"]
    return {
        _rp.SCALING_ORIG_CTX_LEN: int(rope.get("original_max_position_embeddings") or h["max_position_embeddings"]),
        _rp.DIMENSION_COUNT: rotated(h),
        _att.SLIDING_WINDOW: h.get("sliding_window") or 0,  # llama.cpp tells Phi-4 from its elders by this
    }
