"""Qwen3, dense: Qwen2 without biases, with a norm on each head's queries and keys."""

import gguf

from .base import DECODER, DECODER_SCALE_GROUPS, METADATA, Arch, Tensor

ARCH = Arch(
    hf=("Qwen3ForCausalLM",),
    gguf=gguf.MODEL_ARCH.QWEN3,
    tensors=DECODER | {"attn_q_norm": Tensor(("head",)), "attn_k_norm": Tensor(("head",))},
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    metadata_keys=METADATA,
    required={"hidden_act": "silu", "attention_bias": False},
)
