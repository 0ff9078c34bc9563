"""Cohere's Command: attention and MLP side by side after one LayerNorm without bias, logits scaled."""

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM
from .keys import METADATA
from .tensors import ScaleGroup, Tensor
from .windows import restored_types, usual_types, window_pattern

_att, _llm, _rp = gguf.Keys.Attention, gguf.Keys.LLM, gguf.Keys.Rope
_tensors = {role: t for role, t in DECODER.items() if role not in ("ffn_norm", "output")}
_metadata = {
    **{k: v for k, v in METADATA.items() if k != _att.LAYERNORM_RMS_EPS},
    _att.LAYERNORM_EPS: ("layer_norm_eps", float),
    _llm.LOGIT_SCALE: ("logit_scale", float),
}
_defaults = {
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}
_implied = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    # the graph takes the head size from these
    "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
}
_groups = (ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")), ScaleGroup("ffn_up", ("ffn_down",)))

COMMAND_R = Arch(
    hf=("CohereForCausalLM",),
    name="command-r",
    model_type="cohere",
    tensors=_tensors
    | {
        "attn_q_norm": Tensor(("heads", "head"), QK_NORM["attn_q_norm"].checkpoint, where="normed"),
        "attn_k_norm": Tensor(("kv_heads", "head"), QK_NORM["attn_k_norm"].checkpoint, where="normed"),
    },
    scale_groups=_groups,
    defaults={**_defaults, "rope_theta": 5e5},
    aliases={"max_position_embeddings": ("model_max_length",)},  # the length that it was trained with, as llama.cpp does
    metadata_keys=_metadata,
    computed=lambda h: {_rp.SCALING_TYPE: "none"},
    # the graph looks for norms of queries and keys in models of 64 layers and more
    implied={**_implied, "use_qk_norm": lambda h: h["num_hidden_layers"] >= 64},
    layers=lambda h: [{"normed"} if h["num_hidden_layers"] >= 64 else ()] * h["num_hidden_layers"],
    rope_types=frozenset({"default"}),
    samples={
        "": {"logit_scale": 0.5, "tie_word_embeddings": True},
        "deep": {
            "num_hidden_layers": 64,
            "use_qk_norm": True,
            "hidden_size": 32,
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
        },
    },
)
COMMAND_R7B = Arch(
    hf=("Cohere2ForCausalLM",),
    name="cohere2",
    tensors=_tensors,
    scale_groups=_groups,
    defaults={**_defaults, "sliding_window": 4096},
    metadata_keys={
        **_metadata,
        _att.SLIDING_WINDOW: ("sliding_window", int),
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _rp.DIMENSION_COUNT: ("key_length", int),
    },
    computed=lambda h: {_rp.SCALING_TYPE: "none", **window_pattern(h, 4, always=False)},
    restored=lambda get: {"layer_types": restored_types(get, 4)},
    implied={**_implied, "rotary_pct": 1.0},
    rope_types=frozenset({"default"}),
    window=True,
    samples={
        "": {"logit_scale": 0.5, "sliding_window": 32, "num_hidden_layers": 8, "tie_word_embeddings": True},
        "alternating": {
            "logit_scale": 0.4,
            "sliding_window": 48,
            "layer_types": usual_types(5, 2),
            "num_hidden_layers": 5,
            "tie_word_embeddings": True,
        },
    },
)
ARCH = (COMMAND_R, COMMAND_R7B)
