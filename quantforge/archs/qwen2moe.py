"""Qwen1.5's and Qwen2's mixtures of experts, with one shared expert behind a gate."""

from dataclasses import replace

import gguf

from .base import Arch
from .decoder import DECODER, experts
from .keys import METADATA
from .qwen3moe import EXPERT_KEYS
from .tensors import ScaleGroup, Tensor

_MLP = "model.layers.{bid}.mlp."
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": Tensor(("1", "embd"), _MLP + "shared_expert_gate"),
    "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _MLP + "shared_expert.gate_proj"),
    "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MLP + "shared_expert.up_proj"),
    "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MLP + "shared_expert.down_proj"),
}
SHARED_EXPERT_KEYS = {
    **EXPERT_KEYS,
    gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_expert_intermediate_size", int),
}
_dense = {role: t for role, t in DECODER.items() if role not in ("ffn_gate", "ffn_up", "ffn_down")}

ARCH = Arch(
    hf=("Qwen2MoeForCausalLM",),
    name="qwen2moe",
    model_type="qwen2_moe",
    tensors=_dense
    | {r: replace(DECODER[r], bias="qkv_bias") for r in ("attn_q", "attn_k", "attn_v")}
    | experts()
    | SHARED_EXPERT,
    scale_groups=(ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")), ScaleGroup("attn_v", ("attn_output",))),
    defaults={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "use_sliding_window": False,
        "qkv_bias": True,
    },
    metadata_keys={**METADATA, **SHARED_EXPERT_KEYS},
    implied={
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
    },
    dims=lambda h, _: {"shared_ff": h["shared_expert_intermediate_size"]},
    samples={
        "": {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 80,
            "vocab_size": 331,
        },
        "unbiased": {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 32,
            "qkv_bias": False,
        },
    },
)
