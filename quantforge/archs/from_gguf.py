"""A GGUF model as a checkpoint directory has it: config.json, generation config and tokenizer files.

The inverse of what `archs` and `tokenizer` make of a checkpoint. Names and numbers of the tensors are `Arch.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from .. import archs
from ..arrays import F32, shortest
from ..errors import FormatError, UnsupportedError
from .base import Arch, Shape
from .rope import llama3_scaling, rope_scaling

_K = gguf.Keys


def find_arch(metadata: Mapping[str, Any], path: Path) -> Arch:
    """The architecture of a GGUF file. Raises UnsupportedError listing the known ones."""
    name = metadata.get(_K.General.ARCHITECTURE)
    known = list(archs.supported().values())
    # several models may share a graph: the one that gave it its name goes first
    found = sorted((a for a in known if a.name == name), key=lambda a: a.model_type or a.name != name)
    if not found:
        names = ", ".join(sorted({a.name for a in known}))
        raise UnsupportedError(f"{path}: architecture {name!r} is not known as a checkpoint; known: {names}")
    return found[0]


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Shape], path: Path, rope_freqs: F32 | None = None
) -> dict[str, Any]:
    """config.json from GGUF metadata, the tensors' shapes and Llama 3's `rope_freqs`, f32[head size / 2].

    Rope settings are spelled in the older way, which every version of transformers reads. Raises UnsupportedError,
    FormatError.
    """
    arch = find_arch(metadata, path)
    if "token_embd.weight" not in tensors:
        raise FormatError(path, "tensor token_embd.weight is missing")

    def get(pattern: str) -> Any:
        return metadata.get(pattern.format(arch=arch.name))

    found: dict[str, Any] = {"architectures": [arch.hf[0]], "model_type": arch.model_type or arch.name}
    found |= {k: v for k, v in arch.defaults.items() if k not in ("head_dim", "num_key_value_heads")} | dict(arch.required)
    try:
        for pattern, (key, kind) in arch.metadata_keys.items():
            if kind is not dict and (value := get(pattern)) is not None:
                found[key] = shortest(value) if kind is float else kind(value)
        head = found.pop("key_length", None) or get(_K.Attention.KEY_LENGTH)
        found |= {"head_dim": int(head)} if head is not None else {}
        found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
        found["rope_theta"] = shortest(get(_K.Rope.FREQ_BASE) or 10000.0)
        found["rope_scaling"] = rope_scaling(get)
    except (TypeError, ValueError):
        raise FormatError(path, f"{arch.name}.*: a value is no number where one is needed") from None
    found["vocab_size"] = int(tensors["token_embd.weight"][0])
    found["tie_word_embeddings"] = "output.weight" not in tensors
    for role, tensor in arch.tensors.items():
        if isinstance(tensor.bias, str):
            found[tensor.bias] = bool(found.get(tensor.bias)) or f"blk.0.{role}.bias" in tensors
    for key, pattern in (("bos", _K.Tokenizer.BOS_ID), ("eos", _K.Tokenizer.EOS_ID), ("pad", _K.Tokenizer.PAD_ID)):
        if (value := metadata.get(pattern)) is not None:
            found[f"{key}_token_id"] = int(value)
    if rope_freqs is not None:
        found["rope_scaling"] = llama3_scaling(rope_freqs, found["rope_theta"], path)
    return found
