"""StarCoder 1 and SantaCoder: GPT-2 with one head of keys and values for all."""

import gguf

from .base import Arch
from .gpt2 import BUFFERS, GPT2_ALIASES, GPT2_DEFAULTS, GPT2_METADATA, NEEDED, OUTSIDE
from .tensors import Tensor, one_of

_llm, _att = gguf.Keys.LLM, gguf.Keys.Attention
_H = "transformer.h.{bid}."

ARCH = Arch(
    hf=("GPTBigCodeForCausalLM",),
    name="starcoder",
    model_type="gpt_bigcode",
    tensors=OUTSIDE
    | {
        "attn_norm": Tensor(("embd",), _H + "ln_1", bias=True),
        "attn_qkv": Tensor(("embd+head+head", "embd"), _H + "attn.c_attn", bias=True),
        "attn_output": Tensor(("embd", "embd"), _H + "attn.c_proj", bias=True),
        "ffn_norm": Tensor(("embd",), _H + "ln_2", bias=True),
        "ffn_up": Tensor(("ff", "embd"), _H + "mlp.c_fc", bias=True),
        "ffn_down": Tensor(("embd", "ff"), _H + "mlp.c_proj", bias=True),
    },
    aliases=GPT2_ALIASES,
    needed=NEEDED,
    defaults=GPT2_DEFAULTS,
    metadata_keys=GPT2_METADATA,
    computed=lambda h: {_llm.FEED_FORWARD_LENGTH: h.get("n_inner") or 4 * h["hidden_size"], _att.HEAD_COUNT_KV: 1},
    dims=lambda h, layer: {"ff": h.get("n_inner") or 4 * h["hidden_size"], "context": h["n_positions"]},
    implied={
        "activation_function": one_of("activation_function", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"),  # one in ggml
        "scale_attn_weights": True,
        "multi_query": True,
        "add_cross_attention": False,
    },
    rope_types=frozenset(),
    skipped=BUFFERS,
    samples={
        "": {"num_key_value_heads": None, "n_inner": 96},
        "tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
    },
)
