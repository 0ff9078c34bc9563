"""Qwen2-VL and Qwen2.5-VL: the text part, which is Qwen2 with rotary positions in three axes, the same three for text."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS
from .keys import METADATA
from .qwen35 import VISION
from .tensors import Config

_SECTIONS = gguf.Keys.Rope.DIMENSION_SECTIONS


def _computed(h: Config) -> Mapping[str, Any]:
    if h["rms_norm_eps"] > 1e-6:
        raise UnsupportedError(
            f"config.json: rms_norm_eps = {h['rms_norm_eps']}: llama.cpp's qwen2vl graph has none; 1e-6 passes"
        )
    sections = h["rope"].get("mrope_section")
    if not sections or len(sections) != 3 or sum(sections) != h["key_length"] // 2:
        raise UnsupportedError(f"config.json: mrope_section = {sections} does not share out a head of {h['key_length']}")
    return {_SECTIONS: [*sections, 0]}


def _restored(_: Callable[[str], Any]) -> Mapping[str, Any]:
    """The text part as a model of its own."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


_vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64, "embed_dim": 16}

ARCH = Arch(
    hf=("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    name="qwen2vl",
    model_type="qwen2_vl",
    tensors=DECODER | {r: replace(DECODER[r], bias=True) for r in ("attn_q", "attn_k", "attn_v")},
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    metadata_keys=METADATA,
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu", "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"]},
    rope_types=frozenset({"default", "mrope"}),
    others=VISION,
    samples={
        "": {
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]},
            "vision_config": _vision,
        },
        "tied": {
            "rms_norm_eps": 1e-6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
            "tie_word_embeddings": True,
            "vision_config": _vision,
        },
    },
)
