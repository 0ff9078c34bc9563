"""Types that people ask for by the names of other tools: never taken silently, always with what is meant."""

from __future__ import annotations

import re

import pytest

import quantforge as qf
from quantforge import codecs, recipes
from quantforge.codecs.spoken import meant
from quantforge.demo import MODEL
from quantforge.errors import QuantForgeError, RecipeError

MEANT = {
    "int4": "4 bits are Q4_K_M .*in GGUF; in a checkpoint directory int4-g128-sym, nf4 .*--bits 4",
    "4bit": "4 bits are Q4_K_M",
    "4-bit": "4 bits are Q4_K_M",
    "load_in_4bit": "4 bits are Q4_K_M",
    "AWQ-4bit": "4 bits are Q4_K_M",
    "q8": "8 bits are Q8_0 in GGUF; .*int8-channel-sym",
    "int8": "8 bits are Q8_0",
    "q5": "5 bits are Q5_K_M in GGUF\\)",
    "int8_float16": "8 bits are Q8_0",
    "7bit": "none has as many",
    "fp8": "GGUF has no FP8, but Q8_0",
    "float8_e4m3fn": "GGUF has no FP8, but Q8_0",
    "fp16": "that is F16",
    "half": "that is F16",
    "float32": "that is F32",
    "bfloat16": "that is BF16",
    "w4a16": "--format compressed-tensors -t W4A16",
    "gptq": "--format gptq --bits 4",
    "exl2": "not written",
    "Q4_KM": "did you mean Q4_K_M",
}


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_is_said(name: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown type or recipe {name} \\(.*{MEANT[name]}"):
        recipes.get(name)
    if "did you mean" not in MEANT[name]:
        with pytest.raises(RecipeError, match=f"--tensor-type .*: unknown type {name} \\(.*{MEANT[name]}"):
            recipes.get("Q4_0").with_rules([f"ffn={name}"])


def test_what_is_suggested_is_there() -> None:
    for said in map(meant, MEANT):
        for name in re.findall(r"\b(?:[QIF]+\d\w+|(?:int|nf|fp)\d[\w-]*)\b", said):
            assert name == "FP8" or recipes.get(name)


def test_a_type_that_gguf_cannot_hold(tmp_path) -> None:
    for name in ("nf4", "fp8-channel"):
        assert codecs.get(name)
        with pytest.raises(QuantForgeError, match=f"gguf files cannot hold {name} \\(.*Q[48]_"):
            qf.convert(MODEL, tmp_path / "m.gguf", name)
