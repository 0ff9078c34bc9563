"""LG's EXAONE 4: norms after attention and MLP; only layers with a window are rotated, where there are such."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, rope_freqs
from .keys import METADATA
from .llama import ROPE_TYPES
from .tensors import Config, Tensor
from .windows import layer_types, restored_types, window_pattern

_att, _llm = gguf.Keys.Attention, gguf.Keys.LLM
_LAYER = "model.layers.{bid}."
_HYBRID = 64
"""Layers of the only model that the graph gives windows: the 32B."""


def _computed(h: Config) -> dict[str, Any]:
    return window_pattern(h, 4) if h.get("sliding_window") else {}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    layers = int(get(_llm.BLOCK_COUNT))
    window = get(_att.SLIDING_WINDOW) if layers == _HYBRID else None
    kinds = restored_types(get, 4) if window else ["full_attention"] * layers
    return {"sliding_window": window and int(window), "layer_types": kinds}


def _kinds(h: Config) -> list[str]:
    return layer_types(h, 4) if h["num_hidden_layers"] == _HYBRID else ["full_attention"] * h["num_hidden_layers"]


EXAONE_4 = Arch(
    hf=("Exaone4ForCausalLM",),
    name="exaone4",
    tensors={role: t for role, t in DECODER.items() if role not in ("attn_norm", "ffn_norm")}
    | QK_NORM
    | {
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm"),
        "post_ffw_norm": Tensor(("embd",), _LAYER + "post_feedforward_layernorm"),
    },
    defaults={"max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5},
    metadata_keys={**METADATA, _llm.VOCAB_SIZE: ("vocab_size", int), _att.SLIDING_WINDOW: ("sliding_window", int)},
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        # the graph takes the width of attention from these
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
        "sliding_window": lambda h: h.get("sliding_window") if h["num_hidden_layers"] == _HYBRID else None,
        "layer_types": _kinds,
    },
    rope_types=ROPE_TYPES,
    window=True,
    generated=rope_freqs,
    samples={
        "": {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            },
        },
        "windows": {"num_hidden_layers": 64, "hidden_size": 32, "sliding_window": 32, "tie_word_embeddings": True},
    },
)
ARCH = EXAONE_4
