"""ModernBERT: rotary embedding, a fused gated MLP, windows in all layers but every third."""

from typing import Any

import gguf

from .base import Arch
from .keys import METADATA, stated
from .tensors import Config, Tensor

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_LAYER = "model.layers.{bid}."
_FREQ_BASE_SWA = "{arch}.rope.freq_base_swa"
_HIDDEN_ACT = "{arch}.hidden_activation"


def _every(h: Config) -> int:
    """One layer in how many attends to all."""
    kinds = h.get("layer_types")
    if kinds is None:
        return int(stated(h, "global_attn_every_n_layers", int))
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return full[1] if len(full) > 1 else len(kinds)


def _local_theta(h: Config) -> float:
    given: Any = (h.get("rope_parameters") or {}).get("sliding_attention") or {}
    return float(given.get("rope_theta", h["local_rope_theta"]))


ARCH = Arch(
    hf=("ModernBertModel",),
    name="modern-bert",
    model_type="modernbert",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "model.embeddings.tok_embeddings"),
        "token_embd_norm": Tensor(("embd",), "model.embeddings.norm"),
        "output_norm": Tensor(("embd",), "model.final_norm"),
        "attn_norm": Tensor(("embd",), _LAYER + "attn_norm", where="!first"),
        "attn_qkv": Tensor(("3*embd", "embd"), _LAYER + "attn.Wqkv"),
        "attn_output": Tensor(("embd", "embd"), _LAYER + "attn.Wo"),
        "ffn_norm": Tensor(("embd",), _LAYER + "mlp_norm"),
        "ffn_up": Tensor(("2*ff", "embd"), _LAYER + "mlp.Wi"),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "mlp.Wo"),
    },
    aliases={"rope_theta": ("global_rope_theta",)},
    defaults={
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "hidden_activation": "gelu",
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] not in ("num_key_value_heads", "head_dim")},
        _att.LAYERNORM_EPS: ("norm_eps", float),
        _att.SLIDING_WINDOW: ("local_attention", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _HIDDEN_ACT: ("hidden_activation", str),
        _FREQ_BASE_SWA: ("local_rope_theta", float),
    },
    computed=lambda h: {
        _att.CAUSAL: False,
        _att.SLIDING_WINDOW_PATTERN: _every(h),
        _FREQ_BASE_SWA: _local_theta(h),
        _rope.SCALING_TYPE: gguf.RopeScalingType.NONE.value,
    },
    restored=lambda get: {
        "global_attn_every_n_layers": int(get(_att.SLIDING_WINDOW_PATTERN) or 3),
        "global_rope_theta": float(get(_rope.FREQ_BASE)),
    },
    layers=lambda h: [("first",), *[()] * (h["num_hidden_layers"] - 1)],
    implied={
        "layer_types": lambda h: [
            "sliding_attention" if i % _every(h) else "full_attention" for i in range(h["num_hidden_layers"])
        ],
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    window=True,
    pooled=True,
    rope_types=frozenset({"default"}),
    samples={
        "": {
            "num_key_value_heads": None,
            "hidden_size": 96,
            "local_attention": 32,
            "pad_token_id": 0,
            "num_hidden_layers": 5,
        },
        "silu": {
            "num_key_value_heads": None,
            "local_attention": 62,
            "pad_token_id": 0,
            "hidden_activation": "silu",
            "global_attn_every_n_layers": 2,
        },
    },
)
