"""Llama 1, 2 and 3.x, dense."""

from dataclasses import replace

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, rope_freqs
from .keys import LLAMA_METADATA
from .tensors import From, Tensor, paired

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3"})
PAIRED = {
    "attn_q": Tensor(("q", "embd"), From("model.layers.{bid}.self_attn.q_proj", rows=paired("heads"))),
    "attn_k": Tensor(("kv", "embd"), From("model.layers.{bid}.self_attn.k_proj", rows=paired("kv_heads"))),
}
"""Queries and keys as llama.cpp's llama graph rotates them."""

_biased = {**DECODER, **PAIRED}

ARCH = Arch(
    hf=("LlamaForCausalLM", "LLaMAForCausalLM"),
    name="llama",
    tensors=_biased
    | {r: replace(_biased[r], bias="attention_bias") for r in ("attn_q", "attn_k", "attn_v", "attn_output")}
    | {r: replace(_biased[r], bias="mlp_bias") for r in ("ffn_gate", "ffn_up", "ffn_down")},
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    metadata_keys=LLAMA_METADATA,
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
)
