"""How a text's vectors become one, which sentence-transformers keeps beside a model."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf

from ..errors import FormatError, UnsupportedError
from ..tokenizer.files import parsed, read_json

log = logging.getLogger(__name__)

_KINDS = {
    "mean": gguf.PoolingType.MEAN,
    "mean_tokens": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "cls_token": gguf.PoolingType.CLS,
    "lasttoken": gguf.PoolingType.LAST,
}
"""Its words: values of pooling_mode, and ends of the keys that older releases have."""


def pooling_metadata(directory: Path, arch: str) -> dict[str, int]:
    """GGUF's key for what modules.json says; NONE without one. Raises FormatError, UnsupportedError."""
    path = directory / "modules.json"
    modules = parsed(path) or []
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise FormatError(path, "not a list of JSON objects")
    kind = gguf.PoolingType.NONE
    for module in modules:
        folder, name = str(module.get("path", "")), str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(directory / folder / "config.json")
        elif name == "Dense":
            log.warning("modules.json: %s, a layer behind the pooling, is left out: vectors are those before it", folder)
    return {gguf.Keys.LLM.POOLING_TYPE.format(arch=arch): kind.value}


def _kind(path: Path) -> gguf.PoolingType:
    said = read_json(path)
    modes = [k.removeprefix("pooling_mode_") for k, v in said.items() if k.startswith("pooling_mode_") and v is True]
    modes += [str(said["pooling_mode"])] if "pooling_mode" in said else []
    if len(modes) != 1 or modes[0] not in _KINDS:
        raise UnsupportedError(
            f"{path}: pooling by {' and '.join(modes) or 'nothing'}: llama.cpp pools by mean, cls or lasttoken"
        )
    return _KINDS[modes[0]]
