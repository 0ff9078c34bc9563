"""HunYuan V1, dense and mixtures of experts: norms on rotated queries and keys, one shared expert."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, experts
from .keys import METADATA
from .tensors import Config, ScaleGroup, Tensor

_K = gguf.Keys
_LAYER = "model.layers.{bid}."
_MLP = _LAYER + "mlp"
_norms = {
    "attn_q_norm": Tensor(("head",), _LAYER + "self_attn.query_layernorm"),
    "attn_k_norm": Tensor(("head",), _LAYER + "self_attn.key_layernorm"),
}


def _frequency(h: Config) -> Mapping[str, Any]:
    """alpha is part of the base of rotary frequencies: it is not scaled further with the context."""
    alpha, dim = h["rope"].get("alpha"), h["key_length"]
    if h["rope"]["rope_type"] != "dynamic":
        return {}
    if not alpha or h["rope"].get("factor", 1.0) != 1.0:
        raise UnsupportedError(
            "config.json: dynamic rope scaling without alpha, or with a factor, does not fit this architecture"
        )
    return {_K.Rope.FREQ_BASE: h["rope"]["rope_theta"] * alpha ** (dim / (dim - 2))}


def _one(h: Config, key: str) -> int:
    """A number that configs may have for each layer. Raises UnsupportedError where layers differ."""
    given = h[key]
    numbers = given if isinstance(given, list) else [given]
    if len(set(numbers)) != 1:
        raise UnsupportedError(f"config.json: {key} = {given}: llama.cpp has one number for all layers")
    return int(numbers[0])


def _computed(h: Config) -> Mapping[str, Any]:
    return {
        **_frequency(h),
        _K.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: h["intermediate_size"],
        _K.LLM.EXPERT_FEED_FORWARD_LENGTH: h["intermediate_size"],
        _K.LLM.EXPERT_USED_COUNT: _one(h, "moe_topk"),
        _K.LLM.EXPERT_SHARED_COUNT: _one(h, "num_shared_expert"),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {"moe_topk": int(get(_K.LLM.EXPERT_USED_COUNT)), "num_shared_expert": int(get(_K.LLM.EXPERT_SHARED_COUNT))}


_alpha = {"rope_type": "dynamic", "rope_theta": 5000.0, "alpha": 20.0, "factor": 1.0}
_implied = {"hidden_act": "silu", "attention_bias": False, "use_qk_norm": True}
_dense = {role: t for role, t in DECODER.items() if role not in ("ffn_gate", "ffn_up", "ffn_down")}

ARCH = (
    Arch(
        hf=("HunYuanDenseV1ForCausalLM",),
        name="hunyuan-dense",
        model_type="hunyuan_v1_dense",
        tensors=DECODER | _norms,
        scale_groups=DECODER_SCALE_GROUPS,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        metadata_keys=METADATA,
        computed=_frequency,
        implied=_implied,
        rope_types=frozenset({"default", "dynamic"}),
        samples={"": {"head_dim": 32, "rope_parameters": _alpha}, "tied": {"tie_word_embeddings": True, "head_dim": 16}},
    ),
    Arch(
        hf=("HunYuanMoEV1ForCausalLM",),
        name="hunyuan-moe",
        model_type="hunyuan_v1_moe",
        tensors=_dense
        | _norms
        | experts(router="gate.wg")
        | {
            "ffn_gate_shexp": Tensor(("ff", "embd"), _MLP + ".shared_mlp.gate_proj"),
            "ffn_up_shexp": Tensor(("ff", "embd"), _MLP + ".shared_mlp.up_proj"),
            "ffn_down_shexp": Tensor(("embd", "ff"), _MLP + ".shared_mlp.down_proj"),
        },
        scale_groups=(ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")), ScaleGroup("attn_v", ("attn_output",))),
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "num_experts": 1,
            "moe_topk": 1,
            "num_shared_expert": 1,
        },
        metadata_keys={**METADATA, _K.LLM.EXPERT_COUNT: ("num_experts", int)},
        computed=_computed,
        restored=_restored,
        implied=_implied | {"moe_intermediate_size": lambda h: h["intermediate_size"]},
        rope_types=frozenset({"default", "dynamic"}),
        samples={
            "": {"head_dim": 32, "num_experts": 5, "moe_topk": 2, "rope_parameters": _alpha},
            "tied": {"head_dim": 16, "num_experts": 4, "moe_topk": 3, "tie_word_embeddings": True},
        },
    ),
)
