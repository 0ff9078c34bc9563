"""A GGUF model as a checkpoint directory has it: config.json, generation config and tokenizer files.

The inverse of what `archs` and `tokenizer` make of a checkpoint. Names and numbers of the tensors are `Arch.checkpoint`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from .. import archs
from ..arrays import F32, shortest
from ..errors import FormatError, UnsupportedError
from .base import Arch
from .decoder import rope_freqs
from .rope import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, llama3_scaling, longrope_scaling, rope_scaling
from .weight import Shape, Weight

logger = logging.getLogger(__name__)
_K = gguf.Keys


_NO_MODELS = {
    "adapter": "an adapter (LoRA), not a model; llama.cpp applies it to its model with --lora",
    "imatrix": "an importance matrix, not a model; give it as --imatrix",
    "mmproj": "the part of a model that sees or hears; give the model itself, to which llama.cpp takes this as --mmproj",
}
"""general.type of files that are no models, and what they are."""


def check_is_model(metadata: Mapping[str, Any], path: Path, *, whole: bool = True) -> None:
    """Raise UnsupportedError for a file that says of itself that it is something else; whole: for a part of a model too."""
    kind = str(metadata.get(_K.General.TYPE, ""))
    if kind in _NO_MODELS and (whole or kind != "mmproj"):
        raise UnsupportedError(f"{path}: {_NO_MODELS[kind]}")


def find_arch(metadata: Mapping[str, Any], path: Path, tensors: Mapping[str, Shape] | None = None) -> Arch:
    """The architecture of a GGUF file; tensors: its names and shapes, where few models differ by nothing else.

    Raises UnsupportedError listing the known ones.
    """
    check_is_model(metadata, path)
    name = metadata.get(_K.General.ARCHITECTURE)
    known = list(dict.fromkeys(archs.supported().values()))
    same = [a for a in known if a.name == name]
    if not same:
        names = ", ".join(sorted({a.name for a in known}))
        raise UnsupportedError(f"{path}: architecture {name!r} is not known as a checkpoint; known: {names}")
    shapes = tensors or {}
    told = [a for a in same if a.told_by is not None and a.told_by(lambda p: shapes.get(p) or metadata.get(p.format(arch=name)))]
    untold = [a for a in same if a.told_by is None]
    # several models may share a graph: the one that gave it its name goes first
    return sorted(told or untold or same, key=lambda a: a.model_type or a.name != name)[0]


def config(
    metadata: Mapping[str, Any], tensors: Mapping[str, Shape], path: Path, factors: Mapping[str, F32] | None = None
) -> dict[str, Any]:
    """config.json from GGUF metadata, the tensors' shapes and those of rope.ROPE_FACTORS, f32[rotated / 2], that there are.

    Rope settings are spelled in the older way, which every version of transformers reads. Raises UnsupportedError,
    FormatError.
    """
    arch = find_arch(metadata, path, tensors)
    embedding = next((n for n in ("token_embd.weight",) if n in tensors), None)
    if embedding is None:
        raise FormatError(path, "tensor token_embd.weight is missing")

    def get(pattern: str) -> Any:
        if (shape := tensors.get(pattern)) is not None:
            return (factors or {}).get(pattern, shape)
        return metadata.get(pattern.format(arch=arch.name))

    made: dict[str, Any] = {"architectures": [arch.hf[0]], "model_type": arch.model_type or arch.name}
    made |= {k: v for k, v in arch.defaults.items() if k not in ("head_dim", "num_key_value_heads") and not callable(v)}
    try:
        for pattern, (key, kind) in arch.metadata_keys.items():
            if kind is not dict and (value := get(pattern)) is not None:
                made[key] = _restored(value, kind)
        if arch.nextn is not None:
            made["num_hidden_layers"] -= int(get(_K.LLM.NEXTN_PREDICT_LAYERS) or 0)
        head = made.pop("key_length", None) or get(_K.Attention.KEY_LENGTH)
        if "num_attention_heads" in made:
            made |= {"head_dim": int(head)} if head is not None else {}
            made.setdefault("num_key_value_heads", made.get("num_attention_heads"))
        if arch.rope_types:
            made["rope_theta"] = shortest(get(_K.Rope.FREQ_BASE) or 10000.0)
            made["rope_scaling"] = rope_scaling(get)
        made["vocab_size"] = int(tensors[embedding][0])
        made["tie_word_embeddings"] = "output.weight" not in tensors
        held = {Weight(n, ()).role for n in tensors if n.endswith(".bias")}
        for key in {t.bias for t in arch.tensors.values() if isinstance(t.bias, str)}:
            made[key] = any(role in held for role, t in arch.tensors.items() if t.bias == key)
        there = {Weight(n, ()).role for n in tensors}
        made |= {t.when: role in there and (made.get(t.when) or True) for role, t in arch.tensors.items() if t.when}
        for key, pattern in (("bos", _K.Tokenizer.BOS_ID), ("eos", _K.Tokenizer.EOS_ID), ("pad", _K.Tokenizer.PAD_ID)):
            if (value := metadata.get(pattern)) is not None:
                made[f"{key}_token_id"] = int(value)
        if factors and ROPE_FREQS in factors and arch.generated is rope_freqs:
            made["rope_scaling"] = llama3_scaling(factors[ROPE_FREQS], made["rope_theta"], path)
        if factors and ROPE_LONG in factors and ROPE_SHORT in factors:
            context = made["max_position_embeddings"]
            made["rope_scaling"] = longrope_scaling(get, factors[ROPE_LONG], factors[ROPE_SHORT], context)
        if arch.restored is not None:
            made |= arch.restored(get)
        if "rope_parameters" in made:  # the newer spelling, of layers that differ
            made = {k: v for k, v in made.items() if k not in ("rope_theta", "rope_scaling")}
        arch.state_implied(made)
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        raise FormatError(path, f"{arch.name}.*: a value is no number where one is needed") from None
    return made if arch.around is None else _wrapped(made, arch.around)


_OUTER = ("architectures", "model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def _wrapped(text: Mapping[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose text part this is."""
    parts = ", ".join(sorted(k.removesuffix("_config") for k in around if k not in ("text_config", "model_type")))
    logger.warning("the file holds the text part of the model: in transformers, its other parts (%s) will be random", parts)
    outer = {k: v for k, v in text.items() if k in _OUTER}
    inner = {k: v for k, v in text.items() if k not in ("architectures", "model_type")}
    return {**outer, **around, "text_config": {**inner, **around.get("text_config", {})}}


def _restored(value: Any, kind: type[Any]) -> Any:
    if kind is float:
        return shortest(value)
    if kind is list:
        return [v.item() if hasattr(v, "item") else v for v in value]
    return kind(value)
