"""Hunyuan 3: experts chosen by sigmoid and a bias, a shared one, dense first layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .deepseek import DENSE, first_dense
from .keys import METADATA
from .nextn import NEXTN, beyond
from .tensors import Config, From, Sizes, Tensor

_llm = gguf.Keys.LLM
_LAYER = "model.layers.{bid}."
_MLP = _LAYER + "mlp"


def _with_types(h: Config) -> Config:
    dense = ["dense"] + ["sparse"] * (h["num_hidden_layers"] - 1)
    return {**h, "mlp_layer_types": h.get("mlp_layer_types") or dense}


def _layers(h: Config) -> Sequence[Collection[str]]:
    trunk = [("moe",) if i >= first_dense(_with_types(h)) else () for i in range(h["num_hidden_layers"])]
    return [*trunk, *[("moe", "nextn")] * h.get("nextn", 0)]


def _dims(h: Config, _: int | None) -> Sizes:
    return {"shared_ff": h["moe_intermediate_size"] * h["num_shared_experts"]}


def _computed(h: Config) -> Mapping[str, Any]:
    return {
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: h["moe_intermediate_size"] * h["num_shared_experts"],
        _llm.EXPERT_WEIGHTS_NORM: True,
        _llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
        # for the way back: llama.cpp sees which layers have which tensors
        _llm.LEADING_DENSE_BLOCK_COUNT: first_dense(_with_types(h)),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    dense = get(_llm.LEADING_DENSE_BLOCK_COUNT)
    dense = 1 if dense is None else int(dense)
    trunk = int(get(_llm.BLOCK_COUNT)) - int(get(_llm.NEXTN_PREDICT_LAYERS) or 0)
    return {
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (trunk - dense),
        "num_shared_experts": int(get(_llm.EXPERT_SHARED_FEED_FORWARD_LENGTH)) // int(get(_llm.EXPERT_FEED_FORWARD_LENGTH)),
    }


ARCH = Arch(
    hf=("HYV3ForCausalLM",),
    name="hy_v3",
    tensors=dict(DECODER)
    | QK_NORM
    | DENSE
    | experts(where="moe", router="router.gate")
    | {
        "exp_probs_b": Tensor(("experts",), From(_MLP + ".expert_bias", suffix=""), where="moe", suffix=""),
        "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_mlp.gate_proj", where="moe"),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_mlp.up_proj", where="moe"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MLP + ".shared_mlp.down_proj", where="moe"),
    }
    | NEXTN
    | {"nextn.shared_head_norm": replace(NEXTN["nextn.shared_head_norm"], checkpoint=_LAYER + "final_layernorm")},
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11158840.0,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
    },
    metadata_keys={
        **METADATA,
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("router_scaling_factor", float),
    },
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "route_norm": True, "qk_norm": True},
    aliases={"num_experts": "num_local_experts"},
    dims=_dims,
    layers=_layers,
    nextn=beyond,
    samples={
        "": {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "moe_intermediate_size": 32,
            "router_scaling_factor": 1.5,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        }
    },
)
