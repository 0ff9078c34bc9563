"""Cohere's mixtures of experts: Command-R7B with dense layers first, then experts, and shared ones averaged with these."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, experts
from .keys import EXPERTS_OF_WHICH_SOME, METADATA
from .tensors import Config, Tensor
from .windows import restored_types, usual_types, window_pattern

_att, _llm, _rp = gguf.Keys.Attention, gguf.Keys.LLM, gguf.Keys.Rope
_SHARED = "model.layers.{bid}.mlp.shared_experts."
_GATING = {"softmax": gguf.ExpertGatingFuncType.SOFTMAX.value, "sigmoid": gguf.ExpertGatingFuncType.SIGMOID.value}


def _is_dense(h: Config) -> list[bool]:
    layers, first = h["num_hidden_layers"], h.get("first_k_dense_replace", 0)
    return [kind == "dense" for kind in h.get("mlp_layer_types") or ["dense"] * first + ["sparse"] * (layers - first)]


def _layers(h: Config) -> Sequence[Collection[str]]:
    shared = {"shared"} if h["num_shared_experts"] else set()
    return [{"dense"} if dense else {"experts"} | shared for dense in _is_dense(h)]


def _types(h: Config) -> list[str]:
    first = sum(_is_dense(h))
    usual = ["full_attention"] * first + usual_types(h["num_hidden_layers"] - first, h["sliding_window_pattern"])
    return h.get("layer_types") or usual


def _computed(h: Config) -> dict[str, Any]:
    dense, scoring = _is_dense(h), h["expert_selection_fn"]
    if dense != sorted(dense, reverse=True):
        raise UnsupportedError("config.json: mlp_layer_types: llama.cpp runs cohere2moe models with dense layers first")
    if scoring not in _GATING:
        raise UnsupportedError(f"config.json: expert_selection_fn = {scoring!r} is not softmax or sigmoid")
    shared = h["num_shared_experts"]
    keys = {
        _llm.FEED_FORWARD_LENGTH: h.get("prefix_dense_intermediate_size") or h["intermediate_size"],
        _llm.EXPERT_FEED_FORWARD_LENGTH: h["intermediate_size"],
        _llm.LEADING_DENSE_BLOCK_COUNT: sum(dense),
        _llm.EXPERT_GATING_FUNC: _GATING[scoring],
        # a softmax over those that are chosen is one over all, normalized
        _llm.EXPERT_WEIGHTS_NORM: scoring == "softmax" or h["norm_topk_prob"],
        _rp.SCALING_TYPE: "none",
        **window_pattern({**h, "layer_types": _types(h)}, 4),
    }
    if shared:
        keys |= {
            _llm.EXPERT_SHARED_COUNT: shared,
            _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: h["intermediate_size"] * shared,
        }
    return keys


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    layers, first = int(get(_llm.BLOCK_COUNT)), int(get(_llm.LEADING_DENSE_BLOCK_COUNT) or 0)
    softmax = get(_llm.EXPERT_GATING_FUNC) == _GATING["softmax"]
    return {
        "layer_types": restored_types(get, 4),
        "mlp_layer_types": ["dense"] * first + ["sparse"] * (layers - first),
        "intermediate_size": int(get(_llm.EXPERT_FEED_FORWARD_LENGTH)),
        "prefix_dense_intermediate_size": int(get(_llm.FEED_FORWARD_LENGTH)),
        "num_shared_experts": int(get(_llm.EXPERT_SHARED_COUNT) or 0),
        "expert_selection_fn": "softmax" if softmax else "sigmoid",
        "norm_topk_prob": bool(get(_llm.EXPERT_WEIGHTS_NORM)),
    }


def _dims(h: Config, layer: int | None) -> dict[str, int]:
    return {
        "ff": h.get("prefix_dense_intermediate_size") or h["intermediate_size"],
        "expert_ff": h["intermediate_size"],
        "shared_ff": h["intermediate_size"] * h["num_shared_experts"],
    }


ARCH = Arch(
    hf=("Cohere2MoeForCausalLM",),
    name="cohere2moe",
    model_type="cohere2_moe",
    tensors={
        role: replace(t, where="dense") if role in ("ffn_gate", "ffn_up", "ffn_down") else t
        for role, t in DECODER.items()
        if role != "ffn_norm"
    }
    | experts(where="experts")
    | {
        "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _SHARED + "gate_proj", where="shared"),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _SHARED + "up_proj", where="shared"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _SHARED + "down_proj", where="shared"),
    },
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    aliases={"num_local_experts": "num_experts"},
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] not in ("rms_norm_eps", "intermediate_size")},
        _att.LAYERNORM_EPS: ("layer_norm_eps", float),
        _llm.LOGIT_SCALE: ("logit_scale", float),
        _att.SLIDING_WINDOW: ("sliding_window", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _rp.DIMENSION_COUNT: ("key_length", int),
        **EXPERTS_OF_WHICH_SOME,
        _llm.EXPERT_COUNT: ("num_experts", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": None,
        "shared_expert_combination_strategy": "average",
        "prefix_dense_sliding_window_pattern": 1,  # the graph rotates all dense layers
        "num_nextn_predict_layers": None,
    },
    dims=_dims,
    layers=_layers,
    rope_types=frozenset({"default"}),
    window=True,
    samples={
        "": {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "logit_scale": 0.5,
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention"] * 3,
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
            "prefix_dense_intermediate_size": 80,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
        "sigmoid": {
            "head_dim": 16,
            "logit_scale": 0.5,
            "sliding_window": 48,
            "num_experts": 3,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
        },
    },
)
