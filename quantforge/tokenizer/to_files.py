"""The files that stand beside a checkpoint's config.json, from a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from ..arrays import shortest
from ..errors import FormatError
from .from_gguf import to_json
from .special import adds, ends, special_ids

_K = gguf.Keys

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
    ids = special_ids(metadata)
    tokens = metadata.get(_K.Tokenizer.LIST)
    if not isinstance(tokens, list):
        raise FormatError(path, "the file has no tokenizer (tokenizer.ggml.tokens)")
    if wrong := [n for n, i in ids.items() if not 0 <= i < len(tokens)]:
        raise FormatError(path, f"tokenizer.ggml.{wrong[0]}_token_id is {ids[wrong[0]]}; there are {len(tokens)} tokens")
    settings: dict[str, Any] = {f"{n}_token": tokens[ids[n]] for n in _NAMED if n in ids}
    settings |= {f"add_{n}_token": on for n, on in adds(metadata).items()}
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
    if len(stops := ends(metadata)) > 1:
        generation["eos_token_id"] = stops
    sampling = {k: value for k, pattern in _SAMPLING.items() if (value := metadata.get(pattern)) is not None}
    if float(sampling.get("temperature", 1)) > 0 and sampling.keys() - {"repetition_penalty"}:
        generation |= {"do_sample": True}
    else:
        sampling = {k: v for k, v in sampling.items() if k == "repetition_penalty"}
    generation |= {k: int(v) if k == "top_k" else shortest(v) for k, v in sampling.items()}

    def dump(value: Any) -> bytes:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")

    return {
        "tokenizer.json": to_json(metadata, path).encode("utf-8", "replace"),
        "tokenizer_config.json": dump(settings),
        "generation_config.json": dump(generation),
    }
