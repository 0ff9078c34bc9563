"""Decoders without a head, whose hidden states are what they are for: one vector for each token, or pooled for a text."""

import re
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .gemma3 import TEXT as GEMMA3
from .lfm2 import ARCH as LFM2
from .llama import ARCH as LLAMA
from .qwen2 import ARCH as QWEN2
from .qwen3 import ARCH as QWEN3
from .tensors import From, Tensor

_POOLING = gguf.Keys.LLM.POOLING_TYPE


def _bare(origin: str | From) -> From:
    """Where a model without a head has it: its names have no model before them."""
    given = From(origin) if isinstance(origin, str) else origin
    return replace(given, name=given.name.removeprefix("model."))


def _headless(arch: Arch, hf: str, **changes: Any) -> Arch:
    """The decoder of `arch` alone. Its file says how vectors are pooled, if only "not at all", which tells it from a model
    whose head is its embedding."""
    tensors: dict[str, Tensor] = {
        role: replace(t, checkpoint=tuple(map(_bare, t.origins)), also=tuple(map(_bare, t.also)))
        for role, t in arch.tensors.items()
        if role != "output"
    }
    made = replace(
        arch,
        hf=(hf,),
        model_type=arch.model_type or arch.name,
        tensors=tensors,
        pooled=True,
        skipped=re.compile(rf"{arch.skipped.pattern}|^lm_head\.weight$"),
        told_by=lambda get: get(_POOLING) is not None,
    )
    return replace(made, **changes)


ARCH = (
    _headless(LLAMA, "LlamaModel"),
    _headless(QWEN2, "Qwen2Model"),
    _headless(QWEN3, "Qwen3Model"),
    _headless(LFM2[0], "Lfm2Model"),
    _headless(
        GEMMA3,
        "Gemma3TextModel",
        name="gemma-embedding",
        defaults={**GEMMA3.defaults, "use_bidirectional_attention": False},
        implied={**GEMMA3.implied, "use_bidirectional_attention": True},
        samples={k: {**v, "use_bidirectional_attention": True} for k, v in GEMMA3.samples.items()},
    ),
)
