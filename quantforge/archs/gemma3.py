"""Gemma 3: Gemma 2 with a norm on queries and keys instead of soft caps, and two rope bases."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM
from .gemma2 import ARCH as GEMMA2
from .keys import METADATA
from .rope import sliding_theta
from .tensors import Config
from .weight import PLUS_ONE
from .windows import restored_types, window_pattern

_att = gguf.Keys.Attention
_EVERY = 6
"""The graph's own pattern: every sixth layer attends to all."""


def _computed(h: Config) -> Mapping[str, Any]:
    return {gguf.Keys.Rope.FREQ_BASE_SWA: sliding_theta(h, 10000.0), **window_pattern(h, _EVERY, always=False)}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    local = float(get(gguf.Keys.Rope.FREQ_BASE_SWA) or 10000.0)
    return {"layer_types": restored_types(get, _EVERY), "rope_local_base_freq": local}


_sample = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
_full_at_2 = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

TEXT = Arch(
    hf=("Gemma3ForCausalLM",),
    name="gemma3",
    model_type="gemma3_text",
    tensors=dict(GEMMA2.tensors)
    | {"output": DECODER["output"]}
    | {role: replace(t, value=PLUS_ONE) for role, t in QK_NORM.items()},
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
    },
    metadata_keys={
        **METADATA,
        gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING: ("final_logit_softcapping", float),
        _att.SLIDING_WINDOW: ("sliding_window", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        # of the 27B with its 62 layers the graph takes hidden_size / heads, else the head size
        "query_pre_attn_scalar": lambda h: (
            h["hidden_size"] // h["num_attention_heads"] if h["num_hidden_layers"] == 62 else h["key_length"]
        ),
    },
    rope_types=frozenset({"default", "linear"}),
    window=True,
    samples={
        "": _sample | {"num_hidden_layers": 7, "tie_word_embeddings": True},
        "linear": {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "layer_types": _full_at_2,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    },
)

ARCH = (
    TEXT,
    replace(
        TEXT,
        hf=("Gemma3ForConditionalGeneration",),
        model_type="gemma3",
        told_by=lambda get: False,  # its text part goes back as a Gemma3ForCausalLM
        others=re.compile(r"(vision_tower|multi_modal_projector)\."),
        samples={"": _sample | {"layer_types": _full_at_2, "tie_word_embeddings": True, "vision_config": _VISION}},
    ),
)
