"""DeepSeek-V2 and V3, GLM-4.7-Flash, and Youtu, which is dense: low-rank attention, shared and routed experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..arrays import shortest
from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, experts
from .nextn import NEXTN, beyond
from .rope import rope_metadata, rope_scaling
from .tensors import Config, From, Sizes, Tensor, part

_K = gguf.Keys
_llm, _att = _K.LLM, _K.Attention
_LAYER = "model.layers.{bid}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp"


def _kv_b(which: int) -> From:
    """Keys' or values' rows of each head."""
    groups = "" if which else "heads"  # keys are transposed: llama.cpp multiplies queries by them
    both = ("heads*nope+heads*v", "kv_lora")
    return From(_ATTENTION + "kv_b_proj", both, part(which, "nope", "v", per="heads"), groups=groups)


LOW_RANK = {
    "attn_q": Tensor(("heads*nope+heads*rope", "embd"), _ATTENTION + "q_proj", where="!low_rank"),
    "attn_q_a": Tensor(("q_lora", "embd"), _ATTENTION + "q_a_proj", where="low_rank"),
    "attn_q_a_norm": Tensor(("q_lora",), _ATTENTION + "q_a_layernorm", where="low_rank"),
    "attn_q_b": Tensor(("heads*nope+heads*rope", "q_lora"), _ATTENTION + "q_b_proj", where="low_rank"),
    "attn_kv_a_mqa": Tensor(("kv_lora+rope", "embd"), _ATTENTION + "kv_a_proj_with_mqa"),
    "attn_kv_a_norm": Tensor(("kv_lora",), _ATTENTION + "kv_a_layernorm"),
    "attn_k_b": Tensor(("heads", "kv_lora", "nope"), _kv_b(0)),
    "attn_v_b": Tensor(("heads", "v", "kv_lora"), _kv_b(1)),
    "attn_output": Tensor(("embd", "heads*v"), _ATTENTION + "o_proj"),
}
"""Attention whose keys and values, and perhaps queries, go through a narrow waist."""

DENSE = {r: replace(DECODER[r], where="!moe") for r in ("ffn_gate", "ffn_up", "ffn_down")}
SHARED = {
    "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_experts.gate_proj", where="moe", when="n_shared_experts"),
    "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_experts.up_proj", where="moe", when="n_shared_experts"),
    "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MLP + ".shared_experts.down_proj", where="moe", when="n_shared_experts"),
}
PROBS_BIAS = {
    "exp_probs_b": Tensor(("experts",), From(_MLP + ".gate.e_score_correction_bias", suffix=""), where="moe", suffix=".bias")
}
OUTSIDE = {r: DECODER[r] for r in ("token_embd", "output_norm", "output", "attn_norm")}


def dims(h: Config, _: int | None) -> Sizes:
    """Sizes of low-rank attention and of the shared experts."""
    return {
        "nope": h["qk_nope_head_dim"],
        "rope": h["qk_rope_head_dim"],
        "v": h["v_head_dim"],
        "q_lora": h.get("q_lora_rank") or 0,
        "kv_lora": h["kv_lora_rank"],
        "shared_ff": h["moe_intermediate_size"] * h["n_shared_experts"],
    }


def layers(h: Config) -> Sequence[Collection[str]]:
    """moe and dense layers; all low_rank, or none."""
    rank = ("low_rank",) if h.get("q_lora_rank") else ()
    trunk = h["num_hidden_layers"]
    kinds: list[Collection[str]] = [("moe", *rank) if i >= first_dense(h) else rank for i in range(trunk)]
    return kinds + [("moe", "nextn", *rank)] * h.get("nextn", 0)


def first_dense(h: Config) -> int:
    """The number of dense layers. Raises UnsupportedError where they are not the first ones."""
    types = h.get("mlp_layer_types")
    if types is None:
        return int(h["first_k_dense_replace"])
    dense = types.index("sparse") if "sparse" in types else len(types)
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise UnsupportedError("config.json: mlp_layer_types: dense layers that are not the first ones do not exist in llama.cpp")
    return int(dense)


def _computed(sigmoid: bool) -> Callable[[Config], Mapping[str, Any]]:
    def computed(h: Config) -> Mapping[str, Any]:
        rope = dict(h["rope"])
        keys = rope_metadata(rope)
        keys.pop(_K.Rope.SCALING_ATTN_FACTOR, None)
        if rope["rope_type"] == "yarn":
            if not rope.get("mscale_all_dim") or rope.get("mscale", 1.0) != rope["mscale_all_dim"] or "attention_factor" in rope:
                raise UnsupportedError(
                    f"config.json: yarn rope scaling needs mscale = mscale_all_dim, and no attention_factor: llama.cpp runs "
                    f"deepseek2 models only so; they are {rope.get('mscale')} and {rope.get('mscale_all_dim')}"
                )
            keys[_K.Rope.SCALING_YARN_LOG_MUL] = 0.1 * rope["mscale_all_dim"]
        gating = gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        groups = {"n_group": _llm.EXPERT_GROUP_COUNT, "topk_group": _llm.EXPERT_GROUP_USED_COUNT}
        keys |= {
            **{name: h[key] for key, name in groups.items() if h.get(key) is not None},
            _llm.EXPERT_GATING_FUNC: gating.value,
            _att.HEAD_COUNT_KV: 1,  # all heads read one narrow key
            _llm.LEADING_DENSE_BLOCK_COUNT: first_dense(h),
            _att.KEY_LENGTH: h["kv_lora_rank"] + h["qk_rope_head_dim"],
            _att.VALUE_LENGTH: h["kv_lora_rank"],
            _att.KEY_LENGTH_MLA: h["qk_nope_head_dim"] + h["qk_rope_head_dim"],
            _att.VALUE_LENGTH_MLA: h["v_head_dim"],
            _K.Rope.DIMENSION_COUNT: h["qk_rope_head_dim"],
        }
        if h.get("q_lora_rank"):
            keys[_att.Q_LORA_RANK] = h["q_lora_rank"]
        if h["norm_topk_prob"]:
            keys[_llm.EXPERT_WEIGHTS_NORM] = True
        return keys

    return computed


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    rotated, dense = int(get(_K.Rope.DIMENSION_COUNT)), int(get(_llm.LEADING_DENSE_BLOCK_COUNT) or 0)
    rope, scale = rope_scaling(get), get(_K.Rope.SCALING_YARN_LOG_MUL)
    if rope and scale:
        both = round(shortest(scale) * 10, 6)
        rope = {**rope, "mscale": both, "mscale_all_dim": both}
    count = int(get(_llm.BLOCK_COUNT)) - int(get(_llm.NEXTN_PREDICT_LAYERS) or 0)
    rank, groups, used = get(_att.Q_LORA_RANK), get(_llm.EXPERT_GROUP_COUNT), get(_llm.EXPERT_GROUP_USED_COUNT)
    return {
        "rope_scaling": rope,
        "head_dim": rotated,
        "num_key_value_heads": int(get(_att.HEAD_COUNT)),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": int(get(_att.KEY_LENGTH_MLA)) - rotated,
        "v_head_dim": int(get(_att.VALUE_LENGTH_MLA)),
        "q_lora_rank": None if rank is None else int(rank),
        "norm_topk_prob": bool(get(_llm.EXPERT_WEIGHTS_NORM)),
        "first_k_dense_replace": dense,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (count - dense),
        "n_group": None if groups is None else int(groups),
        "topk_group": None if used is None else int(used),
        "n_shared_experts": int(get(_llm.EXPERT_SHARED_COUNT)),
    }


def _is_sigmoid(get: Callable[[str], Any]) -> bool:
    return bool(get(_llm.EXPERT_GATING_FUNC) == gguf.ExpertGatingFuncType.SIGMOID.value)


_small = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.5,
}
_yarn = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.8,
    "mscale_all_dim": 0.8,
}

_v2 = Arch(
    hf=("DeepseekV2ForCausalLM",),
    name="deepseek2",
    model_type="deepseek_v2",
    tensors=OUTSIDE | LOW_RANK | {"ffn_norm": DECODER["ffn_norm"]} | DENSE | experts(where="moe") | SHARED | NEXTN,
    defaults={
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1407,
    },
    metadata_keys={
        _llm.BLOCK_COUNT: ("num_hidden_layers", int),
        _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _llm.FEED_FORWARD_LENGTH: ("intermediate_size", int),
        _att.HEAD_COUNT: ("num_attention_heads", int),
        _att.LAYERNORM_RMS_EPS: ("rms_norm_eps", float),
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _att.KV_LORA_RANK: ("kv_lora_rank", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("n_shared_experts", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
    },
    computed=_computed(sigmoid=False),
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "moe_layer_freq": 1,
    },
    dims=dims,
    layers=layers,
    nextn=beyond,
    samples={
        "": _small,
        "lite": {
            **_small,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 26,  # llama.cpp tells models without a waist for queries by their number of layers
            "initializer_range": 0.1,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "rope_parameters": _yarn,
        },
    },
)

_v3 = replace(
    _v2,
    hf=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    tensors=dict(_v2.tensors) | PROBS_BIAS,
    defaults={
        **_v2.defaults,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "moe_intermediate_size": 2048,
    },
    computed=_computed(sigmoid=True),
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    told_by=_is_sigmoid,
    samples={
        "": {**_small, "n_routed_experts": 9, "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2, "rope_parameters": _yarn},
        "tied": {
            **_small,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    },
)
_glm_lite = replace(
    _v3,
    hf=("Glm4MoeLiteForCausalLM",),
    model_type="glm4_moe_lite",
    defaults={
        **_v3.defaults,
        "max_position_embeddings": 202752,
        "num_key_value_heads": 20,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "q_lora_rank": 768,
        "v_head_dim": 256,
        "qk_nope_head_dim": 192,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1536,
        "rms_norm_eps": 1e-5,
    },
    told_by=lambda get: _is_sigmoid(get) and get(_llm.VOCAB_SIZE) == 154880,
    samples={
        "": {
            **_small,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        }
    },
)

_EXPERT_KEYS = (_llm.EXPERT_COUNT, _llm.EXPERT_USED_COUNT, _llm.EXPERT_WEIGHTS_SCALE)
_youtu = replace(
    _v2,
    hf=("YoutuForCausalLM",),
    model_type="youtu",
    tensors=OUTSIDE | LOW_RANK | {"ffn_norm": DECODER["ffn_norm"]} | DENSE,
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 16,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "n_shared_experts": 0,
        "first_k_dense_replace": lambda given: given.get("num_hidden_layers"),
        "moe_intermediate_size": lambda given: given.get("intermediate_size"),
    },
    metadata_keys={k: v for k, v in _v2.metadata_keys.items() if k not in _EXPERT_KEYS},
    implied={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleave": True},
    nextn=None,
    told_by=lambda get: not get(_llm.EXPERT_COUNT),
    samples={
        "": {k: v for k, v in _small.items() if k.endswith(("dim", "rank", "heads"))},
        "tied": {
            **{k: v for k, v in _small.items() if k.endswith(("dim", "rank", "heads"))},
            "tie_word_embeddings": True,
            "rope_parameters": _yarn,
        },
    },
)

ARCH = (_v2, _v3, _glm_lite, _youtu)
