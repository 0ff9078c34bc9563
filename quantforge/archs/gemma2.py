"""Gemma 2: norms around both halves of a block, soft caps, every other layer with a window."""

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .tensors import Tensor
from .weight import PLUS_ONE

_att = gguf.Keys.Attention
_LAYER = "model.layers.{bid}."

ARCH = Arch(
    hf=("Gemma2ForCausalLM",),
    name="gemma2",
    tensors={role: t for role, t in DECODER.items() if role != "output"}
    | {
        "output_norm": Tensor(("embd",), "model.norm", value=PLUS_ONE),
        "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", value=PLUS_ONE),
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm", value=PLUS_ONE),
        "ffn_norm": Tensor(("embd",), _LAYER + "pre_feedforward_layernorm", value=PLUS_ONE),
        "post_ffw_norm": Tensor(("embd",), _LAYER + "post_feedforward_layernorm", value=PLUS_ONE),
    },
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    metadata_keys={
        **METADATA,
        _att.SLIDING_WINDOW: ("sliding_window", int),
        gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING: ("attn_logit_softcapping", float),
        gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING: ("final_logit_softcapping", float),
    },
    nullable=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    implied={
        # the graph caps always
        "attn_logit_softcapping": lambda h: h.get("attn_logit_softcapping") or 50.0,
        "final_logit_softcapping": lambda h: h.get("final_logit_softcapping") or 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        # of the 27B with its 46 layers the graph takes hidden_size / heads, else the head size
        "query_pre_attn_scalar": lambda h: (
            h["hidden_size"] // h["num_attention_heads"] if h["num_hidden_layers"] == 46 else h["key_length"]
        ),
        "layer_types": lambda h: ["full_attention" if i % 2 else "sliding_attention" for i in range(h["num_hidden_layers"])],
    },
    window=True,
    samples={
        "": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, "tie_word_embeddings": True},
        "caps": {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 64,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    },
)
