"""A GGUF model as a checkpoint directory has it: config.json, generation config and tokenizer files.

The inverse of what `archs` and `tokenizer` make of a checkpoint. Names and numbers of the tensors are `Arch.checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from . import archs, tokenizer
from .archs.base import Arch, Shape
from .arrays import F32, shortest
from .errors import FormatError, UnsupportedError
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


# ---- files beside config.json


_NAMED = ("bos", "eos", "unk", "sep", "pad", "mask")
_SAMPLING = {
    "temperature": _K.General.SAMPLING_TEMP,
    "top_k": _K.General.SAMPLING_TOP_K,
    "top_p": _K.General.SAMPLING_TOP_P,
    "min_p": _K.General.SAMPLING_MIN_P,
    "repetition_penalty": _K.General.SAMPLING_PENALTY_REPEAT,
}


def files(metadata: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    The chat template is text in tokenizer_config.json; it is never rendered. Raises FormatError, UnsupportedError.
    """
    ids = tokenizer.special_ids(metadata)
    tokens = metadata.get(_K.Tokenizer.LIST)
    if not isinstance(tokens, list):
        raise FormatError(path, "the file has no tokenizer (tokenizer.ggml.tokens)")
    if wrong := [n for n, i in ids.items() if not 0 <= i < len(tokens)]:
        raise FormatError(path, f"tokenizer.ggml.{wrong[0]}_token_id is {ids[wrong[0]]}; there are {len(tokens)} tokens")
    settings: dict[str, Any] = {f"{n}_token": tokens[ids[n]] for n in _NAMED if n in ids}
    settings |= {f"add_{n}_token": on for n, on in tokenizer.adds(metadata).items()}
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(context := config.get("max_position_embeddings"), int):
        settings["model_max_length"] = context
    template = metadata.get(_K.Tokenizer.CHAT_TEMPLATE)
    named = {n: metadata.get(_K.Tokenizer.CHAT_TEMPLATE_N.format(name=n)) for n in metadata.get(_K.Tokenizer.CHAT_TEMPLATES, ())}
    if named:
        every = {"default": template, **named}
        settings["chat_template"] = [{"name": n, "template": t} for n, t in every.items() if isinstance(t, str)]
    elif isinstance(template, str):
        settings["chat_template"] = template

    generation: dict[str, Any] = {f"{n}_token_id": ids[n] for n in ("bos", "eos", "pad") if n in ids}
    ends = list(dict.fromkeys(ids[n] for n in ("eos", "eot", "eom") if n in ids))
    if len(ends) > 1:
        generation["eos_token_id"] = ends
    sampling = {k: value for k, pattern in _SAMPLING.items() if (value := metadata.get(pattern)) is not None}
    if float(sampling.get("temperature", 1)) > 0 and sampling.keys() - {"repetition_penalty"}:
        generation |= {"do_sample": True}
    else:
        sampling = {k: v for k, v in sampling.items() if k == "repetition_penalty"}
    generation |= {k: int(v) if k == "top_k" else shortest(v) for k, v in sampling.items()}

    def dump(value: Any) -> bytes:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")

    return {
        "tokenizer.json": tokenizer.to_json(metadata, path).encode("utf-8", "replace"),
        "tokenizer_config.json": dump(settings),
        "generation_config.json": dump(generation),
    }
