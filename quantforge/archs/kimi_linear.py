"""Kimi Linear: delta nets whose decay is one number for each channel, between layers of low-rank attention without positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, experts
from .deepseek import DENSE, LOW_RANK, OUTSIDE, first_dense
from .tensors import Config, From, Sizes, Tensor
from .weight import MINUS_EXP

_K = gguf.Keys
_llm, _att = _K.LLM, _K.Attention
_ATTENTION = "model.layers.{bid}.self_attn."
_MLP = "model.layers.{bid}.block_sparse_moe"

_linear = {
    "attn_q": Tensor(("linear", "embd"), _ATTENTION + "q_proj"),
    "attn_k": Tensor(("linear", "embd"), _ATTENTION + "k_proj"),
    "attn_v": Tensor(("linear", "embd"), _ATTENTION + "v_proj"),
    "attn_output": Tensor(("embd", "linear"), _ATTENTION + "o_proj"),
    **{f"ssm_conv1d_{x}": Tensor(("linear", "1", "kernel"), f"{_ATTENTION}{x}_conv1d") for x in ("q", "k", "v")},
    "ssm_f_a": Tensor(("linear_head", "embd"), _ATTENTION + "f_a_proj"),
    "ssm_f_b": Tensor(("linear", "linear_head"), _ATTENTION + "f_b_proj"),
    "ssm_g_a": Tensor(("linear_head", "embd"), _ATTENTION + "g_a_proj"),
    "ssm_g_b": Tensor(("linear", "linear_head"), _ATTENTION + "g_b_proj"),
    "ssm_beta": Tensor(("heads", "embd"), _ATTENTION + "b_proj"),
    "ssm_a": Tensor(("heads", "1"), From(_ATTENTION + "A_log", ("1", "1", "heads", "1"), suffix=""), suffix="", value=MINUS_EXP),
    "ssm_dt": Tensor(("linear",), From(_ATTENTION + "dt_bias", suffix=""), suffix=".bias"),
    "ssm_norm": Tensor(("linear_head",), _ATTENTION + "o_norm"),
}
_shared = {
    f"ffn_{x}_shexp": Tensor(dims, f"{_MLP}.shared_experts.{x}_proj", where="moe")
    for x, dims in {"gate": ("shared_ff", "embd"), "up": ("shared_ff", "embd"), "down": ("embd", "shared_ff")}.items()
}


def _of_linear(h: Config, key: str) -> Any:
    """A setting of the delta nets, which releases keep in a dict of their own."""
    older = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads", "linear_conv_kernel_dim": "short_conv_kernel_size"}
    return (h.get("linear_attn_config") or {}).get(older[key], h[key])


def _is_linear(h: Config) -> list[bool]:
    count, older = h["num_hidden_layers"], h.get("linear_attn_config") or {}
    if (types := h.get("layer_types")) is not None:
        return [t == "linear_attention" for t in types]
    if "full_attn_layers" in older:  # counted from one
        return [i + 1 not in older["full_attn_layers"] for i in range(count)]
    return [not (i and i % 4 == 0) for i in range(count)]


def _layers(h: Config) -> Sequence[Collection[str]]:
    dense = first_dense(h)
    return [("linear" if linear else "full", *(("moe",) if i >= dense else ())) for i, linear in enumerate(_is_linear(h))]


def _dims(h: Config, _: int | None) -> Sizes:
    head = _of_linear(h, "linear_head_dim")
    return {
        "nope": h["qk_nope_head_dim"],
        "rope": h["qk_rope_head_dim"],
        "v": h["v_head_dim"],
        "kv_lora": h["kv_lora_rank"],
        "linear_head": head,
        "linear": h["num_attention_heads"] * head,
        "kernel": _of_linear(h, "linear_conv_kernel_dim"),
        "shared_ff": h["moe_intermediate_size"] * h["n_shared_experts"],
    }


def _computed(h: Config) -> Mapping[str, Any]:
    if _of_linear(h, "linear_num_heads") != h["num_attention_heads"]:
        raise UnsupportedError(
            f"config.json: linear_num_heads {_of_linear(h, 'linear_num_heads')}: llama.cpp runs kimi-linear models only with as "
            f"many as num_attention_heads, {h['num_attention_heads']}"
        )
    return {
        _att.HEAD_COUNT_KV: [0 if linear else 1 for linear in _is_linear(h)],
        _K.SSM.CONV_KERNEL: _of_linear(h, "linear_conv_kernel_dim"),
        _K.KDA.HEAD_DIM: _of_linear(h, "linear_head_dim"),
        _K.Rope.DIMENSION_COUNT: h["qk_rope_head_dim"],
        _att.KEY_LENGTH: h["kv_lora_rank"] + h["qk_rope_head_dim"],
        _att.KEY_LENGTH_MLA: h["qk_nope_head_dim"] + h["qk_rope_head_dim"],
        _llm.LEADING_DENSE_BLOCK_COUNT: first_dense(h),
        _llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    heads, rope = [int(n) for n in get(_att.HEAD_COUNT_KV)], int(get(_K.Rope.DIMENSION_COUNT))
    dense = int(get(_llm.LEADING_DENSE_BLOCK_COUNT) or 0)
    return {
        "layer_types": ["full_attention" if n else "linear_attention" for n in heads],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (len(heads) - dense),
        "num_key_value_heads": int(get(_att.HEAD_COUNT)),
        "linear_num_heads": int(get(_att.HEAD_COUNT)),
        "linear_head_dim": int(get(_K.KDA.HEAD_DIM)),
        "linear_conv_kernel_dim": int(get(_K.SSM.CONV_KERNEL)),
        "head_dim": rope,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": int(get(_att.KEY_LENGTH_MLA)) - rope,
    }


_small: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "linear_num_heads": 4,
    "linear_head_dim": 32,
    "n_shared_experts": 2,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "initializer_range": 0.06,  # delta nets of larger random numbers are chaotic
    "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
}

ARCH = Arch(
    hf=("KimiLinearForCausalLM",),
    name="kimi-linear",
    model_type="kimi_linear",
    tensors=OUTSIDE
    | {"ffn_norm": DECODER["ffn_norm"]}
    | {r: replace(t, where="full") for r, t in LOW_RANK.items() if "_q_" not in r}
    | {r + ("@linear" if r in LOW_RANK else ""): replace(t, where="linear") for r, t in _linear.items()}
    | {
        r: replace(t, also=(f"{_MLP}.{r.removeprefix('ffn_')}_proj",))  # so transformers saves it
        for r, t in DENSE.items()
    }
    | experts(_MLP, where="moe", words="w1 w3 w2")
    | {"exp_probs_b": Tensor(("experts",), From(_MLP + ".gate.e_score_correction_bias", suffix=""), where="moe", suffix=".bias")}
    | _shared,
    aliases={
        "max_position_embeddings": "model_max_length",
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
    },
    defaults={
        "head_dim": lambda given: given.get("qk_rope_head_dim", 64),
        "max_position_embeddings": 1048576,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "linear_conv_kernel_dim": 4,
        "pad_token_id": None,
    },
    metadata_keys={
        _llm.BLOCK_COUNT: ("num_hidden_layers", int),
        _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _llm.FEED_FORWARD_LENGTH: ("intermediate_size", int),
        _att.HEAD_COUNT: ("num_attention_heads", int),
        _att.LAYERNORM_RMS_EPS: ("rms_norm_eps", float),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _llm.EXPERT_COUNT: ("num_local_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_GROUP_USED_COUNT: ("topk_group", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("n_shared_experts", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
        _att.KV_LORA_RANK: ("kv_lora_rank", int),
        _att.VALUE_LENGTH_MLA: ("v_head_dim", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,  # the graph asks for a head of its own
        "q_lora_rank": None,
        "norm_topk_prob": True,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "moe_layer_freq": 1,
    },
    dims=_dims,
    layers=_layers,
    rope_types=frozenset(),
    samples={
        # the graph adds the norms' epsilon to squares that transformers adds 1e-6 to
        "": {**_small, "rms_norm_eps": 1e-6},
        "groups": {
            **_small,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 1,
            "linear_conv_kernel_dim": 3,
            "routed_scaling_factor": 1.0,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
    },
)
