"""Phi-3, 3.5 and 4: one matrix for queries, keys and values, one for gate and up, and LongRoPE's two sets of factors."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, longrope_factors
from .keys import METADATA
from .rope import rotated
from .tensors import Config, ScaleGroup, Tensor

_att, _llm, _rp = gguf.Keys.Attention, gguf.Keys.LLM, gguf.Keys.Rope


def _computed(h: Config) -> dict[str, Any]:
    original = h["rope"].get("original_max_position_embeddings") or h.get("original_max_position_embeddings")
    return {
        _rp.SCALING_ORIG_CTX_LEN: int(original or h["max_position_embeddings"]),
        _rp.DIMENSION_COUNT: rotated(h),
        _att.SLIDING_WINDOW: h.get("sliding_window") or 0,  # llama.cpp tells Phi-4 from its elders by this
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    head = int(get(_llm.EMBEDDING_LENGTH)) // int(get(_att.HEAD_COUNT))
    return {
        "original_max_position_embeddings": int(get(_rp.SCALING_ORIG_CTX_LEN) or get(_llm.CONTEXT_LENGTH)),
        "sliding_window": int(get(_att.SLIDING_WINDOW) or 0) or None,
        "partial_rotary_factor": int(get(_rp.DIMENSION_COUNT) or head) / head,
        "pad_token_id": None,  # transformers' own default is a row that only the released vocabulary has
    }


def _longrope(factor: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "original_max_position_embeddings": original,
        "long_factor": [1.0 + factor * i for i in range(6)],
        "short_factor": [1.0 + 0.1 * factor * i for i in range(6)],
        "partial_rotary_factor": 0.75,
    }


ARCH = Arch(
    hf=("Phi3ForCausalLM",),
    name="phi3",
    tensors={role: t for role, t in DECODER.items() if role not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
    | {
        "attn_qkv": Tensor(("q+kv+kv", "embd"), "model.layers.{bid}.self_attn.qkv_proj"),
        "ffn_up": Tensor(("2*ff", "embd"), "model.layers.{bid}.mlp.gate_up_proj"),
    },
    scale_groups=(ScaleGroup("attn_norm", ("attn_qkv",)), ScaleGroup("ffn_norm", ("ffn_up",))),
    defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    metadata_keys={k: v for k, v in METADATA.items() if k not in (_att.KEY_LENGTH, _att.VALUE_LENGTH)},
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        # the graph takes the head size from these
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
    },
    rope_types=frozenset({"default", "longrope"}),
    partial_rotary=True,
    generated=longrope_factors,
    samples={
        "": {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 512},
        "long": {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "rope_parameters": _longrope(0.5, 64),
        },
        "short": {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 2048,
            "rope_parameters": _longrope(2.0, 2048),
        },
    },
)
