"""GPT-NeoX and Pythia: rotary embedding of a part of each head, both halves of a block beside each other."""

import gguf

from .base import Arch
from .keys import METADATA
from .rope import rotated, rotated_part
from .tensors import From, Tensor, one_of, part

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_LAYER = "gpt_neox.layers.{bid}."


def per_head(name: str, heads: str = "heads", queries: str = "head") -> tuple[From, ...]:
    """All queries, all keys, all values of a matrix that has them head by head; queries: rows of these in each."""
    return tuple(From(name, rows=part(i, queries, "head", "head", per=heads)) for i in range(3))


ARCH = Arch(
    hf=("GPTNeoXForCausalLM",),
    name="gptneox",
    model_type="gpt_neox",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "gpt_neox.embed_in"),
        "output_norm": Tensor(("embd",), "gpt_neox.final_layer_norm", bias=True),
        "output": Tensor(("vocab", "embd"), "embed_out", also=("lm_head",)),
        "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", bias=True),
        "attn_qkv": Tensor(("3*q", "embd"), per_head(_LAYER + "attention.query_key_value"), bias=True),
        "attn_output": Tensor(("embd", "q"), _LAYER + "attention.dense", bias=True),
        "ffn_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm", bias=True),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "mlp.dense_h_to_4h", bias=True),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "mlp.dense_4h_to_h", bias=True),
    },
    aliases={"rope_theta": ("rotary_emb_base",), "partial_rotary_factor": ("rotary_pct",)},
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_parallel_residual": True,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] not in ("num_key_value_heads", "head_dim", "rms_norm_eps")},
        _llm.USE_PARALLEL_RESIDUAL: ("use_parallel_residual", bool),
        _att.LAYERNORM_EPS: ("layer_norm_eps", float),
    },
    computed=lambda h: {_rope.DIMENSION_COUNT: rotated(h)},
    restored=lambda get: {
        "rotary_emb_base": float(get(_rope.FREQ_BASE) or 10000.0),
        "rotary_pct": rotated_part(get, get(_llm.EMBEDDING_LENGTH) // get(_att.HEAD_COUNT)),
    },
    implied={
        "hidden_act": one_of("hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    partial_rotary=True,
    samples={
        "": {"num_key_value_heads": None, "hidden_size": 96},
        "sequential": {
            "num_key_value_heads": None,
            "use_parallel_residual": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    },
)
