"""Step-3.7: gates on heads, half of each head rotated in layers without a window, experts by sigmoid, clamped MLPs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..arrays import shortest
from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, QK_NORM
from .deepseek import DENSE
from .keys import METADATA
from .nextn import NEXTN, beyond
from .rope import ROPE_FREQS, llama3_rope_factors, llama3_scaling, sliding_theta
from .tensors import Config, From, Sizes, Tensor, part
from .weight import PLUS_ONE, Weight

_K = gguf.Keys
_llm, _att, _rope = _K.LLM, _K.Attention, _K.Rope
_LAYER = "model.layers.{bid}."
_MOE = _LAYER + "moe."
_SHARED = _LAYER + "share_expert."
_PART = 0.5
"""How much of a head is rotated where all is attended to."""
_EXPERTS = ("experts", "expert_ff", "embd")
_LIMITS = {"swiglu_limits": _llm.SWIGLU_CLAMP_EXP, "swiglu_limits_shared": _llm.SWIGLU_CLAMP_SHEXP}


def _types(h: Config) -> list[str]:
    """Of all layers, those that predict further tokens too, as far as config.json says."""
    count = h["num_hidden_layers"]
    types = list(h.get("layer_types") or ["full_attention"] * count)
    return types + (list(h.get("mtp_layer_types") or []) if len(types) == count else [])


def _sparse(h: Config) -> list[bool]:
    if (types := h.get("mlp_layer_types")) is not None:
        return [t == "sparse" for t in types]
    listed = h.get("moe_layers_enum", range(3, h["num_hidden_layers"]))
    numbers = {int(i) for i in (listed.split(",") if isinstance(listed, str) else listed) if str(i).strip()}
    return [i in numbers for i in range(h["num_hidden_layers"])]


def _layers(h: Config) -> Sequence[tuple[str, ...]]:
    trunk, sparse, types = h["num_hidden_layers"], _sparse(h), _types(h)
    types += ["full_attention"] * (trunk + h.get("nextn", 0) - len(types))
    return [
        (kind, *(("moe",) if i < len(sparse) and sparse[i] else ()), *(("nextn",) if i >= trunk else ()))
        for i, kind in enumerate(types[: trunk + h.get("nextn", 0)])
    ]


def _heads(h: Config, kind: str) -> int:
    if kind == "full_attention":
        return int(h["num_attention_heads"])
    older = (h.get("attention_other_setting") or {}).get("num_attention_heads")
    return int(h.get("num_sliding_attention_heads") or older or h["num_attention_heads"])


def _dims(h: Config, layer: int | None) -> Sizes:
    heads = h["num_attention_heads"] if layer is None else _heads(h, _layers(h)[layer][0])
    return {"heads": heads, "q": heads * h["key_length"], "shared_ff": h["share_expert_dim"]}


def _rope_parameters(given: Config) -> dict[str, Any]:
    """What releases say by lists over layers."""
    thetas, parts = given.get("rope_theta", 10000.0), given.get("partial_rotary_factors")
    by_kind: dict[str, dict[str, Any]] = {}
    for i, kind in enumerate(given.get("layer_types") or ["full_attention"]):
        if kind not in by_kind:
            by_kind[kind] = {"rope_type": "default", "rope_theta": thetas[i] if isinstance(thetas, list) else thetas}
            by_kind[kind] |= {"partial_rotary_factor": parts[i]} if parts else {}
    if "full_attention" in by_kind:
        by_kind["full_attention"] |= given.get("rope_scaling") or {}
    return by_kind


def _check(h: Config) -> None:
    for kind, wanted in (("full_attention", _PART), ("sliding_attention", 1.0)):
        rope = h["rope_parameters"].get(kind)
        if rope is not None and rope.get("partial_rotary_factor", 1.0) != wanted:
            raise UnsupportedError(
                f"config.json: partial_rotary_factor of {kind} layers: llama.cpp runs step35 models only with {wanted}"
            )
    groups = (h.get("attention_other_setting") or {}).get("num_attention_groups", h["num_key_value_heads"])
    if groups != h["num_key_value_heads"]:
        raise UnsupportedError("config.json: attention_other_setting: transformers knows only one number of attention groups")


def _computed(h: Config) -> Mapping[str, Any]:
    _check(h)
    kinds = _layers(h)
    sparse = ["moe" in k for k in kinds]
    limits = {
        name: [float(v or 0) for v in h[key][: len(kinds)]] + [0.0] * (len(kinds) - len(h[key]))
        for key, name in _LIMITS.items()
        if h.get(key)
    }
    shared = limits.get(_llm.SWIGLU_CLAMP_SHEXP, [])
    if any(limit and not moe for limit, moe in zip(shared, sparse, strict=False)):
        raise UnsupportedError("config.json: swiglu_limits_shared: llama.cpp does not clamp dense layers")
    return {
        _att.HEAD_COUNT: [_heads(h, k[0]) for k in kinds],
        _att.HEAD_COUNT_KV: [h["num_key_value_heads"]] * len(kinds),
        _att.SLIDING_WINDOW: h.get("sliding_window") or 0,
        _att.SLIDING_WINDOW_PATTERN: [k[0] == "sliding_attention" for k in kinds],
        _rope.FREQ_BASE_SWA: sliding_theta(h, h["rope"]["rope_theta"]),
        _llm.EXPERT_WEIGHTS_NORM: True,
        _llm.LEADING_DENSE_BLOCK_COUNT: sparse.index(True) if True in sparse else len(sparse),
        _llm.MOE_EVERY_N_LAYERS: 1,
        **limits,
    }


def _rope_freqs(h: Config) -> list[Weight]:
    """Llama 3's factors for the rotated half; in layers with a window whole heads are, by factors of one."""
    if h["rope"]["rope_type"] != "llama3":
        return []
    turned = int(h["key_length"] * _PART)
    factors = np.ones(h["key_length"] // 2 if "sliding_attention" in _types(h) else turned // 2, np.float32)
    factors[: turned // 2] = llama3_rope_factors(h["rope"], turned)
    return [Weight(ROPE_FREQS, factors.shape, constant=factors)]


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    count = int(get(_llm.BLOCK_COUNT)) - int(get(_llm.NEXTN_PREDICT_LAYERS) or 0)
    windows = ["sliding_attention" if w else "full_attention" for w in get(_att.SLIDING_WINDOW_PATTERN)]
    kinds, beside = windows[:count], windows[count:]
    heads = dict(zip(windows, (int(n) for n in get(_att.HEAD_COUNT)), strict=True))
    theta = shortest(get(_rope.FREQ_BASE))
    full = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": _PART}
    if (factors := get(ROPE_FREQS)) is not None:
        turned = int(get(_att.KEY_LENGTH) * _PART)
        full |= llama3_scaling(np.asarray(factors[: turned // 2]), theta, Path(ROPE_FREQS))
    sliding = {"rope_type": "default", "rope_theta": shortest(get(_rope.FREQ_BASE_SWA)), "partial_rotary_factor": 1.0}
    first = heads.get("full_attention") or heads["sliding_attention"]
    return {
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if get(f"blk.{i}.ffn_gate_inp.weight") else "dense" for i in range(count)],
        "num_attention_heads": first,
        "num_sliding_attention_heads": heads.get("sliding_attention", first),
        "num_key_value_heads": int(get(_att.HEAD_COUNT_KV)[0]),
        "sliding_window": int(get(_att.SLIDING_WINDOW)) or None,
        "rope_parameters": {k: {"full_attention": full, "sliding_attention": sliding}[k] for k in dict.fromkeys(kinds)},
        **{key: [shortest(v) for v in get(name)][:count] for key, name in _LIMITS.items() if get(name) is not None},
        **({"num_nextn_predict_layers": len(beside), "mtp_layer_types": beside} if beside else {}),
    }


def _joined(which: int) -> From:
    """So transformers holds them."""
    rows = part(which, "expert_ff", "expert_ff", per="experts")
    return From(_LAYER + "mlp.experts.gate_up_proj", ("experts", "2*expert_ff", "embd"), rows, suffix="")


_norms = {
    "output_norm": Tensor(("embd",), "model.norm"),
    "attn_norm": DECODER["attn_norm"],
    "ffn_norm": DECODER["ffn_norm"],
    **QK_NORM,
    **{r: t for r, t in NEXTN.items() if r.endswith("norm")},
    "nextn.shared_head_norm": Tensor(("embd",), _LAYER + "transformer.shared_head.norm", where="nextn", optional=True),
}
_vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_small: dict[str, Any] = {
    "head_dim": 32,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "share_expert_dim": 48,
    "moe_router_scaling_factor": 1.5,
    "sliding_window": 33,
    "num_sliding_attention_heads": 6,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": _PART},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
    },
    "vision_config": _vision,
}
_llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ARCH = Arch(
    hf=("Step3p7ForConditionalGeneration",),
    name="step35",
    model_type="step3p7",
    tensors=dict(DECODER)
    | NEXTN
    | {role: replace(t, value=PLUS_ONE) for role, t in _norms.items()}
    | DENSE
    | {
        "attn_gate": Tensor(("heads", "embd"), _LAYER + "self_attn.g_proj"),
        "ffn_gate_inp": Tensor(("experts", "embd"), _MOE + "gate", where="moe"),
        "exp_probs_b": Tensor(("experts",), From(_MOE + "router_bias", suffix=""), where="moe", suffix=".bias"),
        "ffn_gate_exps": Tensor(_EXPERTS, _MOE + "gate_proj", where="moe", also=(_joined(0),)),
        "ffn_up_exps": Tensor(_EXPERTS, _MOE + "up_proj", where="moe", also=(_joined(1),)),
        "ffn_down_exps": Tensor(("experts", "embd", "expert_ff"), _MOE + "down_proj", where="moe"),
        "ffn_gate_shexp": Tensor(("shared_ff", "embd"), _SHARED + "gate_proj", where="moe"),
        "ffn_up_shexp": Tensor(("shared_ff", "embd"), _SHARED + "up_proj", where="moe"),
        "ffn_down_shexp": Tensor(("embd", "shared_ff"), _SHARED + "down_proj", where="moe"),
        "nextn.shared_head_head": Tensor(
            ("vocab", "embd"), _LAYER + "transformer.shared_head.output", where="nextn", optional=True
        ),
    },
    aliases={
        "num_key_value_heads": "num_attention_groups",
        "n_routed_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
        "share_expert_dim": "share_expert_dims",
    },
    defaults={
        "head_dim": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1280,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "share_expert_dim": 1280,
        "moe_router_scaling_factor": 1.0,
        "rope_parameters": _rope_parameters,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if k not in (_att.HEAD_COUNT, _att.HEAD_COUNT_KV)},
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("share_expert_dim", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("moe_router_scaling_factor", float),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "gating": True,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": False,  # the graph asks for a head of its own
        "query_pre_attn_scalar": lambda h: h["key_length"],
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
    },
    dims=_dims,
    layers=_layers,
    nextn=beyond,
    rope_types=frozenset({"default", "llama3"}),
    partial_rotary=True,
    window=True,
    generated=_rope_freqs,
    others=re.compile(r"(vision_model|vit_large_projector|multi_modal_projector)\."),
    around={"vision_config": _vision},
    samples={
        "": {**_small, "swiglu_limits": [0.0, 0.0, 0.1, 0.2], "swiglu_limits_shared": [0.0, 0.0, 0.2, 0.0]},
        "llama3": {
            **_small,
            "rope_parameters": {
                **_small["rope_parameters"],
                "full_attention": _llama3
                | {"rope_theta": 5000.0, "partial_rotary_factor": _PART, "original_max_position_embeddings": 64},
            },
        },
    },
)
