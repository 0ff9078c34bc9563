"""T5 1.1 and mT5: an encoder and a decoder with relative positions; the encoder alone."""

import re
from dataclasses import replace
from typing import Any

import gguf

from .base import NEEDED, Arch
from .tensors import Config, Tensor

_llm, _att = gguf.Keys.LLM, gguf.Keys.Attention


def _decoders(h: Config) -> int:
    return int(h.get("num_decoder_layers") or h["num_hidden_layers"])


def _layers(h: Config) -> list[tuple[str, ...]]:
    mlp = ("gated",) if h["feed_forward_proj"].startswith("gated") else ()
    return [
        (
            *mlp,
            *(("encoder",) if i < h["num_hidden_layers"] else ()),
            *(("decoder",) if i < _decoders(h) else ()),
            *(("first",) if i == 0 else ()),
        )
        for i in range(max(h["num_hidden_layers"], _decoders(h)))
    ]


def _attention(role: str, name: str, where: str) -> dict[str, Tensor]:
    return {
        f"{role}_q": Tensor(("q", "embd"), f"{name}.q", where=where),
        f"{role}_k": Tensor(("q", "embd"), f"{name}.k", where=where),
        f"{role}_v": Tensor(("q", "embd"), f"{name}.v", where=where),
        f"{role}_o": Tensor(("embd", "q"), f"{name}.o", where=where),
    }


def _mlp(role: str, name: str, where: str) -> dict[str, Tensor]:
    dense = f"{name}.DenseReluDense."
    return {
        f"{role}_norm": Tensor(("embd",), f"{name}.layer_norm", where=where),
        f"{role}_gate": Tensor(("ff", "embd"), dense + "wi_0", where=f"{where} & gated"),
        f"{role}_up": Tensor(("ff", "embd"), dense + "wi_1", where=f"{where} & gated"),
        f"{role}_up@dense": Tensor(("ff", "embd"), dense + "wi", where=f"{where} & !gated"),
        f"{role}_down": Tensor(("embd", "ff"), dense + "wo", where=where),
    }


def _stack(short: str, name: str, mlp: int) -> dict[str, Tensor]:
    """What both stacks have."""
    blk, layer = f"{short}.blk.{{bid}}.", f"{name}.block.{{bid}}.layer."
    return {
        f"{short}.output_norm": Tensor(("embd",), f"{name}.final_layer_norm"),
        f"{blk}attn_norm": Tensor(("embd",), f"{layer}0.layer_norm", where=name),
        f"{blk}attn_rel_b": Tensor(
            ("buckets", "heads"), f"{layer}0.SelfAttention.relative_attention_bias", where=f"{name} & first"
        ),
        **_attention(f"{blk}attn", f"{layer}0.SelfAttention", name),
        **_mlp(f"{blk}ffn", f"{layer}{mlp}", name),
    }


def _computed(h: Config) -> dict[str, Any]:
    return {
        _llm.CONTEXT_LENGTH: h.get("n_positions", 512),
        _att.VALUE_LENGTH: h["d_kv"],
        _att.LAYERNORM_EPS: h["layer_norm_epsilon"],
    }


_encoder = Arch(
    hf=("T5EncoderModel",),
    name="t5encoder",
    model_type="t5",
    tensors={"token_embd": Tensor(("vocab", "embd"), "shared"), **_stack("enc", "encoder", 1)},
    aliases={
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    needed=(*NEEDED, "d_kv", "relative_attention_num_buckets"),
    defaults={
        "d_kv": 64,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    metadata_keys={
        _llm.CONTEXT_LENGTH: ("n_positions", int),
        _llm.EMBEDDING_LENGTH: ("d_model", int),
        _llm.FEED_FORWARD_LENGTH: ("d_ff", int),
        _llm.BLOCK_COUNT: ("num_layers", int),
        _att.HEAD_COUNT: ("num_heads", int),
        _att.KEY_LENGTH: ("d_kv", int),
        _att.REL_BUCKETS_COUNT: ("relative_attention_num_buckets", int),
        _att.LAYERNORM_RMS_EPS: ("layer_norm_epsilon", float),
    },
    computed=_computed,
    restored=lambda get: {
        "feed_forward_proj": "relu" if get("enc.blk.0.ffn_gate.weight") is None else "gated-gelu",
    },
    layers=lambda h: [tuple(k for k in kinds if k != "decoder") for kinds in _layers({**h, "num_decoder_layers": None})],
    dims=lambda h, layer: {"buckets": h["relative_attention_num_buckets"], "q": h["num_attention_heads"] * h["d_kv"]},
    implied={
        "feed_forward_proj": lambda h: h["feed_forward_proj"] if h["feed_forward_proj"] == "relu" else "gated-gelu",
        "relative_attention_max_distance": 128,
    },
    rope_types=frozenset(),
    skipped=re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$|\.EncDecAttention\.relative_attention_bias\.weight$"),
    samples={"": {"num_key_value_heads": None, "d_kv": 24, "relative_attention_num_buckets": 18, "pad_token_id": 0}},
)

_SHALLOW = {"num_decoder_layers": lambda h: min(_decoders(h), h["num_hidden_layers"])}

_both = replace(
    _encoder,
    hf=("T5ForConditionalGeneration",),
    name="t5",
    tensors={
        **_encoder.tensors,
        "output": Tensor(("vocab", "embd"), "lm_head", optional=True),
        **_stack("dec", "decoder", 2),
        "dec.blk.{bid}.cross_attn_norm": Tensor(("embd",), "decoder.block.{bid}.layer.1.layer_norm", where="decoder"),
        **_attention("dec.blk.{bid}.cross_attn", "decoder.block.{bid}.layer.1.EncDecAttention", "decoder"),
    },
    metadata_keys={
        **_encoder.metadata_keys,
        "{arch}.decoder_block_count": ("num_decoder_layers", int),
        _llm.DECODER_START_TOKEN_ID: ("decoder_start_token_id", int),
    },
    block_count=lambda h: max(h["num_hidden_layers"], _decoders(h)),
    layers=_layers,
    defaults={**_encoder.defaults, "decoder_start_token_id": 0},
    implied={
        **_encoder.implied,
        **_SHALLOW,
        # T5 1.0 scales what goes into the head, which transformers does unless the config once said false
        "tie_word_embeddings": lambda h: h["tie_word_embeddings"] if h.get("scale_decoder_outputs") is False else False,
    },
    samples={
        "": {**_encoder.samples[""], "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "num_layers": 4},
        "relu": {"num_key_value_heads": None, "d_kv": 16, "pad_token_id": 0},
    },
)

ARCH = (
    _encoder,
    _both,
    replace(
        _both,
        hf=("MT5ForConditionalGeneration",),
        model_type="mt5",
        defaults={**_both.defaults, "feed_forward_proj": "gated-gelu"},
        implied={**_encoder.implied, **_SHALLOW},
        told_by=lambda get: False,
    ),
)
