"""Laguna: a number of heads for each layer, gates on heads, windows in three of four layers, experts by sigmoid and a bias."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from ..arrays import shortest
from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .deepseek import DENSE, first_dense
from .keys import METADATA
from .rope import rope_scaling
from .tensors import Config, From, Sizes, Tensor

_K = gguf.Keys
_llm, _att, _rope = _K.LLM, _K.Attention, _K.Rope
_LAYER = "model.layers.{bid}."
_MLP = _LAYER + "mlp"
_BASE_SWA, _DIMS_SWA = "{arch}.rope.freq_base_swa", "{arch}.rope.dimension_count_swa"


def _heads(h: Config) -> list[int]:
    return list(h.get("num_attention_heads_per_layer") or [h["num_attention_heads"]] * h["num_hidden_layers"])


def _first_dense(h: Config) -> int:
    dense = ["dense"] + ["sparse"] * (h["num_hidden_layers"] - 1)
    return first_dense({**h, "mlp_layer_types": h.get("mlp_layer_types") or dense})


def _types(count: int, windows: bool) -> list[str]:
    return ["sliding_attention" if windows and i % 4 else "full_attention" for i in range(count)]


def _dims(h: Config, layer: int | None) -> Sizes:
    heads = _heads(h)[layer] if layer is not None else h["num_attention_heads"]
    return {"heads": heads, "q": heads * h["key_length"], "shared_ff": h["shared_expert_intermediate_size"]}


def _computed(h: Config) -> Mapping[str, Any]:
    types = h.get("layer_types") or _types(h["num_hidden_layers"], False)
    windows = "sliding_attention" in types
    if types != _types(len(types), windows):
        raise UnsupportedError("config.json: layer_types: in llama.cpp, three layers with a window follow each full one, or none")
    if h.get("gating", True) not in (True, "per-head"):
        raise UnsupportedError(f"config.json: gating = {h['gating']!r}: only gates on heads are supported")
    keys = {
        _att.HEAD_COUNT: _heads(h),
        _llm.EXPERT_WEIGHTS_NORM: True,
        _llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value,
        _llm.LEADING_DENSE_BLOCK_COUNT: _first_dense(h),
        _rope.DIMENSION_COUNT: int(h["key_length"] * h["rope"].get("partial_rotary_factor", 1.0)),
    }
    if windows:
        local = h["rope_parameters"]["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise UnsupportedError("config.json: rope scaling of layers with a window does not exist in llama.cpp")
        keys |= {
            _att.SLIDING_WINDOW: h["sliding_window"],
            _BASE_SWA: float(local["rope_theta"]),
            _DIMS_SWA: int(h["key_length"] * local.get("partial_rotary_factor", 1.0)),
        }
    return keys


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    heads, head, window = [int(n) for n in get(_att.HEAD_COUNT)], int(get(_att.KEY_LENGTH)), get(_att.SLIDING_WINDOW)
    dense = int(get(_llm.LEADING_DENSE_BLOCK_COUNT))

    def part(dims: str) -> float:
        return shortest(np.float32(get(dims) / head))

    full = rope_scaling(get) or {"rope_type": "default"}
    rope = {
        "full_attention": {
            **full,
            "rope_theta": shortest(get(_rope.FREQ_BASE)),
            "partial_rotary_factor": part(_rope.DIMENSION_COUNT),
        }
    }
    if window:
        rope["sliding_attention"] = {
            "rope_type": "default",
            "rope_theta": shortest(get(_BASE_SWA)),
            "partial_rotary_factor": part(_DIMS_SWA),
        }
    return {
        "num_attention_heads": heads[0],
        "num_attention_heads_per_layer": heads,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (len(heads) - dense),
        "layer_types": _types(len(heads), bool(window)),
        "rope_parameters": rope,
        **({"sliding_window": int(window)} if window else {}),
    }


_full = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
_yarn = {**_full, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_small = {
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "moe_routed_scaling_factor": 1.5,
    "mlp_layer_types": ["dense", "dense"] + ["sparse"] * 4,
    "num_hidden_layers": 6,
}

ARCH = Arch(
    hf=("LagunaForCausalLM",),
    name="laguna",
    tensors=dict(DECODER)
    | QK_NORM
    | DENSE
    | {"attn_gate": Tensor(("heads", "embd"), _LAYER + "self_attn.g_proj")}
    | experts(where="moe")
    | {
        "exp_probs_b": Tensor(
            ("experts",),
            From(_MLP + ".experts.e_score_correction_bias", suffix=""),
            where="moe",
            suffix=".bias",
            also=(From(_MLP + ".gate.e_score_correction_bias", suffix=""),),
        ),
        "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_expert.gate_proj", where="moe"),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _MLP + ".shared_expert.up_proj", where="moe"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _MLP + ".shared_expert.down_proj", where="moe"),
    },
    defaults={
        "head_dim": 128,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 8,
        "num_experts": 256,
        "moe_routed_scaling_factor": 1.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    },
    metadata_keys={k: v for k, v in METADATA.items() if k != _att.HEAD_COUNT}
    | {
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_expert_intermediate_size", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("moe_routed_scaling_factor", float),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_router_logit_softcapping": 0.0,
        "moe_apply_router_weight_on_input": False,
    },
    rope_types=frozenset({"default", "yarn"}),
    partial_rotary=True,
    window=True,
    dims=_dims,
    layers=lambda h: [("moe",) if i >= _first_dense(h) else () for i in range(h["num_hidden_layers"])],
    samples={
        "": {
            **_small,
            "layer_types": _types(6, True),
            "num_attention_heads_per_layer": [4, 6, 6, 6, 4, 6],
            "sliding_window": 48,
            "rope_parameters": {
                "full_attention": _yarn,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
            },
        },
        "full": {**_small, "rope_parameters": {"full_attention": _full}, "tie_word_embeddings": True},
    },
)
