"""StarCoder 2: LayerNorm, biases, an MLP without gate."""

import gguf

from .base import Arch
from .decoder import DECODER
from .keys import METADATA
from .tensors import Tensor, one_of

_att = gguf.Keys.Attention
_LAYER = "model.layers.{bid}."

ARCH = Arch(
    hf=("Starcoder2ForCausalLM",),
    name="starcoder2",
    tensors={
        "token_embd": DECODER["token_embd"],
        "output_norm": Tensor(("embd",), "model.norm", bias=True),
        "output": DECODER["output"],
        "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", bias=True),
        "attn_q": Tensor(("q", "embd"), _LAYER + "self_attn.q_proj", bias=True),
        "attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", bias=True),
        "attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", bias=True),
        "attn_output": Tensor(("embd", "q"), _LAYER + "self_attn.o_proj", bias=True),
        "ffn_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm", bias=True),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "mlp.c_fc", bias=True),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "mlp.c_proj", bias=True),
    },
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    metadata_keys={**METADATA, _att.LAYERNORM_EPS: ("norm_epsilon", float)},
    implied={
        "hidden_act": one_of("hidden_act", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"),
        "use_bias": True,
    },
    samples={
        "": {"hidden_size": 96},
        "yarn": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 5000.0,
                "original_max_position_embeddings": 32,
            },
        },
    },
)
