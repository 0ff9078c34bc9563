"""Granite with windows: a sink in each head's attention, layers without rotary embedding."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .decoder import rope_freqs
from .granite import DEFAULTS, MULTIPLIERS
from .keys import PAIRED_METADATA
from .llama import ARCH as LLAMA
from .llama import ROPE_TYPES
from .tensors import Config, From, Tensor
from .windows import restored_types, window_pattern

_att = gguf.Keys.Attention
_ROPE_PATTERN = "{arch}.attention.rope_pattern"


def _usual(layers: int) -> list[str]:
    return ["sliding_attention" if i % 4 else "full_attention" for i in range(layers)]


def _computed(h: Config) -> dict[str, Any]:
    kinds = h.get("layer_types") or _usual(h["num_hidden_layers"])
    theta = h["rope"]["rope_theta"]
    each = h.get("layer_rope_theta") or [theta] * len(kinds)
    if any(t and t != theta for t in each):
        raise UnsupportedError(f"config.json: layer_rope_theta = {each}: llama.cpp's graph has one base, {theta}, or none")
    return {**window_pattern({**h, "layer_types": kinds}, 4), _ROPE_PATTERN: [bool(t) for t in each]}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    theta = float(get(gguf.Keys.Rope.FREQ_BASE) or 10000.0)
    rotates = get(_ROPE_PATTERN)
    config: dict[str, Any] = {"layer_types": restored_types(get, 4)}
    return config if rotates is None else config | {"layer_rope_theta": [theta if r else 0.0 for r in rotates]}


ARCH = Arch(
    hf=("GraniteSWAForCausalLM",),
    name="granite_swa",
    tensors={
        **LLAMA.tensors,
        "attn_sinks": Tensor(("heads",), From("model.layers.{bid}.self_attn.sinks", suffix="")),
    },
    scale_groups=LLAMA.scale_groups,
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "tie_word_embeddings": True,
    },
    metadata_keys={**PAIRED_METADATA, **MULTIPLIERS, _att.SLIDING_WINDOW: ("sliding_window", int)},
    computed=_computed,
    restored=_restored,
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    window=True,
    generated=rope_freqs,
    samples={
        "": {
            "num_hidden_layers": 6,
            "sliding_window": 32,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
            "layer_rope_theta": [10000.0, 0.0, 10000.0, 10000.0, 0.0, 10000.0],
        },
    },
)
