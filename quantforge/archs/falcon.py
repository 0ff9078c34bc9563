"""Falcon 7B, 11B, 40B: attention and MLP beside each other, one head of keys and values for all or for each group."""

from collections.abc import Callable
from typing import Any

import gguf

from .base import Arch
from .gpt_neox import per_head
from .keys import METADATA
from .tensors import Config, Tensor, one_of

_llm, _att = gguf.Keys.LLM, gguf.Keys.Attention
_H = "transformer.h.{bid}."


def _groups(h: Config) -> int:
    """Heads of keys and values."""
    return int(h["num_key_value_heads"]) if h["new_decoder_architecture"] or not h["multi_query"] else 1


def _norms(h: Config) -> int:
    """LayerNorms before a block's two halves."""
    return h.get("num_ln_in_parallel_attn") or 2 if h["new_decoder_architecture"] else 1


def _restored(get: Callable[[str], Any]) -> dict[str, Any]:
    """What says which kind of Falcon it is."""
    both = get("blk.0.attn_norm_2.weight") is not None
    groups = get(_att.HEAD_COUNT_KV)
    return {
        "new_decoder_architecture": both or groups not in (1, get(_att.HEAD_COUNT)),
        "multi_query": both or groups != get(_att.HEAD_COUNT),
        "num_ln_in_parallel_attn": 2 if both else 1,
    }


ARCH = Arch(
    hf=("FalconForCausalLM",),
    name="falcon",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "transformer.word_embeddings"),
        "output_norm": Tensor(("embd",), "transformer.ln_f", bias=True),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        "attn_norm": Tensor(("embd",), _H + "input_layernorm", bias=True, where="!two norms"),
        "blk.{bid}.attn_norm": Tensor(("embd",), _H + "ln_mlp", bias=True, where="two norms"),
        "attn_norm_2": Tensor(("embd",), _H + "ln_attn", bias=True, where="two norms"),
        "attn_qkv": Tensor(("q+kv+kv", "embd"), per_head(_H + "self_attention.query_key_value", "kv_heads", "group")),
        "attn_output": Tensor(("embd", "q"), _H + "self_attention.dense"),
        "ffn_up": Tensor(("ff", "embd"), _H + "mlp.dense_h_to_4h"),
        "ffn_down": Tensor(("embd", "ff"), _H + "mlp.dense_4h_to_h"),
    },
    aliases={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
    needed=("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "new_decoder_architecture": False,
        "multi_query": True,
        "tie_word_embeddings": True,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] != "head_dim"},
        _llm.FEED_FORWARD_LENGTH: ("ffn_hidden_size", int),
        _att.HEAD_COUNT_KV: ("num_kv_heads", int),
        _att.LAYERNORM_EPS: ("layer_norm_epsilon", float),
    },
    computed=lambda h: {
        _llm.TENSOR_DATA_LAYOUT: "jploski",
        _llm.FEED_FORWARD_LENGTH: h.get("ffn_hidden_size") or 4 * h["hidden_size"],
        _att.HEAD_COUNT_KV: _groups(h),
    },
    restored=_restored,
    dims=lambda h, layer: {
        "ff": h.get("ffn_hidden_size") or 4 * h["hidden_size"],
        "kv_heads": _groups(h),
        "kv": _groups(h) * h["key_length"],
        "group": h["num_attention_heads"] // _groups(h) * h["key_length"],
    },
    layers=lambda h: [("two norms",) if _norms(h) == 2 else ()] * h["num_hidden_layers"],
    implied={
        "activation": one_of("activation", "gelu", "gelu_new", "gelu_pytorch_tanh"),
        "alibi": False,
        "bias": False,
        "parallel_attn": True,
    },
    samples={
        "": {"num_kv_heads": None, "ffn_hidden_size": None, "num_attention_heads": 2, "hidden_size": 96},
        "groups": {"num_kv_heads": 2, "new_decoder_architecture": True, "tie_word_embeddings": True},
        "one norm": {
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        },
    },
)
