"""What a checkpoint says about its quantization, wherever it says so: config.json, or a file beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UnsupportedError
from . import base

OWN = "quantforge"
"""Stands in the place of quant_method where a checkpoint has codecs of no library's layout."""

_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files in which old AutoGPTQ, old AutoAWQ and ModelOpt say it, where config.json does not."""

_OTHERS = {
    "exl2": "ExLlamaV2's",
    "exl3": "ExLlamaV3's",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "vptq": "VPTQ",
    "hqq": "HQQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "quanto": "optimum-quanto's",
    "quark": "AMD Quark's",
    "sinq": "SINQ",
}
"""Names of quant_methods that are not read, as people know them."""


def stated(config: Mapping[str, Any], beside: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The quantization_config, with its quant_method; None where the checkpoint has none.

    config: config.json; beside: a JSON file of the directory by name, None where there is none.
    """
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            section = part.get(key)
            if section and isinstance(section, Mapping):
                return dict(section) if section.get("quant_method") else _unnamed(key, section)
    for file, method in _FILES.items():
        if (section := beside(file)) is not None:
            own = section.get("quantization") if method == "modelopt" else section
            if isinstance(own, Mapping):
                return {"quant_method": method, **own}
    return None


_BY_ARRAYS = (
    (re.compile(r"\.q_(?:scale|invperm|group_map)$"), "exl2"),
    (re.compile(r"\.(?:trellis|suh|svh)$"), "exl3"),
    (re.compile(r"\.weight\.quant_state\.bitsandbytes__\w+$|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\._\w+_qdata$"), "torchao"),
    (re.compile(r"_scale_inv$|\.weight_scale$"), "fp8"),
    (re.compile(r"_blocks$"), "mxfp4"),
    (re.compile(r"\.qweight$"), None),
    (re.compile(r"\.(?:scales|qzeros)$"), None),
)
"""Names that only quantized checkpoints have, and the quant_method for which they say enough by themselves."""


def telling(names: Iterable[str]) -> str | None:
    """The first name that only quantized checkpoints have."""
    return next((n for n in names if any(pattern.search(n) for pattern, _ in _BY_ARRAYS)), None)


def by_arrays(names: Iterable[str]) -> dict[str, Any] | None:
    """A quantization_config where the checkpoint has none, but its arrays' names say what it is; None for plain tensors.

    Raises UnsupportedError where they do not say enough.
    """
    names = list(names)
    for pattern, method in _BY_ARRAYS:
        if example := next((n for n in names if pattern.search(n)), None):
            if method is None:
                raise UnsupportedError(
                    f"{example} is quantized, but no quantization_config says how: fetch the model's config.json, and its "
                    "quantize_config.json or quant_config.json where it has one"
                )
            return {"quant_method": method}
    return None


def _unnamed(key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without quant_method: quantforge's, MLX's (group_size and bits), bitsandbytes' old one (load_in_4bit)."""
    if OWN in config:
        return {**config, "quant_method": OWN}
    if "group_size" in config and "bits" in config and "desc_act" not in config and "version" not in config:
        return {**config, "quant_method": "mlx"}
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return {**config, "quant_method": "bitsandbytes"}
    if key == "compression_config" or "config_groups" in config:
        return {**config, "quant_method": "compressed-tensors"}
    if "quant_algo" in config:
        return {**config, "quant_method": "modelopt"}
    return {**config, "quant_method": "gptq" if "desc_act" in config else "unknown"}


def layout_of(config: Mapping[str, Any]) -> base.Layout:
    """The layout that a quantization_config speaks of. Raises UnsupportedError, saying what it is and what to do."""
    layout = base.find(config)
    if layout is None:
        method = str(config.get("quant_method"))
        name = next((text for key, text in _OTHERS.items() if method.lower().startswith(key)), "a way of its own")
        raise UnsupportedError(
            f"quantized as {name} (quant_method {method!r}), which is not read; give the model that it was made of, or one of "
            f"its versions in floats, GGUF, or {', '.join(base.readable())}"
        )
    return layout
