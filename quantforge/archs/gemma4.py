"""Gemma 4: layers of two widths, keys and values shared by the last layers, embeddings for each layer, experts beside the MLP."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from ..arrays import shortest
from .base import Arch
from .decoder import DECODER, QK_NORM
from .keys import METADATA
from .rope import ROPE_FREQS, sliding_theta
from .tensors import Config, From, Tensor
from .weight import Weight
from .windows import layer_types, restored_types, window_pattern

_att, _llm, _rp = gguf.Keys.Attention, gguf.Keys.LLM, gguf.Keys.Rope
_LAYER = "model.layers.{bid}."
_EVERY = 6
_UNROTATED = 1e30
"""A frequency divided by this is no rotation."""


def _of_full_layers(h: Config, key: str, usual: str, default: int) -> int:
    """A size of the layers without a window, in either spelling: transformers saves it layer by layer."""
    listed = h.get("per_layer_config") or {}
    for i, kind in enumerate(layer_types(h, _EVERY)):
        if kind == "full_attention" and key in (given := listed.get(str(i), listed.get(i, {}))):
            return int(given[key])
    return int(h.get(usual) or default)


def _full_head(h: Config) -> int:
    return _of_full_layers(h, "head_dim", "global_head_dim", 512)


def _full_kv_heads(h: Config) -> int:
    own = "num_global_key_value_heads" if h.get("attention_k_eq_v") else ""
    return _of_full_layers(h, "num_key_value_heads", own, h["num_key_value_heads"])


def _first_shared(h: Config) -> int:
    return int(h["num_hidden_layers"] - h["num_kv_shared_layers"])


def _layers(h: Config) -> Sequence[Collection[str]]:
    always = {"experts"} if h.get("enable_moe_block") else set()
    always |= {"per layer"} if h["hidden_size_per_layer_input"] else set()
    kinds = []
    for i, kind in enumerate(layer_types(h, _EVERY)):
        own = {"keys"} if i < _first_shared(h) else set()
        own |= {"values"} if own and not (h["attention_k_eq_v"] and kind == "full_attention") else set()
        kinds.append({kind} | own | always)
    return kinds


def _dims(h: Config, layer: int | None) -> dict[str, int]:
    full = layer is not None and layer_types(h, _EVERY)[layer] == "full_attention"
    head, kv = (_full_head(h), _full_kv_heads(h)) if full else (h["key_length"], h["num_key_value_heads"])
    wide = h["use_double_wide_mlp"] and layer is not None and layer >= _first_shared(h)
    return {
        "head": head,
        "q": h["num_attention_heads"] * head,
        "kv": kv * head,
        "ff": h["intermediate_size"] * (2 if wide else 1),
        "per_layer": h["hidden_size_per_layer_input"],
        "layers": h["num_hidden_layers"],
    }


def _computed(h: Config) -> dict[str, Any]:
    layers = range(h["num_hidden_layers"])
    ff, kv, full_kv = h["intermediate_size"], h["num_key_value_heads"], _full_kv_heads(h)
    kinds = layer_types(h, _EVERY)
    return {
        _llm.FEED_FORWARD_LENGTH: [_dims(h, i)["ff"] for i in layers] if h["use_double_wide_mlp"] else ff,
        _att.HEAD_COUNT_KV: [full_kv if k == "full_attention" else kv for k in kinds] if full_kv != kv else kv,
        _att.KEY_LENGTH: _full_head(h),
        _att.VALUE_LENGTH: _full_head(h),
        _att.KEY_LENGTH_SWA: h["key_length"],
        _att.VALUE_LENGTH_SWA: h["key_length"],
        _rp.DIMENSION_COUNT: _full_head(h),
        _rp.DIMENSION_COUNT_SWA: h["key_length"],
        _rp.FREQ_BASE_SWA: sliding_theta(h, 10000.0),
        _llm.FINAL_LOGIT_SOFTCAPPING: float(h.get("final_logit_softcapping") or 0),  # llama.cpp takes 30 where there is none
        **window_pattern(h, _EVERY),
    }


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    kinds = restored_types(get, _EVERY)
    kv, ff = get(_att.HEAD_COUNT_KV), get(_llm.FEED_FORWARD_LENGTH)
    by_kind = dict(zip(kinds, kv if isinstance(kv, Sequence | np.ndarray) else [kv] * len(kinds), strict=True))
    ffs = list(ff) if isinstance(ff, Sequence | np.ndarray) else [ff]
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    head = int(get(_att.KEY_LENGTH))
    factors = get(ROPE_FREQS)
    turned = 0.25 if factors is None else 2 * int((np.asarray(factors) < _UNROTATED / 2).sum()) / head
    theta, sliding = get(_rp.FREQ_BASE) or 10000.0, get(_rp.FREQ_BASE_SWA) or 10000.0
    rope = {"rope_type": "proportional", "partial_rotary_factor": turned, "rope_theta": shortest(theta)}
    if factors is not None and factors[0] != 1:
        rope["factor"] = float(factors[0])
    return {
        "layer_types": kinds,
        "head_dim": int(get(_att.KEY_LENGTH_SWA)),
        "global_head_dim": head,
        "num_key_value_heads": int(by_kind.get("sliding_attention", kv)),
        "num_global_key_value_heads": int(by_kind.get("full_attention", kv)),
        "attention_k_eq_v": bool(full) and get(f"blk.{full[0]}.attn_v.weight") is None,
        "intermediate_size": int(min(ffs)),
        "use_double_wide_mlp": len(set(ffs)) > 1,
        "enable_moe_block": bool(get(_llm.EXPERT_COUNT)),
        "final_logit_softcapping": shortest(get(_llm.FINAL_LOGIT_SOFTCAPPING) or 0) or None,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": shortest(sliding)},
        },
    }


def _rope_freqs(h: Config) -> list[Weight]:
    """Of each head of a full layer only the first pairs are rotated."""
    half = _full_head(h) // 2
    turned = int(h["rope"].get("partial_rotary_factor", 1.0) * _full_head(h) // 2)
    factors = np.array([h["rope"].get("factor", 1.0)] * turned + [_UNROTATED] * (half - turned), np.float32)
    return [Weight(ROPE_FREQS, factors.shape, constant=factors)]


_MOE = _LAYER + "experts."

_sample = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
    "head_dim": 16,
    "global_head_dim": 32,
    "tie_word_embeddings": True,
}

TEXT = Arch(
    hf=("Gemma4ForCausalLM",),
    name="gemma4",
    model_type="gemma4_text",
    tensors=DECODER
    | {
        "per_layer_token_embd": Tensor(("vocab", "layers*per_layer"), "model.embed_tokens_per_layer", optional=True),
        "per_layer_model_proj": Tensor(("layers*per_layer", "embd"), "model.per_layer_model_projection", optional=True),
        "per_layer_proj_norm": Tensor(("per_layer",), "model.per_layer_projection_norm", optional=True),
        "attn_k": replace(DECODER["attn_k"], where="keys"),
        "attn_v": replace(DECODER["attn_v"], where="values"),
        "attn_q_norm": QK_NORM["attn_q_norm"],
        "attn_k_norm": replace(QK_NORM["attn_k_norm"], where="keys"),
        # layers that use others' keys and values have some of their own in releases, unused
        "blk.{bid}.attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", where="!keys", optional=True),
        "blk.{bid}.attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", where="!keys", optional=True),
        "blk.{bid}.attn_k_norm": Tensor(("head",), _LAYER + "self_attn.k_norm", where="!keys", optional=True),
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm"),
        "ffn_norm": Tensor(("embd",), _LAYER + "pre_feedforward_layernorm"),
        "post_ffw_norm": Tensor(("embd",), _LAYER + "post_feedforward_layernorm"),
        "layer_output_scale": Tensor(("1",), From(_LAYER + "layer_scalar", suffix=""), optional=True),
        "inp_gate": Tensor(("per_layer", "embd"), _LAYER + "per_layer_input_gate", where="per layer"),
        "proj": Tensor(("embd", "per_layer"), _LAYER + "per_layer_projection", where="per layer"),
        "post_norm": Tensor(("embd",), _LAYER + "post_per_layer_input_norm", where="per layer"),
        "ffn_gate_inp": Tensor(("experts", "embd"), _LAYER + "router.proj", where="experts"),
        "ffn_gate_inp.scale": Tensor(("embd",), From(_LAYER + "router.scale", suffix=""), where="experts", suffix=""),
        "ffn_gate_up_exps": Tensor(("experts", "2*expert_ff", "embd"), From(_MOE + "gate_up_proj", suffix=""), where="experts"),
        "ffn_down_exps": Tensor(("experts", "embd", "expert_ff"), From(_MOE + "down_proj", suffix=""), where="experts"),
        "ffn_down_exps.scale": Tensor(
            ("experts",), From(_LAYER + "router.per_expert_scale", suffix=""), where="experts", suffix=""
        ),
        "post_ffw_norm_1": Tensor(("embd",), _LAYER + "post_feedforward_layernorm_1", where="experts"),
        "post_ffw_norm_2": Tensor(("embd",), _LAYER + "post_feedforward_layernorm_2", where="experts"),
        "pre_ffw_norm_2": Tensor(("embd",), _LAYER + "pre_feedforward_layernorm_2", where="experts"),
    },
    defaults={
        "attention_k_eq_v": False,
        "head_dim": 256,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "use_double_wide_mlp": False,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] not in ("head_dim", "intermediate_size", "num_key_value_heads")},
        _att.SLIDING_WINDOW: ("sliding_window", int),
        _att.SHARED_KV_LAYERS: ("num_kv_shared_layers", int),
        _llm.EMBD_LENGTH_PER_LAYER_INP: ("hidden_size_per_layer_input", int),
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_USED_COUNT: ("top_k_experts", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        # images' tokens see each other, which is nothing to text; "all" is an encoder
        "use_bidirectional_attention": lambda h: "vision" if h.get("use_bidirectional_attention") == "vision" else None,
        "vocab_size_per_layer_input": lambda h: (
            h["vocab_size"] if h["hidden_size_per_layer_input"] else h.get("vocab_size_per_layer_input")
        ),
    },
    dims=_dims,
    layers=_layers,
    rope_types=frozenset({"proportional"}),
    partial_rotary=True,
    window=True,
    generated=_rope_freqs,
    samples={
        "": _sample
        | {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 320,
            "final_logit_softcapping": 4.0,
        },
        "experts": _sample
        | {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "tie_word_embeddings": False,
        },
    },
)
ARCH = (
    TEXT,
    replace(
        TEXT,
        hf=("Gemma4ForConditionalGeneration",),
        model_type="gemma4",
        told_by=lambda get: False,  # its text part goes back as a Gemma4ForCausalLM
        others=re.compile(r"(vision_tower|audio_tower|embed_vision|embed_audio)\."),
        samples={
            "": _sample | {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 4.0, "tie_word_embeddings": False},
        },
    ),
    replace(
        TEXT,
        hf=("Gemma4UnifiedForConditionalGeneration",),
        model_type="gemma4_unified",
        told_by=lambda get: False,
        others=re.compile(r"(vision_embedder|audio_embedder|vision_tower|audio_tower|embed_vision|embed_audio)\."),
        defaults={
            **TEXT.defaults,
            "hidden_size_per_layer_input": 0,
            "max_position_embeddings": 262144,
            "sliding_window": 1024,
        },
        samples={"": _sample | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}},
    ),
)
