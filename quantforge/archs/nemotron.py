"""Nemotron, dense: LayerNorms as offsets from one, squared ReLU, half of each head rotated."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from ..arrays import shortest
from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .minimax_m2 import rotated
from .tensors import Config
from .weight import PLUS_ONE

_K = gguf.Keys
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")


def _computed(h: Config) -> Mapping[str, Any]:
    return {_K.Rope.DIMENSION_COUNT: rotated(h, 0.5)}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    head = int(get(_K.LLM.EMBEDDING_LENGTH)) // int(get(_K.Attention.HEAD_COUNT))
    return {"partial_rotary_factor": shortest(np.float32(get(_K.Rope.DIMENSION_COUNT) / head))}


ARCH = Arch(
    hf=("NemotronForCausalLM",),
    name="nemotron",
    tensors={role: t for role, t in DECODER.items() if role != "ffn_gate"}
    | {r: replace(DECODER[r], bias=True, value=PLUS_ONE) for r in ("output_norm", "attn_norm", "ffn_norm")}
    | {r: replace(DECODER[r], bias="attention_bias") for r in _ATTENTION}
    | {r: replace(DECODER[r], bias="mlp_bias") for r in ("ffn_up", "ffn_down")},
    defaults={"max_position_embeddings": 4096, "norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
    metadata_keys={k: v for k, v in METADATA.items() if k != _K.Attention.LAYERNORM_RMS_EPS}
    | {_K.Attention.LAYERNORM_EPS: ("norm_eps", float)},
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
    },
    rope_types=frozenset({"default", "linear"}),
    partial_rotary=True,
    samples={
        "": {"attention_bias": True, "mlp_bias": True},
        "linear": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0, "partial_rotary_factor": 0.25},
            "num_attention_heads": 2,
        },
    },
)
