"""Llama 1, 2 and 3.x, dense."""

import gguf

from .base import DECODER, DECODER_SCALE_GROUPS, LLAMA_METADATA, Arch, Tensor, interleave_rope, rope_freqs

ARCH = Arch(
    hf=("LlamaForCausalLM", "LLaMAForCausalLM"),
    gguf=gguf.MODEL_ARCH.LLAMA,
    tensors=DECODER
    | {
        "attn_q": Tensor(("q", "embd"), bias="attention_bias", transform=interleave_rope("num_attention_heads")),
        "attn_k": Tensor(("kv", "embd"), bias="attention_bias", transform=interleave_rope("num_key_value_heads")),
        "attn_v": Tensor(("kv", "embd"), bias="attention_bias"),
        "attn_output": Tensor(("embd", "q"), bias="attention_bias"),
        "ffn_gate": Tensor(("ff", "embd"), bias="mlp_bias"),
        "ffn_up": Tensor(("ff", "embd"), bias="mlp_bias"),
        "ffn_down": Tensor(("embd", "ff"), bias="mlp_bias"),
    },
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    metadata_keys=LLAMA_METADATA,
    required={"hidden_act": "silu"},
    rope_types=frozenset({"default", "linear", "dynamic", "yarn", "llama3"}),
    generated=rope_freqs,
)
