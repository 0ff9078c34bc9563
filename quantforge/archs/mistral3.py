"""Mistral Small 3 and Ministral 3: Mistral whose queries grow with the position, in one model with a vision part."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from ..arrays import shortest
from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, rope_freqs
from .keys import PAIRED_METADATA
from .llama import PAIRED, ROPE_TYPES
from .rope import rope_scaling
from .tensors import Config

_SCALE = gguf.Keys.Attention.TEMPERATURE_SCALE
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""What transformers takes where config.json says nothing of rope."""


def _computed(h: Config) -> dict[str, Any]:
    # that mscale and mscale_all_dim cancel each other is told by rope.scaling.attn_factor, not by yarn_log_multiplier
    beta = h["rope"].get("llama_4_scaling_beta")
    return {_SCALE: float(beta)} if beta else {}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    rope = rope_scaling(get) or {"rope_type": "default"}
    rope.setdefault("original_max_position_embeddings", int(get(gguf.Keys.LLM.CONTEXT_LENGTH)))
    rope["rope_theta"] = shortest(get(gguf.Keys.Rope.FREQ_BASE) or 10000.0)
    rope["llama_4_scaling_beta"] = shortest(get(_SCALE) or 0.0)
    return {"rope_parameters": rope}


def _ministral(h: Config) -> bool:
    """Is the text part, of Mistral's models that see, a Ministral 3?"""
    return h.get("model_type") == "ministral3"


TEXT = Arch(
    hf=("Ministral3ForCausalLM",),
    name="mistral3",
    model_type="ministral3",
    tensors=DECODER | PAIRED,
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _YARN,
        "pad_token_id": None,
    },
    metadata_keys=PAIRED_METADATA,
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    yarn_betas=True,
    generated=rope_freqs,
    samples={
        "": {
            "head_dim": 32,
            "rope_parameters": _YARN | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.3, "factor": 8.0},
        },
        "tied": {
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope_parameters": _YARN
            | {"original_max_position_embeddings": 128, "mscale_all_dim": 0.5, "factor": 4.0, "rope_theta": 10000.0}
            | {"beta_fast": 8.0, "beta_slow": 2.0},
        },
    },
)
ARCH = (
    TEXT,
    replace(
        TEXT,
        hf=("Mistral3ForConditionalGeneration",),
        model_type="mistral3",
        told_by=lambda get: False,  # its text part goes back as a Ministral3ForCausalLM
        defaults={
            "head_dim": lambda h: 128 if _ministral(h) else h["hidden_size"] // h["num_attention_heads"],
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": lambda h: 1e-5 if _ministral(h) else 1e-6,
            "tie_word_embeddings": True,
        },
        others=re.compile(r"(vision_tower|multi_modal_projector)\."),
        samples={
            "": {
                "head_dim": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "vision_config": {
                    "model_type": "pixtral",
                    "hidden_size": 32,
                    "intermediate_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "head_dim": 16,
                    "image_size": 28,
                    "patch_size": 14,
                },
            }
        },
    ),
)
