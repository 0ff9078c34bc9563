"""Presets against llama-quantize's own choices; rules, fallbacks and recipe files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import quantforge
from quantforge import codecs, recipes
from quantforge.archs.base import Weight
from quantforge.codecs import base
from quantforge.codecs.base import Codec, GgmlCodec, register
from quantforge.presets import PRESETS

DEMO = Path(quantforge.__file__).parent / "data" / "demo-model"
REFERENCE = json.loads((DEMO / "llama.cpp.json").read_text())["presets"]

ROLES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def demo_weights() -> Iterator[Weight]:
    with safe_open(DEMO / "model.safetensors", "numpy") as f:
        for name in f.keys():  # noqa: SIM118 - not a dict
            stem = name.removesuffix(".weight")
            if stem.startswith("model.layers."):
                _, _, layer, rest = stem.split(".", 3)
                gguf_name = f"blk.{layer}.{ROLES[rest]}.weight"
            else:
                gguf_name = f"{ROLES[stem]}.weight"
            yield Weight(gguf_name, tuple(f.get_slice(name).get_shape()), (name,))


def demo_metadata() -> dict[str, Any]:
    config = json.loads((DEMO / "config.json").read_text())
    return {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
    }


def all_in(weights: list[Weight], codec: str = "BF16") -> dict[str, Codec]:
    return {w.name: codecs.get(codec) for w in weights}


@pytest.fixture(scope="module", autouse=True)
def every_type() -> Iterator[None]:
    """Presets speak of types whose codecs may not be in this build: give those stand-ins with the shape rules."""
    wanted = {t for p in PRESETS.values() for t in (p.base, p.output, p.embedding or p.base, *(row[2] for row in p.rows))}
    missing = sorted((wanted | {"IQ4_NL", "MXFP4"}) - set(codecs.names()))
    for name in missing:
        register(GgmlCodec(name, size={"Q2_0": (42, 64, 18)}.get(name)))
    yield
    for name in missing:
        del base._registry[name]


@pytest.mark.parametrize("importance", ["plain", "imatrix"])
@pytest.mark.parametrize("preset", REFERENCE)
def test_shipped_model_gets_the_types_llama_quantize_chose(preset: str, importance: str) -> None:
    expected = REFERENCE[preset].get(importance)
    if not expected:
        pytest.skip("llama-quantize refuses this preset without importance")
    weights = list(demo_weights())
    names = [w.name for w in weights] if importance == "imatrix" else []
    choices = recipes.get(preset).assign(weights, demo_metadata(), all_in(weights), names)
    got = {n: c.codec.name for n, c in choices.items()}
    assert {n: t for n, t in got.items() if n in expected} == {n: t for n, (t, _) in expected.items()}
    assert {t for n, t in got.items() if n not in expected} == {"F32"}
