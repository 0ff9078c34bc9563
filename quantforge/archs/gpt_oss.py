"""gpt-oss: attention sinks, a window in every other layer, experts with biases whose gates and ups alternate."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .rope import rope_metadata, rope_scaling
from .tensors import Config, From, ScaleGroup, Tensor, interleaved

logger = logging.getLogger(__name__)

_LAYER = "model.layers.{bid}."
_EXPERTS = _LAYER + "mlp.experts."
_dense = {role: t for role, t in DECODER.items() if role not in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}


def _gate_up(which: int) -> From:
    """Every other column of the checkpoint's [experts, in, 2·out]."""
    picked = interleaved(which, 2, "experts*2*ff")
    return From(_EXPERTS + "gate_up_proj", ("experts", "embd", "2*ff"), groups="experts", picked=picked, suffix="")


def _released(which: int) -> tuple[From]:
    """Every other row of the release's MXFP4, which is not transposed."""
    rows = interleaved(which, 2, "experts*2*ff")
    return (From(_EXPERTS + "gate_up_proj_blocks", ("experts", "2*ff", "embd"), rows, suffix=""),)


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    """GGUF does not say whether YaRN's bounds are rounded; in gpt-oss they are not."""
    rope = rope_scaling(get) or {"rope_type": "default"}
    return {"rope_scaling": {**rope, "truncate": False} if rope["rope_type"] == "yarn" else rope}


def _computed(h: Config) -> Mapping[str, Any]:
    if h["rope"].get("truncate", True) is not True:
        logger.warning(
            "config.json: yarn rope scaling with truncate = false: llama.cpp rounds the first and last of the frequencies "
            "that are blended to whole numbers"
        )
    return rope_metadata({k: v for k, v in h["rope"].items() if k != "truncate"})


ARCH = Arch(
    hf=("GptOssForCausalLM",),
    name="gpt-oss",
    model_type="gpt_oss",
    tensors=_dense
    | {r: replace(DECODER[r], bias=True) for r in ("attn_q", "attn_k", "attn_v", "attn_output")}
    | {
        "attn_sinks": Tensor(("heads",), From(_LAYER + "self_attn.sinks", suffix="")),
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm"),
        "ffn_gate_inp": Tensor(("experts", "embd"), _LAYER + "mlp.router", bias=True),
        "ffn_gate_exps": Tensor(("experts", "ff", "embd"), _gate_up(0), bias=True, also=_released(0)),
        "ffn_up_exps": Tensor(("experts", "ff", "embd"), _gate_up(1), bias=True, also=_released(1)),
        "ffn_down_exps": Tensor(
            ("experts", "embd", "ff"),
            From(_EXPERTS + "down_proj", ("experts", "ff", "embd"), groups="experts", suffix=""),
            bias=True,
            also=(From(_EXPERTS + "down_proj_blocks", suffix=""),),
        ),
    },
    scale_groups=(ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")), ScaleGroup("attn_v", ("attn_output",))),
    defaults={
        "head_dim": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "rope_theta": 150000.0,
        "rope_scaling": lambda given: (
            None
            if given.get("rope_parameters")
            else {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            }
        ),
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[1] is not dict},  # rope: `_computed`
        gguf.Keys.LLM.EXPERT_COUNT: ("num_local_experts", int),
        gguf.Keys.LLM.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        gguf.Keys.Attention.SLIDING_WINDOW: ("sliding_window", int),
        gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: ("intermediate_size", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "layer_types": lambda h: ["full_attention" if i % 2 else "sliding_attention" for i in range(h["num_hidden_layers"])],
    },
    window=True,
    samples={
        "": {
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 415.04284,  # the bounds of what YaRN blends are whole numbers already: 0 and 8
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "truncate": False,
            },
        },
        "plain": {
            "head_dim": 16,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "sliding_window": 48,
            "intermediate_size": 160,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
)
