"""GPT-2: learned positions, LayerNorm, matrices stored as [in, out]."""

import re

import gguf

from .base import Arch
from .tensors import From, Tensor, one_of

_llm, _att = gguf.Keys.LLM, gguf.Keys.Attention
_H = "transformer.h.{bid}."
GPT2_METADATA = {
    _llm.BLOCK_COUNT: ("n_layer", int),
    _llm.CONTEXT_LENGTH: ("n_positions", int),
    _llm.EMBEDDING_LENGTH: ("n_embd", int),
    _llm.FEED_FORWARD_LENGTH: ("n_inner", int),
    _att.HEAD_COUNT: ("n_head", int),
    _att.LAYERNORM_EPS: ("layer_norm_epsilon", float),
}
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
GPT2_DEFAULTS = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
OUTSIDE = {
    "token_embd": Tensor(("vocab", "embd"), "transformer.wte"),
    "position_embd": Tensor(("context", "embd"), "transformer.wpe"),
    "output_norm": Tensor(("embd",), "transformer.ln_f", bias=True),
    "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
}
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$")

ARCH = Arch(
    hf=("GPT2LMHeadModel",),
    name="gpt2",
    tensors=OUTSIDE
    | {
        "attn_norm": Tensor(("embd",), _H + "ln_1", bias=True),
        "attn_qkv": Tensor(("3*embd", "embd"), From(_H + "attn.c_attn", ("embd", "3*embd"), groups="1"), bias=True),
        "attn_output": Tensor(("embd", "embd"), From(_H + "attn.c_proj", ("embd", "embd"), groups="1"), bias=True),
        "ffn_norm": Tensor(("embd",), _H + "ln_2", bias=True),
        "ffn_up": Tensor(("ff", "embd"), From(_H + "mlp.c_fc", ("embd", "ff"), groups="1"), bias=True),
        "ffn_down": Tensor(("embd", "ff"), From(_H + "mlp.c_proj", ("ff", "embd"), groups="1"), bias=True),
    },
    aliases=GPT2_ALIASES,
    needed=NEEDED,
    defaults=GPT2_DEFAULTS,
    metadata_keys=GPT2_METADATA,
    computed=lambda h: {_llm.FEED_FORWARD_LENGTH: h.get("n_inner") or 4 * h["hidden_size"]},
    dims=lambda h, layer: {"ff": h.get("n_inner") or 4 * h["hidden_size"], "context": h["n_positions"]},
    implied={
        "activation_function": one_of("activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    rope_types=frozenset(),
    skipped=BUFFERS,
    samples={
        "": {"num_key_value_heads": None, "n_inner": 96},
        "tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
    },
)
