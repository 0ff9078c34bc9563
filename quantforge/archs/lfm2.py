"""LFM2: short convolutions between layers of attention, dense or with experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, experts
from .keys import METADATA
from .tensors import Config, From, Sizes, Tensor

_K = gguf.Keys
_LAYER = "model.layers.{bid}."
_FF = _LAYER + "feed_forward"
_mixing = {
    "token_embd": DECODER["token_embd"],
    "token_embd_norm": Tensor(("embd",), "model.embedding_norm"),  # so it is called, and comes last
    "output": DECODER["output"],
    "attn_norm": Tensor(("embd",), _LAYER + "operator_norm"),
    **{r: replace(DECODER[r], where="full") for r in ("attn_q", "attn_k", "attn_v")},
    "attn_output": Tensor(("embd", "q"), _LAYER + "self_attn.out_proj", where="full"),
    "attn_q_norm": Tensor(("head",), _LAYER + "self_attn.q_layernorm", where="full"),
    "attn_k_norm": Tensor(("head",), _LAYER + "self_attn.k_layernorm", where="full"),
    "shortconv.conv": Tensor(("embd", "kernel"), From(_LAYER + "conv.conv", ("embd", "1", "kernel")), where="conv"),
    "shortconv.in_proj": Tensor(("3*embd", "embd"), _LAYER + "conv.in_proj", where="conv"),
    "shortconv.out_proj": Tensor(("embd", "embd"), _LAYER + "conv.out_proj", where="conv"),
    "ffn_norm": Tensor(("embd",), _LAYER + "ffn_norm"),
}
_dense = {
    "ffn_gate": Tensor(("ff", "embd"), _FF + ".w1", where="!moe"),
    "ffn_up": Tensor(("ff", "embd"), _FF + ".w3", where="!moe"),
    "ffn_down": Tensor(("embd", "ff"), _FF + ".w2", where="!moe"),
}


def _types(h: Config) -> list[str]:
    full = h.get("full_attn_idxs")
    usual = ["full_attention" if full is None or i in full else "conv" for i in range(h["num_hidden_layers"])]
    return list(h.get("layer_types") or usual)


def _layers(h: Config) -> Sequence[Collection[str]]:
    dense = h.get("num_dense_layers", h["num_hidden_layers"])
    kinds = ["full" if t == "full_attention" else "conv" for t in _types(h)]
    return [(k, "moe") if i >= dense else (k,) for i, k in enumerate(kinds)]


def _ff(h: Config) -> int:
    """The width of the MLP, which a dense model adjusts."""
    given = int(h["intermediate_size"])
    if not h.get("block_auto_adjust_ff_dim"):
        return given
    of = int(h["block_multiple_of"])
    return of * -(-int(h["block_ffn_dim_multiplier"] * int(2 * given / 3)) // of)


def _dims(h: Config, _: int | None) -> Sizes:
    return {"ff": _ff(h), "kernel": h["conv_L_cache"]}


def _computed(h: Config) -> Mapping[str, Any]:
    kv = h["num_key_value_heads"]
    keys = {
        _K.LLM.FEED_FORWARD_LENGTH: _ff(h),
        _K.Attention.HEAD_COUNT_KV: [kv if t == "full_attention" else 0 for t in _types(h)],
        "{arch}.shortconv.l_cache": h["conv_L_cache"],
    }
    if "num_dense_layers" in h:
        keys[_K.LLM.EXPERT_GATING_FUNC] = gguf.ExpertGatingFuncType.SIGMOID.value
    return keys


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    heads = [int(n) for n in get(_K.Attention.HEAD_COUNT_KV)]
    return {
        "intermediate_size": int(get(_K.LLM.FEED_FORWARD_LENGTH)),
        "block_auto_adjust_ff_dim": False,
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if n else "conv" for n in heads],
        "conv_L_cache": int(get("{arch}.shortconv.l_cache")),
    }


_keys = {k: v for k, v in METADATA.items() if k not in (_K.Attention.HEAD_COUNT_KV, _K.LLM.FEED_FORWARD_LENGTH)}
_keys |= {_K.Attention.LAYERNORM_RMS_EPS: ("norm_eps", float), _K.LLM.VOCAB_SIZE: ("vocab_size", int)}
_defaults = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "conv_L_cache": 3,
    "tie_word_embeddings": True,
}
_implied: Mapping[str, Any] = {"conv_bias": False, "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"]}

ARCH = (
    Arch(
        hf=("Lfm2ForCausalLM",),
        name="lfm2",
        tensors=_mixing | _dense,
        defaults={
            **_defaults,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
        metadata_keys=_keys,
        computed=_computed,
        restored=_restored,
        implied=_implied,
        aliases={"intermediate_size": "block_ff_dim", "tie_word_embeddings": "tie_embedding"},
        dims=_dims,
        layers=_layers,
        samples={
            "": {"layer_types": ["conv", "full_attention", "full_attention", "conv"], "block_multiple_of": 48, "conv_L_cache": 4},
            "tied": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False, "tie_embedding": True},
        },
    ),
    Arch(
        hf=("Lfm2MoeForCausalLM",),
        name="lfm2moe",
        model_type="lfm2_moe",
        tensors=_mixing
        | _dense
        | experts(_FF, where="moe", words="w1 w3 w2")
        | {"exp_probs_b": Tensor(("experts",), From(_FF + ".expert_bias", suffix=""), where="moe", suffix=".bias")},
        defaults={
            **_defaults,
            "moe_intermediate_size": 1792,
            "num_dense_layers": 2,
            "num_experts": 32,
            "num_experts_per_tok": 4,
        },
        metadata_keys={
            **_keys,
            _K.LLM.EXPERT_COUNT: ("num_experts", int),
            _K.LLM.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
            _K.LLM.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
            _K.LLM.LEADING_DENSE_BLOCK_COUNT: ("num_dense_layers", int),
        },
        computed=_computed,
        restored=_restored,
        implied={**_implied, "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
        aliases={"tie_word_embeddings": "tie_embedding"},
        dims=_dims,
        layers=_layers,
        samples={
            "": {
                "layer_types": ["conv", "full_attention", "full_attention", "conv"],
                "num_experts": 5,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
            },
            "tied": {
                "layer_types": ["full_attention", "conv", "conv", "full_attention"],
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 48,
                "num_dense_layers": 1,
                "conv_L_cache": 4,
                "tie_embedding": True,
            },
        },
    ),
)
