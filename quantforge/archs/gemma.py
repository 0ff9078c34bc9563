"""Gemma 1: Llama with norms as an offset from one, GELU, and embeddings scaled by √hidden_size."""

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .tensors import Tensor
from .weight import PLUS_ONE

NORMS = {
    "output_norm": Tensor(("embd",), "model.norm", value=PLUS_ONE),
    "attn_norm": Tensor(("embd",), "model.layers.{bid}.input_layernorm", value=PLUS_ONE),
    "ffn_norm": Tensor(("embd",), "model.layers.{bid}.post_attention_layernorm", value=PLUS_ONE),
}

ARCH = Arch(
    hf=("GemmaForCausalLM",),
    name="gemma",
    tensors={role: t for role, t in DECODER.items() if role != "output"} | NORMS,
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    metadata_keys=METADATA,
    implied={
        # "gelu" of the first releases means the same to transformers
        "hidden_act": lambda h: "gelu" if h.get("hidden_act") == "gelu" else "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    },
    samples={
        "": {"head_dim": 32, "tie_word_embeddings": True},
        "one key": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
)
