"""StableLM: LayerNorm, rotary embedding of a part of each head."""

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .rope import rotated, rotated_part
from .tensors import ScaleGroup, Tensor

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_LAYER = "model.layers.{bid}."

ARCH = Arch(
    hf=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    name="stablelm",
    tensors=DECODER
    | {
        "output_norm": Tensor(("embd",), "model.norm", bias=True),
        "output": Tensor(("vocab", "embd"), "lm_head"),
        "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", bias=True),
        "attn_q": Tensor(("q", "embd"), _LAYER + "self_attn.q_proj", bias="use_qkv_bias"),
        "attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", bias="use_qkv_bias"),
        "attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", bias="use_qkv_bias"),
        "attn_q_norm": Tensor(("heads", "head"), _LAYER + "self_attn.q_layernorm.norms.{eid}", where="qk norm"),
        "attn_k_norm": Tensor(("kv_heads", "head"), _LAYER + "self_attn.k_layernorm.norms.{eid}", where="qk norm"),
        "ffn_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm", bias=True, where="!parallel"),
    },
    scale_groups=(ScaleGroup("attn_v", ("attn_output",)), ScaleGroup("ffn_up", ("ffn_down",))),
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    metadata_keys={
        **METADATA,
        _llm.USE_PARALLEL_RESIDUAL: ("use_parallel_residual", bool),
        _att.LAYERNORM_EPS: ("layer_norm_eps", float),
    },
    computed=lambda h: {_rope.DIMENSION_COUNT: rotated(h)},
    restored=lambda get: {
        "partial_rotary_factor": rotated_part(get, get(_llm.EMBEDDING_LENGTH) // get(_att.HEAD_COUNT)),
        "qk_layernorm": get("blk.0.attn_q_norm.weight") is not None,
        "use_parallel_residual": get("blk.0.ffn_norm.weight") is None,
    },
    layers=lambda h: (
        [tuple(kind for kind, key in (("qk norm", "qk_layernorm"), ("parallel", "use_parallel_residual")) if h[key])]
        * h["num_hidden_layers"]
    ),
    implied={"hidden_act": "silu", "tie_word_embeddings": False},
    partial_rotary=True,
    samples={
        "": {"use_qkv_bias": True, "hidden_size": 96},
        "parallel": {
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    },
)
