"""Mixtral: Mistral's mixtures of experts; GGUF has them as llama."""

from .base import Arch
from .decoder import ATTENTION_ONLY, ATTENTION_SCALE_GROUPS, experts, rope_freqs
from .keys import EXPERTS_OF_WHICH_SOME, LLAMA_METADATA
from .llama import PAIRED, ROPE_TYPES

ARCH = Arch(
    hf=("MixtralForCausalLM",),
    name="llama",
    model_type="mixtral",
    tensors=ATTENTION_ONLY
    | PAIRED
    | experts("model.layers.{bid}.block_sparse_moe", words="w1 w3 w2", module="model.layers.{bid}.mlp"),
    scale_groups=ATTENTION_SCALE_GROUPS,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    metadata_keys={**LLAMA_METADATA, **EXPERTS_OF_WHICH_SOME},
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
    told_by=lambda get: bool(get("{arch}.expert_count")),
    samples={
        "": {"head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2},
        "llama3": {
            "num_local_experts": 3,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            },
        },
    },
)
