"""Phi 1, 1.5 and 2: attention and MLP beside each other after one LayerNorm; biases everywhere, of the head too."""

import gguf

from .base import Arch
from .keys import METADATA
from .rope import rotated, rotated_part
from .tensors import Tensor, one_of

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_LAYER = "model.layers.{bid}."

ARCH = Arch(
    hf=("PhiForCausalLM",),
    name="phi2",
    model_type="phi",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "model.embed_tokens"),
        "output_norm": Tensor(("embd",), "model.final_layernorm", bias=True),
        "output": Tensor(("vocab", "embd"), "lm_head", bias=True),
        "attn_norm": Tensor(("embd",), _LAYER + "input_layernorm", bias=True),
        "attn_q": Tensor(("q", "embd"), _LAYER + "self_attn.q_proj", bias=True),
        "attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", bias=True),
        "attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", bias=True),
        "attn_output": Tensor(("embd", "q"), _LAYER + "self_attn.dense", bias=True),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "mlp.fc1", bias=True),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "mlp.fc2", bias=True),
    },
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    metadata_keys={**METADATA, _att.LAYERNORM_EPS: ("layer_norm_eps", float)},
    computed=lambda h: {_rope.DIMENSION_COUNT: rotated(h), gguf.Keys.Tokenizer.ADD_BOS: False},
    restored=lambda get: {
        "partial_rotary_factor": rotated_part(get, get(_llm.EMBEDDING_LENGTH) // get(_att.HEAD_COUNT)),
    },
    implied={
        "hidden_act": one_of("hidden_act", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu"),
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    },
    partial_rotary=True,
    samples={
        "": {"hidden_size": 96},
        "linear": {"num_key_value_heads": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    },
)
