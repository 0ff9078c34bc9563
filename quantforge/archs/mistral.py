"""Mistral (7B, Nemo, Small, ...), dense: GGUF has it as llama."""

import gguf

from .base import DECODER, DECODER_SCALE_GROUPS, LLAMA_METADATA, Arch, Tensor, interleave_rope, rope_freqs

ARCH = Arch(
    hf=("MistralForCausalLM",),
    gguf=gguf.MODEL_ARCH.LLAMA,
    tensors=DECODER
    | {
        "attn_q": Tensor(("q", "embd"), transform=interleave_rope("num_attention_heads")),
        "attn_k": Tensor(("kv", "embd"), transform=interleave_rope("num_key_value_heads")),
    },
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    metadata_keys=LLAMA_METADATA,
    required={"hidden_act": "silu"},
    rope_types=frozenset({"default", "linear", "dynamic", "yarn", "llama3"}),
    generated=rope_freqs,
)
