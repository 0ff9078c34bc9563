"""Xiaomi's MiMo-V2-Flash: twice the heads of keys, and sinks, in layers with a window; narrower values; experts by sigmoid."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import gguf

from ..arrays import shortest
from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, experts
from .deepseek import DENSE, PROBS_BIAS
from .keys import METADATA
from .rope import rotated, rotated_part
from .tensors import Config, From, Sizes, Tensor

_K = gguf.Keys
_llm, _att, _rope = _K.LLM, _K.Attention, _K.Rope
_LAYER = "model.layers.{bid}."
_VALUE_SCALE = "{arch}.attention.value_scale"
_FACTOR = 0.334


def _types(h: Config) -> list[str]:
    usual = ["full_attention" if i == 0 or not (i + 1) % 6 else "sliding_attention" for i in range(h["num_hidden_layers"])]
    return list(h.get("layer_types") or usual)


def _layers(h: Config) -> Sequence[Collection[str]]:
    dense = h.get("mlp_layer_types") or ["dense"] + ["sparse"] * (h["num_hidden_layers"] - 1)
    return [(kind, *(("moe",) if mlp == "sparse" else ())) for kind, mlp in zip(_types(h), dense, strict=True)]


def _kv_heads(h: Config, kind: str) -> int:
    return int(h["num_key_value_heads"] * (2 if kind == "sliding_attention" else 1))


def _dims(h: Config, layer: int | None) -> Sizes:
    kv = _kv_heads(h, "full_attention" if layer is None else _types(h)[layer])
    return {"kv": kv * h["key_length"], "v": kv * h["v_head_dim"], "o": h["num_attention_heads"] * h["v_head_dim"]}


def _window(h: Config) -> int:
    """transformers takes a release's sliding_window_size as so many tokens before the one that looks."""
    size = h.get("sliding_window_size")
    return int(h["sliding_window"] if size is None else size + 1)


def _computed(h: Config) -> Mapping[str, Any]:
    rope = h["rope_parameters"]
    parts = {rope[kind].get("partial_rotary_factor", _FACTOR) for kind in ("full_attention", "sliding_attention")}
    if len(parts) > 1:
        raise UnsupportedError("config.json: partial_rotary_factor: in llama.cpp, layers with and without a window share one")
    if any(rope[kind].get("rope_type", "default") != "default" for kind in rope):
        raise UnsupportedError("config.json: rope scaling of mimo2 models does not exist in llama.cpp")
    kinds = _types(h)
    return {
        _att.HEAD_COUNT_KV: [_kv_heads(h, kind) for kind in kinds],
        _att.SLIDING_WINDOW: _window(h),
        _att.SLIDING_WINDOW_PATTERN: [kind == "sliding_attention" for kind in kinds],
        _rope.DIMENSION_COUNT: rotated({**h, "rope": {"partial_rotary_factor": parts.pop()}}),
        _rope.FREQ_BASE_SWA: float(rope["sliding_attention"]["rope_theta"]),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    kinds = ["sliding_attention" if w else "full_attention" for w in get(_att.SLIDING_WINDOW_PATTERN)]
    heads = dict(zip(kinds, get(_att.HEAD_COUNT_KV), strict=True))
    part = rotated_part(get, int(get(_att.KEY_LENGTH)))
    scale = get(_VALUE_SCALE)
    experts_in = [get(f"blk.{i}.ffn_gate_inp.weight") is not None for i in range(len(kinds))]
    return {
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if there else "dense" for there in experts_in],
        "num_key_value_heads": int(heads.get("full_attention") or heads["sliding_attention"] // 2),
        "attention_value_scale": None if scale is None else shortest(scale),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": shortest(get(key)), "partial_rotary_factor": part}
            for kind, key in (("full_attention", _rope.FREQ_BASE), ("sliding_attention", _rope.FREQ_BASE_SWA))
        },
    }


_small: dict[str, Any] = {
    "head_dim": 24,
    "v_head_dim": 16,
    "num_attention_heads": 8,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 33,
}

ARCH = Arch(
    hf=("MiMoV2FlashForCausalLM",),
    name="mimo2",
    model_type="mimo_v2_flash",
    tensors=dict(DECODER)
    | {
        "attn_v": Tensor(("v", "embd"), _LAYER + "self_attn.v_proj"),
        "attn_output": Tensor(("embd", "o"), _LAYER + "self_attn.o_proj"),
        "attn_sinks": Tensor(
            ("heads",),
            From(_LAYER + "self_attn.sinks", suffix=""),
            where="sliding_attention",
            also=(From(_LAYER + "self_attn.attention_sink_bias", suffix=""),),
        ),
    }
    | DENSE
    | experts(where="moe")
    | PROBS_BIAS,
    defaults={
        "head_dim": 192,
        "v_head_dim": 128,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 129,
        "attention_value_scale": 0.707,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": _FACTOR},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": _FACTOR},
        },
    },
    nullable=frozenset({"attention_value_scale"}),
    metadata_keys={
        **{k: v for k, v in METADATA.items() if k != _att.HEAD_COUNT_KV},
        _att.VALUE_LENGTH: ("v_head_dim", int),
        _llm.EXPERT_COUNT: ("n_routed_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_GROUP_COUNT: ("n_group", int),
        _llm.EXPERT_GROUP_USED_COUNT: ("topk_group", int),
        _VALUE_SCALE: ("attention_value_scale", float),
        _att.SLIDING_WINDOW: ("sliding_window", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,  # the graph asks for a head of its own
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        # of releases, which transformers does not look at
        "swa_head_dim": lambda h: h["key_length"],
        "swa_v_head_dim": lambda h: h["v_head_dim"],
        "swa_num_attention_heads": lambda h: h["num_attention_heads"],
        "swa_num_key_value_heads": lambda h: _kv_heads(h, "sliding_attention"),
        "hybrid_layer_pattern": lambda h: [int(kind == "sliding_attention") for kind in _types(h)],
    },
    dims=_dims,
    layers=_layers,
    rope_types=frozenset({"default"}),
    partial_rotary=True,
    window=True,
    others=re.compile(r"^model\.mtp\."),
    samples={
        "": {
            **_small,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        },
        "groups": {
            **_small,
            "n_routed_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "attention_value_scale": None,
        },
    },
)
