"""Qwen3, dense: Qwen2 without biases, with a norm on each head's queries and keys."""

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, QK_NORM
from .keys import METADATA

ARCH = Arch(
    hf=("Qwen3ForCausalLM",),
    name="qwen3",
    tensors=DECODER | QK_NORM,
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    metadata_keys=METADATA,
    implied={"hidden_act": "silu", "attention_bias": False},
)
