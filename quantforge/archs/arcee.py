"""Arcee's AFM: Llama with ReLU² instead of a gated MLP."""

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, rope_freqs
from .keys import PAIRED_METADATA
from .llama import PAIRED, ROPE_TYPES

ARCH = Arch(
    hf=("ArceeForCausalLM",),
    name="arcee",
    tensors={role: t for role, t in (DECODER | PAIRED).items() if role != "ffn_gate"},
    scale_groups=DECODER_SCALE_GROUPS[:2],
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    metadata_keys=PAIRED_METADATA,
    implied={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
    samples={
        "": {"head_dim": 32},
        "yarn": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5000.0,
            },
        },
    },
)
