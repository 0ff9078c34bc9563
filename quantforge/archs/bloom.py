"""BLOOM: ALiBi instead of positions, a norm after the embedding."""

import gguf

from .base import Arch
from .gpt_neox import per_head
from .tensors import Tensor

_llm, _att = gguf.Keys.LLM, gguf.Keys.Attention
_H = "transformer.h.{bid}."

ARCH = Arch(
    hf=("BloomForCausalLM",),
    name="bloom",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "transformer.word_embeddings"),
        "token_embd_norm": Tensor(("embd",), "transformer.word_embeddings_layernorm", bias=True),
        "output_norm": Tensor(("embd",), "transformer.ln_f", bias=True),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        "attn_norm": Tensor(("embd",), _H + "input_layernorm", bias=True),
        "attn_qkv": Tensor(("3*embd", "embd"), per_head(_H + "self_attention.query_key_value"), bias=True),
        "attn_output": Tensor(("embd", "embd"), _H + "self_attention.dense", bias=True),
        "ffn_norm": Tensor(("embd",), _H + "post_attention_layernorm", bias=True),
        "ffn_up": Tensor(("4*embd", "embd"), _H + "mlp.dense_h_to_4h", bias=True),
        "ffn_down": Tensor(("embd", "4*embd"), _H + "mlp.dense_4h_to_h", bias=True),
    },
    aliases={"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "hidden_size": ("n_embed",)},
    needed=("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    metadata_keys={
        _llm.CONTEXT_LENGTH: ("seq_length", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _llm.BLOCK_COUNT: ("n_layer", int),
        _att.HEAD_COUNT: ("n_head", int),
        _att.LAYERNORM_EPS: ("layer_norm_epsilon", float),
    },
    computed=lambda h: {
        _llm.CONTEXT_LENGTH: h.get("seq_length", h["hidden_size"]),
        _llm.FEED_FORWARD_LENGTH: 4 * h["hidden_size"],
        _att.HEAD_COUNT_KV: h["num_attention_heads"],
    },
    implied={"apply_residual_connection_post_layernorm": False},
    rope_types=frozenset(),
    samples={
        "": {"num_key_value_heads": None, "seq_length": 512},
        "tied": {"num_key_value_heads": None, "n_head": 6, "hidden_size": 96, "tie_word_embeddings": True},
    },
)
