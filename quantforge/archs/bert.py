"""BERT and its kin, whose files differ by nothing: positions counted from elsewhere, other names of the same tensors.

Poolers and heads are not part of the graph, which gives one vector for each token; a BERT comes back without them.
"""

import re
from dataclasses import replace
from typing import Any

import gguf
import numpy as np

from .base import Arch
from .keys import METADATA, Keys
from .tensors import Config, From, Tensor, one_of

_llm, _att, _token = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Tokenizer
_LAYER = "encoder.layer.{bid}."
_EMBEDDINGS = {
    "token_embd": Tensor(("vocab", "embd"), "embeddings.word_embeddings"),
    "token_embd_norm": Tensor(("embd",), "embeddings.LayerNorm", bias=True),
}
_METADATA: Keys = {
    **{k: v for k, v in METADATA.items() if v[0] in ("num_hidden_layers", "hidden_size", "intermediate_size")},
    _att.HEAD_COUNT: ("num_attention_heads", int),
    _att.LAYERNORM_EPS: ("layer_norm_eps", float),
    _token.TOKEN_TYPE_COUNT: ("type_vocab_size", int),
}


def _computed(h: Config) -> dict[str, Any]:
    return {_llm.CONTEXT_LENGTH: h["max_position_embeddings"] - _first(h), _att.CAUSAL: False}


def _first(h: Config) -> int:
    """The row of position_embeddings that is the first token's."""
    return int(h["pad_token_id"]) + 1


_bert = Arch(
    hf=("BertModel",),
    name="bert",
    tensors={
        **_EMBEDDINGS,
        "position_embd": Tensor(("context", "embd"), "embeddings.position_embeddings"),
        "token_types": Tensor(("types", "embd"), "embeddings.token_type_embeddings"),
        "attn_q": Tensor(("embd", "embd"), _LAYER + "attention.self.query", bias=True),
        "attn_k": Tensor(("embd", "embd"), _LAYER + "attention.self.key", bias=True),
        "attn_v": Tensor(("embd", "embd"), _LAYER + "attention.self.value", bias=True),
        "attn_output": Tensor(("embd", "embd"), _LAYER + "attention.output.dense", bias=True),
        "attn_output_norm": Tensor(("embd",), _LAYER + "attention.output.LayerNorm", bias=True),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "intermediate.dense", bias=True),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "output.dense", bias=True),
        "layer_output_norm": Tensor(("embd",), _LAYER + "output.LayerNorm", bias=True),
    },
    defaults={"max_position_embeddings": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2},
    metadata_keys={**_METADATA, _llm.CONTEXT_LENGTH: ("max_position_embeddings", int)},
    computed=lambda h: {_att.CAUSAL: False},
    dims=lambda h, layer: {"types": h["type_vocab_size"]},
    implied={
        "hidden_act": one_of("hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh"),
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    rope_types=frozenset(),
    pooled=True,
    skipped=re.compile(r"(^|\.)(pooler\.dense\.(weight|bias)|embeddings\.position_ids)$"),
    samples={"": {"num_key_value_heads": None, "type_vocab_size": 3, "pad_token_id": 0}},
)


def _from_pad(*names: str, sample: dict[str, Any]) -> Arch:
    """A BERT whose positions begin after the padding token's number. It comes back as BERT, which is the same."""
    rows = From(
        "embeddings.position_embeddings",
        ("positions", "embd"),
        rows=lambda s: np.arange(s["positions"] - s["context"], s["positions"], dtype=np.int64),
    )
    return replace(
        _bert,
        hf=names,
        tensors={**_bert.tensors, "position_embd": Tensor(("context", "embd"), rows)},
        defaults={**_bert.defaults, "pad_token_id": 1},
        computed=_computed,
        dims=lambda h, layer: {
            "types": h["type_vocab_size"],
            "positions": h["max_position_embeddings"],
            "context": h["max_position_embeddings"] - _first(h),
        },
        model_type=names[0].removesuffix("Model").lower(),
        told_by=lambda get: False,
        samples={"": {"num_key_value_heads": None, "pad_token_id": 1, **sample}},
    )


_distil = replace(
    _bert,
    hf=("DistilBertModel",),
    model_type="distilbert",
    tensors={
        **_EMBEDDINGS,
        "position_embd": _bert.tensors["position_embd"],
        **{
            role: replace(_bert.tensors[role], checkpoint="transformer.layer.{bid}." + name)
            for role, name in {
                "attn_q": "attention.q_lin",
                "attn_k": "attention.k_lin",
                "attn_v": "attention.v_lin",
                "attn_output": "attention.out_lin",
                "attn_output_norm": "sa_layer_norm",
                "ffn_up": "ffn.lin1",
                "ffn_down": "ffn.lin2",
                "layer_output_norm": "output_layer_norm",
            }.items()
        },
    },
    aliases={
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
    defaults={"max_position_embeddings": 512},
    metadata_keys={
        _llm.BLOCK_COUNT: ("n_layers", int),
        _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
        _llm.EMBEDDING_LENGTH: ("dim", int),
        _llm.FEED_FORWARD_LENGTH: ("hidden_dim", int),
        _att.HEAD_COUNT: ("n_heads", int),
    },
    computed=lambda h: {_att.LAYERNORM_EPS: 1e-12, _token.TOKEN_TYPE_COUNT: 1, _att.CAUSAL: False},
    dims=None,
    implied={"activation": one_of("activation", "gelu", "gelu_new", "gelu_pytorch_tanh")},
    told_by=lambda get: get("token_embd.weight") is not None and get("token_types.weight") is None,
    samples={"": {"num_key_value_heads": None, "pad_token_id": 0}},
)

ARCH = (
    _bert,
    _from_pad("RobertaModel", "XLMRobertaModel", sample={"type_vocab_size": 1, "max_position_embeddings": 300}),
    _from_pad("CamembertModel", sample={"type_vocab_size": 1}),
    _distil,
)
