"""Granite 4 and Bamba: layers of attention among Mamba-2 ones, then a mixture of experts or an MLP."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER
from .granite import DEFAULTS, EXPERTS, MULTIPLIERS, shared
from .keys import EXPERTS_OF_WHICH_SOME, PAIRED_METADATA
from .llama import PAIRED
from .tensors import Config, From, Tensor, paired
from .weight import MINUS_EXP

_att, _llm, _ssm, _rp = gguf.Keys.Attention, gguf.Keys.LLM, gguf.Keys.SSM, gguf.Keys.Rope
_MAMBA = "model.layers.{bid}.mamba."
_SELF = "model.layers.{bid}.self_attn."
MAMBA_2 = {
    "ssm_in": Tensor(("2*inner+2*groups*state+ssm_heads", "embd"), _MAMBA + "in_proj"),
    "ssm_conv1d": Tensor(("inner+2*groups*state", "kernel"), From(_MAMBA + "conv1d", ("inner+2*groups*state", "1", "kernel"))),
    "ssm_conv1d.bias": Tensor(("inner+2*groups*state",), From(_MAMBA + "conv1d.bias", suffix=""), suffix=""),
    "ssm_dt.bias": Tensor(("ssm_heads",), From(_MAMBA + "dt_bias", suffix=""), suffix=""),
    "ssm_a": Tensor(("ssm_heads", "1"), From(_MAMBA + "A_log", ("ssm_heads",), suffix=""), suffix="", value=MINUS_EXP),
    "ssm_d": Tensor(("ssm_heads", "1"), From(_MAMBA + "D", ("ssm_heads",), suffix=""), suffix=""),
    "ssm_norm": Tensor(("groups", "inner/groups"), From(_MAMBA + "norm", ("inner",))),
    "ssm_out": Tensor(("embd", "inner"), _MAMBA + "out_proj"),
}


def _kinds(h: Config) -> list[str]:
    """What mixes the tokens of each layer: "attention" or "mamba"."""
    if (listed := h.get("layer_types") or h.get("layers_block_type")) is not None:
        return ["attention" if "attention" in kind and "linear" not in kind else "mamba" for kind in listed]
    return ["attention" if i in (h.get("attn_layer_indices") or ()) else "mamba" for i in range(h["num_hidden_layers"])]


def _layers(h: Config) -> Sequence[Collection[str]]:
    after = "experts" if h.get("num_local_experts") else "dense"
    return [{kind, after} for kind in _kinds(h)]


def _dims(h: Config, layer: int | None) -> dict[str, int]:
    inner = h["mamba_expand"] * h["hidden_size"]
    return {
        "inner": inner,
        "inner/groups": inner // h["mamba_n_groups"],
        "groups": h["mamba_n_groups"],
        "state": h["mamba_d_state"],
        "kernel": h["mamba_d_conv"],
        "ssm_heads": h["mamba_n_heads"],
        "shared_ff": h.get("shared_intermediate_size", 0),
        "rotated": h["key_length"] // 2,
    }


def _computed(h: Config) -> dict[str, Any]:
    if "mamba" not in _kinds(h):
        raise UnsupportedError(
            "config.json: every layer is attention: llama.cpp runs such models as granite or granitemoe, not as granitehybrid"
        )
    return {
        _ssm.INNER_SIZE: h["mamba_expand"] * h["hidden_size"],
        _att.HEAD_COUNT_KV: [h["num_key_value_heads"] if kind == "attention" else 0 for kind in _kinds(h)],
    }


def _kv_heads(get: Callable[[str], Any]) -> list[int]:
    given = get(_att.HEAD_COUNT_KV)
    return [int(n) for n in given] if hasattr(given, "__len__") else [int(given)] * int(get(_llm.BLOCK_COUNT))


def _unlimited(h: Config) -> Any:
    """The limits of Mamba's time steps as config.json spells that there are none."""
    limits = h.get("time_step_limit")
    return limits if limits and limits[0] == 0 and "inf" in str(limits[1]).lower() else None


_metadata = {
    **{k: v for k, v in PAIRED_METADATA.items() if k != _att.HEAD_COUNT_KV},
    _ssm.CONV_KERNEL: ("mamba_d_conv", int),
    _ssm.STATE_SIZE: ("mamba_d_state", int),
    _ssm.GROUP_COUNT: ("mamba_n_groups", int),
    _ssm.TIME_STEP_RANK: ("mamba_n_heads", int),
}
_defaults = {
    "mamba_d_conv": 4,
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
}
_implied = {
    "hidden_act": "silu",
    "mamba_expand": 2,  # the graph knows no other
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": _unlimited,
    "mamba_d_head": lambda h: (
        "auto" if h.get("mamba_d_head") == "auto" else h["mamba_expand"] * h["hidden_size"] // h["mamba_n_heads"]
    ),
}
_attention = {
    role: replace(t, where="attention", bias="attention_bias")
    for role, t in (DECODER | PAIRED).items()
    if role in ("attn_q", "attn_k", "attn_v", "attn_output")
}
_mamba = {role: replace(t, where="mamba") for role, t in MAMBA_2.items()}
_sample = {
    "num_hidden_layers": 5,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}


def _granite_computed(h: Config) -> dict[str, Any]:
    rotates = {_rp.SCALING_FINETUNED: h.get("position_embedding_type") == "rope"}
    if h.get("num_local_experts"):
        return {**_computed(h), **rotates}
    return {**_computed(h), **rotates, _llm.EXPERT_USED_COUNT: 0, _llm.FEED_FORWARD_LENGTH: h["shared_intermediate_size"]}


def _granite_restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    heads = _kv_heads(get)
    return {
        "layer_types": ["attention" if n else "mamba" for n in heads],
        "num_key_value_heads": max(heads),
        "num_local_experts": int(get(_llm.EXPERT_COUNT) or 0),
        "position_embedding_type": "rope" if get(_rp.SCALING_FINETUNED) in (None, True) else "nope",
        "shared_intermediate_size": int(get(_llm.EXPERT_SHARED_FEED_FORWARD_LENGTH) or get(_llm.FEED_FORWARD_LENGTH)),
    }


_ends = {role: DECODER[role] for role in ("token_embd", "output_norm", "output", "attn_norm", "ffn_norm")}
_scaled = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.5}

GRANITE = Arch(
    hf=("GraniteMoeHybridForCausalLM",),
    name="granitehybrid",
    model_type="granitemoehybrid",
    tensors=_ends
    | _attention
    | _mamba
    | {role: replace(t, where="experts") for role, t in EXPERTS.items()}
    | shared("_shexp", "experts")
    | shared("", "dense"),
    defaults={
        **DEFAULTS,
        **_defaults,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
    },
    metadata_keys={
        **_metadata,
        **EXPERTS_OF_WHICH_SOME,
        **MULTIPLIERS,
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_intermediate_size", int),
    },
    computed=_granite_computed,
    restored=_granite_restored,
    implied=_implied,
    dims=_dims,
    layers=_layers,
    samples={
        "": {
            **_sample,
            **_scaled,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 5,
            "shared_intermediate_size": 32,
            "position_embedding_type": "nope",
        },
        "dense": {
            **_sample,
            **_scaled,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
        },
    },
)
BAMBA = Arch(
    hf=("BambaForCausalLM",),
    name="granitehybrid",
    model_type="bamba",
    tensors={
        **_ends,
        "output_norm": Tensor(("embd",), "model.final_layernorm"),
        "ffn_norm": Tensor(("embd",), "model.layers.{bid}.pre_ff_layernorm"),
        **_attention,
        "attn_q": replace(_attention["attn_q"], checkpoint=From(_SELF + "q_proj", rows=paired("heads", rotated="rotated"))),
        "attn_k": replace(_attention["attn_k"], checkpoint=From(_SELF + "k_proj", rows=paired("kv_heads", rotated="rotated"))),
        **_mamba,
        **{
            role: replace(DECODER[role], checkpoint=f"model.layers.{{bid}}.feed_forward.{role[4:]}_proj", bias="mlp_bias")
            for role in ("ffn_gate", "ffn_up", "ffn_down")
        },
    },
    defaults={
        **_defaults,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    metadata_keys={k: v for k, v in _metadata.items() if k != _rp.DIMENSION_COUNT},
    computed=lambda h: {
        **_computed(h),
        _rp.SCALING_FINETUNED: True,
        _rp.DIMENSION_COUNT: h["key_length"] // 2,
    },
    restored=lambda get: {
        "attn_layer_indices": [i for i, n in enumerate(_kv_heads(get)) if n],
        "num_key_value_heads": max(_kv_heads(get)),
    },
    # transformers rotates half of each head, whatever config.json says
    implied={**_implied, "partial_rotary_factor": 0.5},
    dims=_dims,
    layers=_layers,
    partial_rotary=True,
    told_by=lambda get: not get(_llm.LOGIT_SCALE),
    samples={"": {**_sample, "attn_layer_indices": [1, 3], "attention_bias": True, "mlp_bias": True}},
)
ARCH = (GRANITE, BAMBA)
