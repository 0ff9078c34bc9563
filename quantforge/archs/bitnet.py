"""BitNet b1.58 with SiLU: norms inside of attention and MLP. The weights are kept as they are, not made ternary."""

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .tensors import Tensor

_LAYER = "model.layers.{bid}."

ARCH = Arch(
    hf=("BitNetForCausalLM",),
    name="bitnet",
    tensors={role: t for role, t in DECODER.items() if role != "output"}
    | {
        "attn_sub_norm": Tensor(("embd",), _LAYER + "self_attn.attn_sub_norm"),
        "ffn_sub_norm": Tensor(("ff",), _LAYER + "mlp.ffn_sub_norm"),
    },
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
    },
    metadata_keys={k: v for k, v in METADATA.items() if v[0] != "head_dim"},
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
    },
    samples={"": {"hidden_size": 96, "hidden_act": "silu", "tie_word_embeddings": True}},
)
