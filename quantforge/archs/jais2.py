"""Jais 2: LayerNorm, biases everywhere, squared ReLU."""

from dataclasses import replace

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA

_att, _rope = gguf.Keys.Attention, gguf.Keys.Rope

ARCH = Arch(
    hf=("Jais2ForCausalLM",),
    name="jais2",
    tensors={
        role: t if role in ("token_embd", "output") else replace(t, bias=True)
        for role, t in DECODER.items()
        if role != "ffn_gate"
    },
    defaults={"max_position_embeddings": 8192, "layer_norm_eps": 1e-5},
    metadata_keys={
        **METADATA,
        _att.LAYERNORM_EPS: ("layer_norm_eps", float),
        _rope.DIMENSION_COUNT: ("key_length", int),
    },
    implied={"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True},
    samples={
        "": {"head_dim": 24, "hidden_size": 96},
        "tied": {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    },
)
