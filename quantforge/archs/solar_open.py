"""Solar Open: GLM-4.5's graph without dense layers, whole heads rotated."""

from dataclasses import replace

import gguf

from .glm4moe import ARCH as GLM

_K = gguf.Keys

ARCH = replace(
    GLM,
    hf=("SolarOpenForCausalLM",),
    model_type="solar_open",
    defaults={
        **GLM.defaults,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "moe_intermediate_size": 1280,
        "first_k_dense_replace": 0,
        "partial_rotary_factor": 1.0,
    },
    implied={**GLM.implied, "use_qk_norm": False, "attention_bias": False, "first_k_dense_replace": 0},
    needed=("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    told_by=lambda get: (
        not get(_K.LLM.LEADING_DENSE_BLOCK_COUNT) and get(_K.Rope.DIMENSION_COUNT) == get(_K.Attention.KEY_LENGTH)
    ),
    samples={
        "": {
            "head_dim": 32,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
        }
    },
)
