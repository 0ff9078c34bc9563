"""Qwen2 and Qwen2.5, dense."""

from dataclasses import replace

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS
from .keys import METADATA

ARCH = Arch(
    hf=("Qwen2ForCausalLM",),
    name="qwen2",
    tensors=DECODER | {r: replace(DECODER[r], bias=True) for r in ("attn_q", "attn_k", "attn_v")},
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "use_sliding_window": False},
    metadata_keys=METADATA,
    implied={"hidden_act": "silu"},
)
