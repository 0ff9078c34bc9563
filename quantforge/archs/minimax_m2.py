"""MiniMax-M2: experts chosen by sigmoid and a bias, norms over all heads' queries and keys."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from ..arrays import shortest
from .base import Arch
from .decoder import DECODER, experts
from .keys import METADATA
from .tensors import Config, From, ScaleGroup, Tensor

_K = gguf.Keys
_LAYER = "model.layers.{bid}."
_MOE = _LAYER + "block_sparse_moe"
_dense = {role: t for role, t in DECODER.items() if role not in ("ffn_gate", "ffn_up", "ffn_down")}


def rotated(h: Config, usual: float = 1.0) -> int:
    """How many numbers of a head are rotated."""
    return int(h["key_length"] * h["rope"].get("partial_rotary_factor", h.get("partial_rotary_factor", usual)))


def restored_rotation(get: Callable[[str], Any]) -> Mapping[str, Any]:
    """The inverse of `rotated`."""
    return {"partial_rotary_factor": shortest(np.float32(get(_K.Rope.DIMENSION_COUNT) / get(_K.Attention.KEY_LENGTH)))}


def _computed(h: Config) -> Mapping[str, Any]:
    turned = h.get("rotary_dim") or rotated(h)
    return {_K.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value, _K.Rope.DIMENSION_COUNT: int(turned)}


ARCH = Arch(
    hf=("MiniMaxM2ForCausalLM",),
    name="minimax-m2",
    model_type="minimax_m2",
    tensors=_dense
    | experts(_MOE, words="w1 w3 w2", module="model.layers.{bid}.mlp")
    | {
        "attn_q_norm": Tensor(("q",), _LAYER + "self_attn.q_norm"),
        "attn_k_norm": Tensor(("kv",), _LAYER + "self_attn.k_norm"),
        "exp_probs_b": Tensor(("experts",), From(_MOE + ".e_score_correction_bias", suffix=""), suffix=".bias"),
    },
    scale_groups=(ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")), ScaleGroup("attn_v", ("attn_output",))),
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
    },
    metadata_keys={
        **METADATA,
        _K.LLM.EXPERT_COUNT: ("num_local_experts", int),
        _K.LLM.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _K.LLM.EXPERT_FEED_FORWARD_LENGTH: ("intermediate_size", int),
    },
    computed=_computed,
    restored=restored_rotation,
    implied={
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
    },
    partial_rotary=True,
    samples={
        "": {"head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 48},
        "half": {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    },
)
