"""Settings of rotary position embedding, both ways: config.json's two spellings, GGUF's keys, Llama 3's tensor of factors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..arrays import F32, shortest
from ..errors import UnsupportedError

logger = logging.getLogger(__name__)

_K = gguf.Keys.Rope
ROPE_FREQS = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
"""GGUF's name of the tensor that Llama 3's rope scaling is kept in."""
ROPE_LONG = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FACTORS_LONG] + ".weight"
ROPE_SHORT = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT] + ".weight"
"""LongRoPE's, for contexts beyond the original one and within it."""
ROPE_FACTORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)


def rope_settings(h: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Rope settings of either config generation in the newer form: rope_type, rope_theta and the scaling's numbers.

    h: config.json; partial: may a part of each head be rotated? Raises UnsupportedError.
    """
    rope = {k: v for k, v in _given(h).items() if v is not None}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope["rope_type"] = str(rope["rope_type"]).lower()
    rope.setdefault("rope_theta", h.get("rope_theta", 10000.0))
    if rope["rope_type"] == "su":  # its first name
        rope["rope_type"] = "longrope"
    kind = rope["rope_type"]
    if kind in ("linear", "yarn", "llama3") and not isinstance(rope.get("factor"), (int, float)):
        raise UnsupportedError(f"config.json: rope scaling {kind!r} lacks a numeric factor")
    if kind in ("yarn", "llama3", "longrope"):
        key = "original_max_position_embeddings"  # some configs keep it outside of the scaling's own dict
        rope[key] = h.get(key, rope.get(key, h.get("max_position_embeddings")))
    if not partial and rope.get("partial_rotary_factor", h.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("config.json: partial_rotary_factor other than 1 does not fit this architecture in llama.cpp")
    if kind == "longrope":
        _check_longrope(rope, h)
    for key, value in rope.items():
        if key in ("long_factor", "short_factor"):
            continue
        if key.endswith(("theta", "factor", "embeddings", "fast", "slow", "mscale", "mscale_all_dim")) and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0
        ):
            raise UnsupportedError(f"config.json: rope {key} = {value!r} is not a number")
    return rope


def _given(h: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of layers that attend to all, in either spelling.

    Where both are there, transformers takes rope_scaling in the place of rope_parameters, or, where these differ by kind of
    layer, over what they say of full attention.
    """
    old, new = h.get("rope_scaling") or {}, h.get("rope_parameters") or {}
    by_kind = new.get("full_attention")
    if isinstance(by_kind, Mapping):
        return {**by_kind, **old}
    theta = new.get("rope_theta")
    if old and theta is not None and "rope_theta" not in old and theta != h.get("rope_theta"):
        logger.warning("config.json has rope_scaling and rope_parameters: the first counts, without the other's base %s", theta)
    return old or new


def _check_longrope(rope: dict[str, Any], h: Mapping[str, Any]) -> None:
    """Are there two lists of factors? States the attention factor that follows where none is given."""
    for key in ("long_factor", "short_factor"):
        value = rope.get(key)
        if not isinstance(value, list) or not all(type(v) in (int, float) and v > 0 for v in value):
            raise UnsupportedError(f"config.json: rope {key} = {value!r} is not a list of numbers")
    original = rope["original_max_position_embeddings"]
    if type(original) is not int or original < 2:
        raise UnsupportedError(f"config.json: original_max_position_embeddings = {original!r} is no number of tokens")
    factor = rope.get("factor") or h["max_position_embeddings"] / original
    rope.setdefault("attention_factor", _longrope_magnitude(factor, original))


def _longrope_magnitude(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def longrope_scaling(get: Callable[[str], Any], long: F32, short: F32, context: int) -> dict[str, Any]:
    """config.json's rope_scaling for LongRoPE's factors; get: as for `rope_scaling`."""
    original = int(get(_K.SCALING_ORIG_CTX_LEN) or context)
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [shortest(v) for v in long],
        "short_factor": [shortest(v) for v in short],
        "original_max_position_embeddings": original,
    }
    stated = get(_K.SCALING_ATTN_FACTOR)
    if stated is not None and not math.isclose(stated, _longrope_magnitude(context / original, original), rel_tol=1e-6):
        rope["attention_factor"] = shortest(stated)
    return rope


def rotated(h: Mapping[str, Any]) -> int:
    """How many numbers of each head are rotated: the first ones. h: as `Arch.hyperparameters` gives it."""
    return int(h["key_length"] * h["rope"].get("partial_rotary_factor", h.get("partial_rotary_factor", 1.0)))


def sliding_theta(h: Mapping[str, Any], default: float) -> float:
    """The base of layers with a window, where it is one of its own. Raises UnsupportedError: no graph scales these."""
    rope = (h.get("rope_parameters") or {}).get("sliding_attention") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UnsupportedError(f"config.json: rope scaling {kind!r} of sliding_attention layers does not exist in llama.cpp")
    return float(rope.get("rope_theta", h.get("rope_local_base_freq", default)))


def rope_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's keys, with {arch}, for settings as `rope_settings` gives them; Llama 3's are a tensor instead.

    Raises UnsupportedError for what llama.cpp cannot run.
    """
    kind = rope["rope_type"]
    keys: dict[str, Any] = {}
    if kind in ("linear", "yarn"):
        keys[_K.SCALING_TYPE] = gguf.RopeScalingType[kind.upper()].value
        keys[_K.SCALING_FACTOR] = float(rope["factor"])
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            raise UnsupportedError("config.json: yarn rope scaling with truncate = false does not exist in llama.cpp")
        keys[_K.SCALING_ORIG_CTX_LEN] = int(rope["original_max_position_embeddings"])
        names = {
            "extrapolation_factor": _K.SCALING_YARN_EXT_FACTOR,
            "attention_factor": _K.SCALING_YARN_ATTN_FACTOR,
            "beta_fast": _K.SCALING_YARN_BETA_FAST,
            "beta_slow": _K.SCALING_YARN_BETA_SLOW,
        }
        keys.update({name: float(rope[key]) for key, name in names.items() if key in rope})
        # llama.cpp's dense graphs do not look at yarn_attn_factor: they take YaRN's own magnitude times attn_factor.
        own, wanted = _yarn_magnitude(rope["factor"]), _yarn_attention_factor(rope)
        if not math.isclose(wanted, own):
            keys[_K.SCALING_ATTN_FACTOR] = wanted / own
    if kind == "longrope":
        keys[_K.SCALING_ATTN_FACTOR] = float(rope["attention_factor"])
    if kind == "dynamic":
        logger.warning("config.json: dynamic rope scaling is not part of GGUF; it matters only beyond max_position_embeddings")
    keys[_K.FREQ_BASE] = float(rope["rope_theta"])
    return keys


def rope_scaling(get: Callable[[str], Any]) -> dict[str, Any] | None:
    """config.json's rope_scaling in the older spelling; get: the value of a GGUF key with {arch}, or None."""
    kind = get(_K.SCALING_TYPE)
    if kind not in ("linear", "yarn"):
        return None
    factor = shortest(get(_K.SCALING_FACTOR) or 1)
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return rope
    if (context := get(_K.SCALING_ORIG_CTX_LEN)) is not None:
        rope["original_max_position_embeddings"] = int(context)
    for key, pattern in (
        ("attention_factor", _K.SCALING_YARN_ATTN_FACTOR),
        ("beta_fast", _K.SCALING_YARN_BETA_FAST),
        ("beta_slow", _K.SCALING_YARN_BETA_SLOW),
    ):
        if (value := get(pattern)) is not None:
            rope[key] = shortest(value)
    if "attention_factor" not in rope and (times := get(_K.SCALING_ATTN_FACTOR)) is not None:
        rope["attention_factor"] = float(times) * _yarn_magnitude(factor)
    return rope


def rope_by_kind(get: Callable[[str], Any]) -> dict[str, Any]:
    """config.json's rope_parameters where layers with a window have a base of their own; get: as for `rope_scaling`."""
    theta = get(_K.FREQ_BASE) or 10000.0
    sliding = get(_K.FREQ_BASE_SWA) or theta
    full = {**(rope_scaling(get) or {"rope_type": "default"}), "rope_theta": shortest(theta)}
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": shortest(sliding)}}


def _yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """What transformers multiplies cosines and sines by (modeling_rope_utils, from YaRN and DeepSeek-V2)."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _yarn_magnitude(rope["factor"], rope["mscale"]) / _yarn_magnitude(rope["factor"], rope["mscale_all_dim"])
    return _yarn_magnitude(rope["factor"])


def llama3_rope_factors(rope: Mapping[str, Any], dim: int) -> F32:
    """By how much Llama 3's scaling divides each rotary frequency: f32[dim / 2].

    Source: Llama 3.1's apply_scaling; low frequencies by `factor`, high ones by 1, between them a
    linear blend in units of the pretraining context per wavelength.
    """
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    if low == high:
        raise UnsupportedError(f"config.json: llama3 rope scaling with low_freq_factor = high_freq_factor = {low}")
    freqs = (1.0 / (float(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=np.float32) / dim))).astype(np.float32)
    turns = context / (2 * math.pi / freqs.astype(np.float64))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), np.float32)


def llama3_scaling(factors: F32, theta: float, path: Path) -> dict[str, Any]:
    """Llama 3's rope settings whose factors these are: f32[head size / 2].

    Between its two ends the blend is a line over frequency: its slope and intercept give context and high_freq_factor
    in units of low_freq_factor, which is taken to be 1, as in every release. Raises UnsupportedError if none fit.
    """
    dim, factor = 2 * factors.size, float(factors.max())
    turns = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * math.pi)  # per token of context
    smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones(factors.size)
    low, high = turns[smooth <= 1e-5], turns[smooth >= 1 - 1e-5]
    between = (smooth > 1e-5) & (smooth < 1 - 1e-5)
    tried = [(8192.0, 4.0)]
    if between.sum() > 1:
        slope, intercept = np.polyfit(turns[between], smooth[between], 1)
        tried += [(-slope / intercept, 1 - 1 / intercept)] if intercept < 0 else []
    elif between.any():  # one number for two: usual blends first
        tried += [((1 + (h - 1) * smooth[between][0]) / turns[between][0], h) for h in (4.0, 2.0, 8.0, 3.0, 6.0, 16.0, 1.5, 32.0)]
    elif low.size and high.size:  # a step: any blend between the two frequencies
        tried.append((0.9999 / float(low.max()), max(1.001, float(high.min() / low.max()) * 0.999)))
    for context, end in tried:
        rope: dict[str, Any] = {"rope_type": "llama3", "factor": factor, "rope_theta": theta}
        for unit in (1.0, 8192 / context):  # the same line with a whole number as context
            at_end = round(end, 3) if unit == 1 else float(end * unit)
            rope |= {"low_freq_factor": float(unit), "high_freq_factor": at_end}
            rope["original_max_position_embeddings"] = round(context * unit)
            if at_end > unit and np.allclose(llama3_rope_factors(rope, dim), factors, rtol=2e-4):
                return {k: v for k, v in rope.items() if k != "rope_theta"}
    raise UnsupportedError(
        f"{path}: {ROPE_FREQS} are not the factors of Llama 3's rope scaling, which is the only way config.json has to say them"
    )


def rotated_part(get: Callable[[str], Any], head: int) -> float:
    """partial_rotary_factor of a GGUF file; head: its head size."""
    turned = int(get(_K.DIMENSION_COUNT) or head)
    return next(f for f in (turned / head, (turned + 0.5) / head) if int(head * f) == turned)
