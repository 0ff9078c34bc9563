"""JetBrains' Mellum: Qwen3's mixtures of experts with windows; only layers without one are scaled by YaRN."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import ATTENTION_ONLY, ATTENTION_SCALE_GROUPS, QK_NORM, experts
from .keys import EXPERTS_OF_WHICH_SOME, METADATA
from .rope import rope_by_kind, sliding_theta
from .tensors import Config
from .windows import layer_types, restored_types, window_pattern

_att, _llm = gguf.Keys.Attention, gguf.Keys.LLM
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5000.0,
}


def _computed(h: Config) -> dict[str, Any]:
    kinds = layer_types(h, 1)
    if "sliding_attention" not in kinds:
        return {_att.SLIDING_WINDOW: 0}
    full, sliding = h["rope"]["rope_theta"], sliding_theta(h, h["rope"]["rope_theta"])
    if full != sliding and "full_attention" in kinds:
        raise UnsupportedError(
            f"config.json: rope_theta {full} of full_attention layers, {sliding} of others: llama.cpp's mellum graph has one base"
        )
    return window_pattern(h, 1)


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    window = get(_att.SLIDING_WINDOW)
    return {
        "layer_types": restored_types(get, 4 if window else 1),
        "rope_parameters": rope_by_kind(get),
        "sliding_window": window and int(window),
    }


ARCH = Arch(
    hf=("MellumForCausalLM",),
    name="mellum",
    tensors=ATTENTION_ONLY | QK_NORM | experts(),
    scale_groups=ATTENTION_SCALE_GROUPS,
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 896,
        "sliding_window": 1024,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    aliases={"num_experts": "num_local_experts"},
    metadata_keys={
        **METADATA,
        **EXPERTS_OF_WHICH_SOME,
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _att.SLIDING_WINDOW: ("sliding_window", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,  # the graph asks for a head of its own
        "mlp_layer_types": lambda h: ["sparse"] * h["num_hidden_layers"],
        "num_mtp_layers": None,
    },
    window=True,
    samples={
        "": {
            "head_dim": 32,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": _YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    },
)
