"""GGUF's metadata keys and the config values that they state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

from ..errors import UnsupportedError

_llm, _att, _rp = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope

Keys = Mapping[str, tuple[str, type]]
"""GGUF key, with {arch} -> key of config.json and type: int, float, bool, str, or list (one number for each layer)."""

METADATA: Keys = {
    _llm.BLOCK_COUNT: ("num_hidden_layers", int),
    _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
    _llm.EMBEDDING_LENGTH: ("hidden_size", int),
    _llm.FEED_FORWARD_LENGTH: ("intermediate_size", int),
    _att.HEAD_COUNT: ("num_attention_heads", int),
    _att.HEAD_COUNT_KV: ("num_key_value_heads", int),
    _rp.FREQ_BASE: ("rope", dict),
    _att.LAYERNORM_RMS_EPS: ("rms_norm_eps", float),
    _att.KEY_LENGTH: ("head_dim", int),
    _att.VALUE_LENGTH: ("head_dim", int),
}
"""What nearly every decoder states; an architecture adds its own after these."""

LLAMA_METADATA: Keys = {
    **METADATA,
    _att.KEY_LENGTH: ("key_length", int),
    _att.VALUE_LENGTH: ("key_length", int),
    _llm.VOCAB_SIZE: ("vocab_size", int),
    _rp.DIMENSION_COUNT: ("key_length", int),
}
"""What all models state that llama.cpp runs as llama."""

EXPERTS_OF_WHICH_SOME: Keys = {
    _llm.EXPERT_COUNT: ("num_local_experts", int),
    _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
}
"""Mixtures of experts as wide as the model's intermediate_size."""

PAIRED_METADATA: Keys = {
    **METADATA,
    _llm.VOCAB_SIZE: ("vocab_size", int),
    _rp.DIMENSION_COUNT: ("key_length", int),
}
"""What the other descendants of Llama state, whose head size is in the file only where config.json has it."""

_g = gguf.Keys.General
_SAMPLING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "sequence": (_g.SAMPLING_SEQUENCE, str),
    "top_k": (_g.SAMPLING_TOP_K, np.int32),
    "top_p": (_g.SAMPLING_TOP_P, float),
    "min_p": (_g.SAMPLING_MIN_P, float),
    "xtc_probability": (_g.SAMPLING_XTC_PROBABILITY, float),
    "xtc_threshold": (_g.SAMPLING_XTC_THRESHOLD, float),
    "temperature": (_g.SAMPLING_TEMP, float),
    "penalty_last_n": (_g.SAMPLING_PENALTY_LAST_N, np.int32),
    "repetition_penalty": (_g.SAMPLING_PENALTY_REPEAT, float),  # transformers' name; the converter of llama.cpp drops it
    "penalty_repeat": (_g.SAMPLING_PENALTY_REPEAT, float),
    "mirostat": (_g.SAMPLING_MIROSTAT, np.int32),
    "mirostat_tau": (_g.SAMPLING_MIROSTAT_TAU, float),
    "mirostat_eta": (_g.SAMPLING_MIROSTAT_ETA, float),
}


def sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json's settings as GGUF has them. Raises UnsupportedError."""
    keys = {}
    for key, (name, kind) in _SAMPLING.items():
        value = generation_config.get(key)
        if value is None:
            continue
        if kind is not str and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UnsupportedError(f"generation_config.json: {key} = {value!r} is not a number")
        keys[name] = kind(value)
    return keys


def number(h: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """The config value as int or float; positive where it is an int. Raises UnsupportedError."""
    value: Any = h.get(key)
    if value is None:
        raise UnsupportedError(f"config.json lacks {key}")
    allowed: Any = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed) or (kind is int and not 0 < value < 2**31):
        raise UnsupportedError(f"config.json: {key} = {value!r} is not a {'positive integer' if kind is int else 'number'}")
    return kind(value)


def stated(h: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """The config value as GGUF has it. Raises UnsupportedError where it is of another type."""
    value = h[key]
    if kind in (bool, str):
        if not isinstance(value, kind):
            raise UnsupportedError(f"config.json: {key} = {value!r} is not {'true or false' if kind is bool else 'a text'}")
        return value
    if kind is list:
        if not isinstance(value, list | tuple) or not all(type(v) in (int, float, bool) for v in value):
            raise UnsupportedError(f"config.json: {key} = {value!r} is not a list of numbers")
        return list(value)
    if kind is int and type(value) is int and 0 <= value < 2**31:
        return value
    return number(h, key, kind)
