"""Qwen3's mixtures of experts."""

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .keys import METADATA
from .tensors import ScaleGroup

_dense = {role: t for role, t in DECODER.items() if role not in ("ffn_gate", "ffn_up", "ffn_down")}

EXPERT_KEYS = {
    gguf.Keys.LLM.EXPERT_COUNT: ("num_experts", int),
    gguf.Keys.LLM.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
    gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
}

ARCH = Arch(
    hf=("Qwen3MoeForCausalLM",),
    name="qwen3moe",
    model_type="qwen3_moe",
    tensors=_dense | QK_NORM | experts(),
    scale_groups=(ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")), ScaleGroup("attn_v", ("attn_output",))),
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "use_sliding_window": False,
    },
    aliases={"num_experts": "num_local_experts"},
    metadata_keys={**METADATA, **EXPERT_KEYS},
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    samples={
        "": {"head_dim": 32, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        "tied": {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    },
)
