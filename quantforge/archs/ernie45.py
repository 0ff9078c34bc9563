"""ERNIE 4.5, dense and mixtures of experts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, experts
from .deepseek import DENSE, SHARED
from .keys import METADATA
from .tensors import Config, From, Sizes, Tensor

_llm = gguf.Keys.LLM
_MLP = "model.layers.{bid}.mlp"
_statics = From(_MLP + ".moe_statics.e_score_correction_bias", suffix="")


def _layers(h: Config) -> Sequence[Collection[str]]:
    start, every = h["moe_layer_start_index"], h["moe_layer_interval"]
    return [("moe",) if i >= start and (i + 1) % every == 0 else () for i in range(h["num_hidden_layers"])]


def _dims(h: Config, _: int | None) -> Sizes:
    return {"experts": h["moe_num_experts"], "shared_ff": h["moe_intermediate_size"] * h["moe_num_shared_experts"]}


def _computed(h: Config) -> Mapping[str, Any]:
    last = h["num_hidden_layers"] - 1
    if h.get("moe_layer_end_index", -1) not in (-1, last):
        raise UnsupportedError(
            f"config.json: moe_layer_end_index = {h['moe_layer_end_index']}: in llama.cpp it is the last layer"
        )
    return {_llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: h["moe_intermediate_size"] * h["moe_num_shared_experts"]}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {"moe_layer_end_index": int(get(_llm.BLOCK_COUNT)) - 1}


_defaults = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
_implied = {"hidden_act": "silu", "use_bias": False}
_moe = dict(DECODER) | DENSE | experts(where="moe")
_moe |= {r: replace(t, when="moe_num_shared_experts") for r, t in SHARED.items()}

ARCH = (
    Arch(
        hf=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        name="ernie4_5",
        tensors=DECODER,
        scale_groups=DECODER_SCALE_GROUPS,
        defaults={**_defaults, "num_key_value_heads": 2},
        metadata_keys=METADATA,
        implied=_implied,
        samples={"": {"head_dim": 32}, "tied": {"tie_word_embeddings": True, "head_dim": 16}},
    ),
    Arch(
        hf=("Ernie4_5_MoeForCausalLM",),
        name="ernie4_5-moe",
        model_type="ernie4_5_moe",
        tensors=_moe | {"exp_probs_b": Tensor(("1", "experts"), _statics, where="moe", suffix=".bias")},
        defaults={
            **_defaults,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        metadata_keys={
            **METADATA,
            _llm.EXPERT_COUNT: ("moe_num_experts", int),
            _llm.EXPERT_USED_COUNT: ("moe_k", int),
            _llm.INTERLEAVE_MOE_LAYER_STEP: ("moe_layer_interval", int),
            _llm.LEADING_DENSE_BLOCK_COUNT: ("moe_layer_start_index", int),
            _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
            _llm.EXPERT_SHARED_COUNT: ("moe_num_shared_experts", int),
        },
        computed=_computed,
        restored=_restored,
        implied={**_implied, "moe_norm_min": 1e-12},
        dims=_dims,
        layers=_layers,
        samples={
            "": {
                "head_dim": 32,
                "moe_num_experts": 5,
                "moe_k": 2,
                "moe_num_shared_experts": 2,
                "moe_intermediate_size": 32,
                "moe_layer_start_index": 2,
            },
        },
    ),
)
