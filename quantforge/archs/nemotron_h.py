"""Nemotron-H with experts: Mamba-2, attention without positions, and experts of squared ReLU, each in layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .tensors import Config, From, Sizes, Tensor
from .weight import MINUS_EXP

_K = gguf.Keys
_llm, _att, _ssm = _K.LLM, _K.Attention, _K.SSM
_LAYER = "backbone.layers.{bid}."
_MIXER = _LAYER + "mixer."
_KINDS = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "M": "mamba",
    "full_attention": "attention",
    "attention": "attention",
    "*": "attention",
    "moe": "moe",
    "E": "moe",
}


def _given(h: Config) -> Sequence[str]:
    kinds: Sequence[str] = h.get("layers_block_type") or h.get("layer_types") or h.get("hybrid_override_pattern") or ()
    return kinds


def _layers(h: Config) -> Sequence[Collection[str]]:
    """mamba, attention and moe layers. Raises UnsupportedError for others."""
    given = _given(h)
    if len(given) != h["num_hidden_layers"]:
        raise UnsupportedError("config.json: layers_block_type does not name the kind of each of num_hidden_layers")
    for kind in given:
        if kind not in _KINDS:
            raise UnsupportedError(f"config.json: layers_block_type {kind!r}: Nemotron-H is supported with experts only")
    return [(_KINDS[kind],) for kind in given]


def _dims(h: Config, _: int | None) -> Sizes:
    heads, groups, state = h["mamba_num_heads"], h["n_groups"], h["ssm_state_size"]
    inner = heads * h["mamba_head_dim"]
    return {
        "inner": inner,
        "ssm_heads": heads,
        "groups": groups,
        "of_group": inner // groups,
        "mixed": inner + 2 * groups * state,
        "kernel": h["conv_kernel"],
        "shared_ff": h["moe_shared_expert_intermediate_size"],
    }


def _computed(h: Config) -> Mapping[str, Any]:
    kinds = [k for (k,) in _layers(h)]
    low, high = h.get("time_step_limit") or (0.0, float("inf"))
    if low != 0 or high not in (float("inf"), {"__float__": "Infinity"}):
        raise UnsupportedError(f"config.json: time_step_limit = [{low}, {high}]: llama.cpp sets no limits")
    return {
        _llm.FEED_FORWARD_LENGTH: [h["moe_intermediate_size"] if k == "moe" else 0 for k in kinds],
        _att.HEAD_COUNT_KV: [h["num_key_value_heads"] if k == "attention" else 0 for k in kinds],
        _ssm.CONV_KERNEL: h["conv_kernel"],
        _ssm.STATE_SIZE: h["ssm_state_size"],
        _ssm.GROUP_COUNT: h["n_groups"],
        _ssm.INNER_SIZE: h["mamba_num_heads"] * h["mamba_head_dim"],
        _ssm.TIME_STEP_RANK: h["mamba_num_heads"],
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    kv, ff, heads = get(_att.HEAD_COUNT_KV), get(_llm.FEED_FORWARD_LENGTH), int(get(_ssm.TIME_STEP_RANK))
    pairs = [(int(n), int(w)) for n, w in zip(kv, ff, strict=True)]
    return {
        "layers_block_type": ["full_attention" if n else "moe" if w else "linear_attention" for n, w in pairs],
        "num_key_value_heads": max(n for n, _ in pairs),
        "conv_kernel": int(get(_ssm.CONV_KERNEL)),
        "ssm_state_size": int(get(_ssm.STATE_SIZE)),
        "n_groups": int(get(_ssm.GROUP_COUNT)),
        "mamba_num_heads": heads,
        "mamba_head_dim": int(get(_ssm.INNER_SIZE)) // heads,
    }


def _vector(name: str) -> From:
    return From(_MIXER + name, ("ssm_heads",), suffix="")


ARCH = Arch(
    hf=("NemotronHForCausalLM",),
    name="nemotron_h_moe",
    model_type="nemotron_h",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "backbone.embeddings"),
        "output_norm": Tensor(("embd",), "backbone.norm_f"),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        "attn_norm": Tensor(("embd",), _LAYER + "norm"),
        "ssm_in": Tensor(("inner+mixed+ssm_heads", "embd"), _MIXER + "in_proj", where="mamba"),
        "ssm_conv1d": Tensor(("mixed", "kernel"), From(_MIXER + "conv1d", ("mixed", "1", "kernel")), bias=True, where="mamba"),
        "ssm_dt": Tensor(("ssm_heads",), _vector("dt_bias"), where="mamba", suffix=".bias"),
        "ssm_a": Tensor(("ssm_heads", "1"), _vector("A_log"), where="mamba", suffix="", value=MINUS_EXP),
        "ssm_d": Tensor(("ssm_heads", "1"), _vector("D"), where="mamba", suffix=""),
        "ssm_norm": Tensor(("groups", "of_group"), From(_MIXER + "norm", ("inner",)), where="mamba"),
        "ssm_out": Tensor(("embd", "inner"), _MIXER + "out_proj", where="mamba"),
        "attn_q": Tensor(("q", "embd"), _MIXER + "q_proj", where="attention"),
        "attn_k": Tensor(("kv", "embd"), _MIXER + "k_proj", where="attention"),
        "attn_v": Tensor(("kv", "embd"), _MIXER + "v_proj", where="attention"),
        "attn_output": Tensor(("embd", "q"), _MIXER + "o_proj", where="attention"),
        "ffn_gate_inp": Tensor(("experts", "embd"), _MIXER + "gate", where="moe"),
        "exp_probs_b": Tensor(
            ("experts",), From(_MIXER + "gate.e_score_correction_bias", suffix=""), where="moe", suffix=".bias"
        ),
        "ffn_up_exps": Tensor(
            ("experts", "expert_ff", "embd"),
            _MIXER + "experts.{eid}.up_proj",
            where="moe",
            also=(From(_MIXER + "experts.up_proj", suffix=""),),
        ),
        "ffn_down_exps": Tensor(
            ("experts", "embd", "expert_ff"),
            _MIXER + "experts.{eid}.down_proj",
            where="moe",
            also=(From(_MIXER + "experts.down_proj", suffix=""),),
        ),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MIXER + "shared_experts.up_proj", where="moe"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MIXER + "shared_experts.down_proj", where="moe"),
    },
    defaults={
        "num_hidden_layers": lambda given: len(_given(given)),
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "conv_kernel": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "norm_topk_prob": True,
        "intermediate_size": 21504,
    },
    metadata_keys={
        _llm.BLOCK_COUNT: ("num_hidden_layers", int),
        _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _att.HEAD_COUNT: ("num_attention_heads", int),
        _att.LAYERNORM_EPS: ("layer_norm_epsilon", float),
        _att.KEY_LENGTH: ("head_dim", int),
        _att.VALUE_LENGTH: ("head_dim", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("moe_shared_expert_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("n_shared_experts", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_WEIGHTS_NORM: ("norm_topk_prob", bool),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "moe_latent_size": None,
        "n_group": 1,
        "topk_group": 1,
    },
    needed=("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    rope_types=frozenset(),
    dims=_dims,
    layers=_layers,
    samples={
        "": {
            "num_hidden_layers": 6,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "full_attention"],
            "initializer_range": 0.1,
            "head_dim": 32,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "routed_scaling_factor": 1.5,
        }
    },
)
