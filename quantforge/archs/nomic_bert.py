"""Nomic BERT, dense: BERT with rotary embedding and a gated MLP."""

import gguf

from .base import Arch
from .keys import METADATA
from .tensors import Tensor

_att, _token = gguf.Keys.Attention, gguf.Keys.Tokenizer
_LAYER, _NEWER = "encoder.layers.{bid}.", "layers.{bid}."

ARCH = Arch(
    hf=("NomicBertModel",),
    name="nomic-bert",
    model_type="nomic_bert",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "embeddings.word_embeddings"),
        "token_embd_norm": Tensor(("embd",), "emb_ln", bias=True, also=("embeddings.LayerNorm",)),
        "token_types": Tensor(("types", "embd"), "embeddings.token_type_embeddings"),
        "attn_qkv": Tensor(("3*embd", "embd"), _LAYER + "attn.Wqkv"),
        "attn_output": Tensor(("embd", "embd"), _LAYER + "attn.out_proj", also=(_NEWER + "self_attn.o_proj",)),
        "attn_output_norm": Tensor(("embd",), _LAYER + "norm1", bias=True, also=(_NEWER + "post_attention_layernorm",)),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "mlp.fc11", also=(_NEWER + "mlp.up_proj",)),
        "ffn_gate": Tensor(("ff", "embd"), _LAYER + "mlp.fc12", also=(_NEWER + "mlp.gate_proj",)),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "mlp.fc2", also=(_NEWER + "mlp.down_proj",)),
        "layer_output_norm": Tensor(("embd",), _LAYER + "norm2", bias=True, also=(_NEWER + "post_mlp_layernorm",)),
    },
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "rope_theta": 1000.0},
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] not in ("num_key_value_heads", "head_dim")},
        _att.LAYERNORM_EPS: ("layer_norm_eps", float),
        _token.TOKEN_TYPE_COUNT: ("type_vocab_size", int),
    },
    computed=lambda h: {_att.CAUSAL: False},
    dims=lambda h, layer: {"types": h["type_vocab_size"]},
    implied={"hidden_act": "silu", "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"]},
    samples={"": {"num_key_value_heads": None, "pad_token_id": 0, "hidden_size": 96}},
)
