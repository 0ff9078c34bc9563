"""Qwen3-VL, dense and mixtures of experts: the text part, which is Qwen3 with interleaved rotary axes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .qwen3 import ARCH as QWEN3
from .qwen3moe import ARCH as QWEN3MOE
from .qwen35 import VISION, sections
from .tensors import Config, From, part

_EXPERTS = "model.layers.{bid}.mlp.experts."
_DEEPSTACK = "{arch}.n_deepstack_layers"


def _computed(h: Config) -> Mapping[str, Any]:
    return {
        gguf.Keys.Rope.DIMENSION_SECTIONS: sections(h, h["key_length"] // 2, [24, 20, 20]),
        _DEEPSTACK: len((h.get("vision_config") or {}).get("deepstack_visual_indexes") or []),
    }


def _restored(name: str, model_type: str) -> Callable[[Callable[[str], Any]], Mapping[str, Any]]:
    """The text part as a model of its own."""
    return lambda _: {"architectures": [name], "model_type": model_type}


def _gate_up(which: int) -> From:
    """Gates or ups of [experts, in, 2·out]."""
    picked = part(which, "expert_ff", "expert_ff", per="experts")
    return From(_EXPERTS + "gate_up_proj", ("experts", "embd", "2*expert_ff"), groups="experts", picked=picked, suffix="")


_down = From(_EXPERTS + "down_proj", ("experts", "expert_ff", "embd"), groups="experts", suffix="")
_stored = {"ffn_gate_exps": _gate_up(0), "ffn_up_exps": _gate_up(1), "ffn_down_exps": _down}
_transposed = {r: replace(t, also=(o, *t.also)) for r, o in _stored.items() if (t := QWEN3MOE.tensors[r])}
_vision = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0, 1],
}
_rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [6, 5, 5]}
_small = {"head_dim": 32, "rope_parameters": _rope, "vision_config": _vision}

ARCH: tuple[Arch, ...] = (
    replace(
        QWEN3,
        hf=("Qwen3VLForConditionalGeneration",),
        name="qwen3vl",
        model_type="qwen3_vl",
        defaults={**QWEN3.defaults, "max_position_embeddings": 128000, "rope_theta": 500000.0},
        computed=_computed,
        restored=_restored("Qwen3ForCausalLM", "qwen3"),
        rope_types=frozenset({"default", "mrope"}),
        others=VISION,
        samples={"": _small, "tied": {**_small, "tie_word_embeddings": True, "num_key_value_heads": 1}},
    ),
    replace(
        QWEN3MOE,
        hf=("Qwen3VLMoeForConditionalGeneration",),
        name="qwen3vlmoe",
        model_type="qwen3_vl_moe",
        tensors={**QWEN3MOE.tensors, **_transposed},
        defaults={
            **QWEN3MOE.defaults,
            "max_position_embeddings": 128000,
            "rope_theta": 500000.0,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
        },
        computed=_computed,
        restored=_restored("Qwen3MoeForCausalLM", "qwen3_moe"),
        rope_types=frozenset({"default", "mrope"}),
        others=VISION,
        samples={"": {**_small, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}},
    ),
)
