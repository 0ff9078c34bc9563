"""Llama 4: every layer or every other with experts beside a shared one, every fourth layer without rotation."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, rope_freqs
from .keys import METADATA
from .llama import ROPE_TYPES
from .qwen35 import VISION
from .tensors import Config, From, Sizes, Tensor, part

_llm = gguf.Keys.LLM
_FF = "model.layers.{bid}.feed_forward"


def _gate_up(which: int) -> From:
    """Gates or ups of [experts, in, 2·out]."""
    picked = part(which, "expert_ff", "expert_ff", per="experts")
    return From(_FF + ".experts.gate_up_proj", ("experts", "embd", "2*expert_ff"), groups="experts", picked=picked, suffix="")


def _layers(h: Config) -> Sequence[Collection[str]]:
    every = h["interleave_moe_layer_step"]
    return [("moe",) if (i + 1) % every == 0 else () for i in range(h["num_hidden_layers"])]


def _dims(h: Config, _: int | None) -> Sizes:
    return {"ff": h["intermediate_size_mlp"], "expert_ff": h["intermediate_size"]}


def _implied_layers(h: Config) -> Mapping[str, Any]:
    count, every = h["num_hidden_layers"], h["interleave_moe_layer_step"]
    return {
        "moe_layers": list(range(every - 1, count, every)),
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(count)],
        "layer_types": ["chunked_attention" if (i + 1) % 4 else "full_attention" for i in range(count)],
    }


_dense = {r: replace(DECODER[r], checkpoint=f"{_FF}.{r[4:]}_proj", where="!moe") for r in ("ffn_gate", "ffn_up", "ffn_down")}
_shared = {f"{r}_shexp": replace(t, checkpoint=f"{_FF}.shared_expert.{r[4:]}_proj", where="moe") for r, t in _dense.items()}
_shared = {r: replace(t, dims=tuple("expert_ff" if d == "ff" else d for d in t.dims)) for r, t in _shared.items()}
_small = {"head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size_mlp": 80, "intermediate_size": 48}
_vision = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vision_output_dim": 16,
    "image_size": 28,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}

ARCH = Arch(
    hf=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    name="llama4",
    model_type="llama4_text",
    tensors=DECODER
    | _dense
    | _shared
    | {
        "ffn_gate_inp": Tensor(("experts", "embd"), _FF + ".router", where="moe"),
        "ffn_gate_exps": Tensor(("experts", "expert_ff", "embd"), _gate_up(0), where="moe"),
        "ffn_up_exps": Tensor(("experts", "expert_ff", "embd"), _gate_up(1), where="moe"),
        "ffn_down_exps": Tensor(
            ("experts", "embd", "expert_ff"),
            From(_FF + ".experts.down_proj", ("experts", "expert_ff", "embd"), groups="experts", suffix=""),
            where="moe",
        ),
    },
    scale_groups=DECODER_SCALE_GROUPS[:2],
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    metadata_keys={
        **METADATA,
        _llm.FEED_FORWARD_LENGTH: ("intermediate_size_mlp", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        gguf.Keys.Rope.DIMENSION_COUNT: ("key_length", int),
        _llm.EXPERT_COUNT: ("num_local_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.INTERLEAVE_MOE_LAYER_STEP: ("interleave_moe_layer_step", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("intermediate_size", int),
    },
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": lambda h: h["num_local_experts"] != 128,  # llama.cpp tells Maverick by its experts
        "moe_layers": lambda h: _implied_layers(h)["moe_layers"],
        "no_rope_layers": lambda h: _implied_layers(h)["no_rope_layers"],
        "layer_types": lambda h: _implied_layers(h)["layer_types"],
    },
    rope_types=ROPE_TYPES,
    window=True,
    generated=rope_freqs,
    dims=_dims,
    layers=_layers,
    others=VISION,
    samples={
        "": {
            **_small,
            "num_hidden_layers": 8,
            "interleave_moe_layer_step": 2,
            "vision_config": _vision,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "tied": {**_small, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    },
)
