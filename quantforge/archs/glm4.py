"""GLM-4, older and newer: half of each head rotated, gates and ups in one matrix, which GGUF keeps so."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .minimax_m2 import restored_rotation, rotated
from .tensors import Config, Tensor

_K = gguf.Keys
_LAYER = "model.layers.{bid}."
_fused = {role: t for role, t in DECODER.items() if role != "ffn_gate"}
_fused |= {r: replace(DECODER[r], bias="attention_bias") for r in ("attn_q", "attn_k", "attn_v")}
_fused |= {"ffn_up": Tensor(("2*ff", "embd"), _LAYER + "mlp.gate_up_proj")}
_keys = {**METADATA, _K.Attention.KEY_LENGTH: ("key_length", int), _K.Attention.VALUE_LENGTH: ("key_length", int)}


def _computed(h: Config) -> Mapping[str, Any]:
    return {_K.Rope.DIMENSION_COUNT: rotated(h, 0.5)}


_defaults = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "pad_token_id": None,  # transformers has one of its own
}

ARCH = (
    Arch(
        hf=("GlmForCausalLM",),
        name="chatglm",
        model_type="glm",
        tensors=_fused,
        defaults=_defaults,
        metadata_keys=_keys,
        computed=_computed,
        restored=restored_rotation,
        implied={"hidden_act": "silu", "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"]},
        partial_rotary=True,
        samples={
            "": {"head_dim": 16, "attention_bias": True},
            "tied": {
                "head_dim": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "tie_word_embeddings": True,
                "attention_bias": False,
            },
        },
    ),
    Arch(
        hf=("Glm4ForCausalLM",),
        name="glm4",
        tensors=_fused
        | {
            "post_attention_norm": Tensor(("embd",), _LAYER + "post_self_attn_layernorm"),
            "post_ffw_norm": Tensor(("embd",), _LAYER + "post_mlp_layernorm"),
        },
        defaults=_defaults,
        metadata_keys=_keys,
        computed=_computed,
        restored=restored_rotation,
        implied={"hidden_act": "silu"},
        partial_rotary=True,
        samples={
            "": {"head_dim": 32, "attention_bias": True},
            "tied": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": False},
        },
    ),
)
