"""GLM-4.5 and later: experts chosen by sigmoid and a bias, a shared one, half of each head rotated."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .deepseek import DENSE, OUTSIDE, PROBS_BIAS, SHARED, first_dense
from .keys import METADATA
from .minimax_m2 import restored_rotation, rotated
from .nextn import NEXTN, beyond
from .tensors import Config, Sizes, Tensor

_K = gguf.Keys
_llm = _K.LLM


def _layers(h: Config) -> Sequence[Collection[str]]:
    trunk = [("moe",) if i >= first_dense(h) else () for i in range(h["num_hidden_layers"])]
    return [*trunk, *[("moe", "nextn")] * h.get("nextn", 0)]


def _dims(h: Config, _: int | None) -> Sizes:
    return {"shared_ff": h["moe_intermediate_size"] * h["n_shared_experts"]}


def _computed(h: Config) -> Mapping[str, Any]:
    return {
        _llm.LEADING_DENSE_BLOCK_COUNT: first_dense(h),
        _llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
        _K.Rope.DIMENSION_COUNT: rotated(h, 0.5),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {**restored_rotation(get), "n_shared_experts": int(get(_llm.EXPERT_SHARED_COUNT))}


_small = {
    "head_dim": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.5,
}

ARCH = Arch(
    hf=("Glm4MoeForCausalLM",),
    name="glm4moe",
    model_type="glm4_moe",
    tensors=OUTSIDE
    | {r: replace(DECODER[r], bias="attention_bias") for r in ("attn_q", "attn_k", "attn_v")}
    | {"attn_output": DECODER["attn_output"]}
    | {r: replace(t, when="use_qk_norm") for r, t in QK_NORM.items()}
    | {"post_attention_norm": Tensor(("embd",), "model.layers.{bid}.post_attention_layernorm")}
    | DENSE
    | experts(where="moe")
    | PROBS_BIAS
    | SHARED
    | NEXTN,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "attention_bias": False,
    },
    metadata_keys={
        **METADATA,
        _K.Attention.KEY_LENGTH: ("key_length", int),
        _K.Attention.VALUE_LENGTH: ("key_length", int),
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_GROUP_USED_COUNT: ("topk_group", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("n_shared_experts", int),
        _llm.LEADING_DENSE_BLOCK_COUNT: ("first_k_dense_replace", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
        _llm.EXPERT_WEIGHTS_NORM: ("norm_topk_prob", bool),
    },
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu"},
    dims=_dims,
    layers=_layers,
    nextn=beyond,
    partial_rotary=True,
    samples={
        "": {**_small, "use_qk_norm": True, "attention_bias": True},
        "tied": {
            **_small,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
        },
    },
)
