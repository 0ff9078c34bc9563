"""LG's K-EXAONE: windows without scaled rope, a dense layer first, then experts chosen by sigmoid and a bias, and shared ones."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .keys import EXPERTS_OF_WHICH_SOME, METADATA
from .tensors import Config, From, Tensor
from .windows import restored_types, window_pattern

_att, _llm = gguf.Keys.Attention, gguf.Keys.LLM
_MLP = "model.layers.{bid}.mlp."


def _is_dense(h: Config) -> list[bool]:
    layers, first = h["num_hidden_layers"], h["first_k_dense_replace"]
    return [kind == "dense" for kind in h.get("mlp_layer_types") or ["dense"] * first + ["sparse"] * (layers - first)]


def _layers(h: Config) -> Sequence[Collection[str]]:
    return [{"dense"} if dense else {"experts"} for dense in _is_dense(h)]


def _computed(h: Config) -> dict[str, Any]:
    dense = _is_dense(h)
    if dense != sorted(dense, reverse=True):
        raise UnsupportedError("config.json: mlp_layer_types: llama.cpp runs exaone-moe models with dense layers first")
    return {
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: h["moe_intermediate_size"] * h["num_shared_experts"],
        _llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
        _llm.LEADING_DENSE_BLOCK_COUNT: sum(dense),
        _llm.NEXTN_PREDICT_LAYERS: 0,
        gguf.Keys.Rope.SCALING_TYPE: "none",
        **window_pattern(h, 4),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    layers, first = int(get(_llm.BLOCK_COUNT)), int(get(_llm.LEADING_DENSE_BLOCK_COUNT) or 0)
    return {
        "layer_types": restored_types(get, 4),
        "first_k_dense_replace": first,
        "mlp_layer_types": ["dense"] * first + ["sparse"] * (layers - first),
    }


ARCH = Arch(
    hf=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    name="exaone-moe",
    model_type="exaone_moe",
    tensors={role: replace(t, where="dense") if role in ("ffn_gate", "ffn_up", "ffn_down") else t for role, t in DECODER.items()}
    | QK_NORM
    | experts(where="experts")
    | {
        "exp_probs_b.bias": Tensor(
            ("experts",),
            From(_MLP + "gate.e_score_correction_bias", suffix=""),
            where="experts",
            suffix="",
            also=(From(_MLP + "e_score_correction_bias", suffix=""),),
        ),
        "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _MLP + "shared_experts.gate_proj", where="experts"),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MLP + "shared_experts.up_proj", where="experts"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MLP + "shared_experts.down_proj", where="experts"),
    },
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "pad_token_id": None,
    },
    aliases={"num_local_experts": "num_experts"},
    metadata_keys={
        **METADATA,
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _att.SLIDING_WINDOW: ("sliding_window", int),
        **EXPERTS_OF_WHICH_SOME,
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_GROUP_USED_COUNT: ("topk_group", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("num_shared_experts", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("routed_scaling_factor", float),
        _llm.EXPERT_WEIGHTS_NORM: ("norm_topk_prob", bool),
    },
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu", "tie_word_embeddings": False},  # the graph asks for a head of its own
    dims=lambda h, layer: {"shared_ff": h["moe_intermediate_size"] * h["num_shared_experts"]},
    layers=_layers,
    rope_types=frozenset({"default"}),
    window=True,
    others=re.compile(r"^mtp\."),
    samples={
        "": {
            "num_hidden_layers": 6,
            "head_dim": 32,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "first_k_dense_replace": 2,
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    },
)
