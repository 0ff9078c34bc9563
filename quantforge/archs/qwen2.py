"""Qwen2 and Qwen2.5, dense."""

import gguf

from .base import DECODER, DECODER_SCALE_GROUPS, METADATA, Arch, Tensor

ARCH = Arch(
    hf=("Qwen2ForCausalLM",),
    gguf=gguf.MODEL_ARCH.QWEN2,
    tensors=DECODER
    | {
        "attn_q": Tensor(("q", "embd"), bias=True),
        "attn_k": Tensor(("kv", "embd"), bias=True),
        "attn_v": Tensor(("kv", "embd"), bias=True),
    },
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "use_sliding_window": False},
    metadata_keys=METADATA,
    required={"hidden_act": "silu"},
)
