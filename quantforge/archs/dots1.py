"""dots.llm1: experts chosen by sigmoid and a bias, shared ones, dense first layers."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .deepseek import DENSE, PROBS_BIAS, SHARED, first_dense
from .keys import METADATA
from .tensors import Config, Sizes

_llm = gguf.Keys.LLM


def _dims(h: Config, _: int | None) -> Sizes:
    return {"shared_ff": h["moe_intermediate_size"] * h["n_shared_experts"]}


def _computed(_: Config) -> Mapping[str, Any]:
    return {_llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {"n_shared_experts": int(get(_llm.EXPERT_SHARED_COUNT))}


ARCH = Arch(
    hf=("Dots1ForCausalLM",),
    name="dots1",
    tensors=dict(DECODER) | QK_NORM | DENSE | experts(where="moe") | PROBS_BIAS | SHARED,
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    metadata_keys={
        **METADATA,
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_GROUP_USED_COUNT: ("topk_group", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.LEADING_DENSE_BLOCK_COUNT: ("first_k_dense_replace", int),
        _llm.EXPERT_SHARED_COUNT: ("n_shared_experts", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
        _llm.EXPERT_WEIGHTS_NORM: ("norm_topk_prob", bool),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_key_value_heads": lambda h: h["num_attention_heads"],
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    dims=_dims,
    layers=lambda h: [("moe",) if i >= first_dense(h) else () for i in range(h["num_hidden_layers"])],
    samples={
        "": {
            "head_dim": 32,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
        },
    },
)
