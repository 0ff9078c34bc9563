"""Qwen3-Next: gated delta nets, every fourth layer gated attention, a mixture of experts with a shared one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..arrays import shortest
from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .keys import METADATA
from .nextn import apart, with_mtp
from .qwen2moe import SHARED_EXPERT, SHARED_EXPERT_KEYS
from .tensors import Config, From, ScaleGroup, Sizes, Tensor, part
from .weight import MINUS_EXP, PLUS_ONE

_K = gguf.Keys
_LAYER = "model.layers.{bid}."
_LINEAR = _LAYER + "linear_attn."
_RECURRENT = "{arch}.attention.recurrent_layers"

ATTENTION = {
    "token_embd": DECODER["token_embd"],
    "output_norm": Tensor(("embd",), "model.norm", value=PLUS_ONE),
    "output": DECODER["output"],
    "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", value=PLUS_ONE),
    "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm", value=PLUS_ONE),
    "attn_q": Tensor(("2*q", "embd"), _LAYER + "self_attn.q_proj", where="full"),  # queries and gates
    "attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", where="full"),
    "attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", where="full"),
    "attn_output": Tensor(("embd", "q"), _LAYER + "self_attn.o_proj", where="full"),
    **{r: Tensor(t.dims, t.checkpoint, where="full", value=PLUS_ONE) for r, t in QK_NORM.items()},
}
"""What all layers have, and the attention layers."""

_QKVZ = ("key", "key", "per_key*value", "per_key*value")


def _qkvz(*which: int) -> From:
    """Parts of a projection that has, for each head of keys, its queries, keys, values and gates one after another."""

    def rows(s: Sizes) -> NDArray[np.int64]:
        return np.concatenate([part(i, *_QKVZ, per="key_heads")(s) for i in which])

    return From(_LINEAR + "in_proj_qkvz", ("2*keys+2*values", "embd"), rows)


_linear = {
    "attn_qkv": Tensor(("2*keys+values", "embd"), _qkvz(0, 1, 2)),
    "attn_gate": Tensor(("values", "embd"), _qkvz(3)),
    "ssm_ba": Tensor(("2*value_heads", "embd"), _LINEAR + "in_proj_ba"),
    "ssm_conv1d": Tensor(("2*keys+values", "kernel"), From(_LINEAR + "conv1d", ("2*keys+values", "1", "kernel"))),
    "ssm_dt": Tensor(("value_heads",), From(_LINEAR + "dt_bias", suffix=""), suffix=".bias"),
    "ssm_a": Tensor(("value_heads",), From(_LINEAR + "A_log", suffix=""), suffix="", value=MINUS_EXP),
    "ssm_norm": Tensor(("value",), _LINEAR + "norm"),
    "ssm_out": Tensor(("embd", "values"), _LINEAR + "out_proj"),
}


def on_linear(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Roles that the layers with delta nets have."""
    return {r: Tensor(t.dims, t.checkpoint, where="linear", suffix=t.suffix, value=t.value) for r, t in tensors.items()}


def dims(h: Config, _: int | None) -> Sizes:
    """Sizes of the delta nets."""
    keys, values = h["linear_num_key_heads"], h["linear_num_value_heads"]
    return {
        "key_heads": keys,
        "value_heads": values,
        "per_key": values // keys,
        "key": h["linear_key_head_dim"],
        "value": h["linear_value_head_dim"],
        "keys": keys * h["linear_key_head_dim"],
        "values": values * h["linear_value_head_dim"],
        "kernel": h["linear_conv_kernel_dim"],
        "shared_ff": h.get("shared_expert_intermediate_size", 0),
    }


def _types(h: Config) -> list[str]:
    every = h.get("full_attention_interval", 4)
    usual = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(h["num_hidden_layers"])]
    return list(h.get("layer_types") or usual)


def layers(h: Config) -> Sequence[Collection[str]]:
    """linear and full layers, and prediction layers."""
    return [("linear",) if t == "linear_attention" else ("full",) for t in _types(h)] + [("nextn",)] * h.get("nextn", 0)


def computed(h: Config) -> Mapping[str, Any]:
    """Sizes of the delta nets, which layers have one, how much of a head is rotated."""
    rotated = h["rope"].get("partial_rotary_factor", h.get("partial_rotary_factor", 0.25))
    return {
        _K.SSM.CONV_KERNEL: h["linear_conv_kernel_dim"],
        _K.SSM.STATE_SIZE: h["linear_key_head_dim"],
        _K.SSM.GROUP_COUNT: h["linear_num_key_heads"],
        _K.SSM.TIME_STEP_RANK: h["linear_num_value_heads"],
        _K.SSM.INNER_SIZE: h["linear_num_value_heads"] * h["linear_value_head_dim"],
        _RECURRENT: [t == "linear_attention" for t in _types(h)] + [False] * h.get("nextn", 0),
        _K.LLM.FULL_ATTENTION_INTERVAL: h.get("full_attention_interval", 4),
        _K.Rope.DIMENSION_COUNT: int(h["key_length"] * rotated),
    }


def restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    """The inverse of `computed`."""
    nextn = int(get(_K.LLM.NEXTN_PREDICT_LAYERS) or 0)
    count, every = int(get(_K.LLM.BLOCK_COUNT)) - nextn, int(get(_K.LLM.FULL_ATTENTION_INTERVAL) or 4)
    recurrent = get(_RECURRENT)
    recurrent = [(i + 1) % every != 0 for i in range(count)] if recurrent is None else recurrent[:count]
    heads = int(get(_K.SSM.TIME_STEP_RANK))
    return {
        "linear_conv_kernel_dim": int(get(_K.SSM.CONV_KERNEL)),
        "linear_key_head_dim": int(get(_K.SSM.STATE_SIZE)),
        "linear_num_key_heads": int(get(_K.SSM.GROUP_COUNT)),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": int(get(_K.SSM.INNER_SIZE)) // heads,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent],
        "partial_rotary_factor": shortest(np.float32(get(_K.Rope.DIMENSION_COUNT) / get(_K.Attention.KEY_LENGTH))),
        **({"mtp_num_hidden_layers": nextn} if nextn else {}),
    }


DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
IMPLIED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "linear_value_head_dim": lambda h: h["linear_key_head_dim"],
}
SCALE_GROUPS = (ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")),)

ARCH = Arch(
    hf=("Qwen3NextForCausalLM",),
    name="qwen3next",
    model_type="qwen3_next",
    tensors=with_mtp(ATTENTION | on_linear(_linear) | experts() | SHARED_EXPERT, PLUS_ONE),
    scale_groups=SCALE_GROUPS,
    defaults=DEFAULTS
    | {
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    metadata_keys={**METADATA, **SHARED_EXPERT_KEYS},
    computed=computed,
    restored=restored,
    implied={**IMPLIED, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    dims=dims,
    layers=layers,
    nextn=apart,
    partial_rotary=True,
    samples={
        "": {
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "initializer_range": 0.06,  # delta nets of larger random numbers are chaotic
            "head_dim": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
        "mixed": {
            "initializer_range": 0.06,
            "head_dim": 64,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 3,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 32,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    },
)
