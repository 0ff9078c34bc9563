"""GGUF's tokenizer.* keys as tokenizer.json, for the tokenizers library and for checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from ..errors import FormatError, UnsupportedError
from .models import MODELS
from .special import adds, special_ids

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType


def to_json(keys: Mapping[str, Any], path: str | Path) -> str:
    """tokenizer.json for the tokenizers library from GGUF's tokenizer.* keys.

    Raises FormatError where keys are missing, UnsupportedError for models and pre-tokenizers that are not known here.
    """
    kind, tokens = keys.get(_K.MODEL), keys.get(_K.LIST)
    if not isinstance(tokens, list) or not tokens:
        raise FormatError(path, "the file has no tokenizer; give --reference a model that has one")
    types = [int(t) for t in keys.get(_K.TOKEN_TYPE, [])] or [int(_T.NORMAL)] * len(tokens)
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != _T.UNUSED or not t.startswith("[PAD")}
    added = [
        {"id": i, "content": t, "special": types[i] != _T.USER_DEFINED, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, t in enumerate(tokens)
        if types[i] in (_T.CONTROL, _T.USER_DEFINED, _T.UNKNOWN)
    ]
    model = next((m for m in MODELS if m.owns(keys)), None)
    if model is None:
        raise UnsupportedError(
            f"{path}: tokenizer model {kind!r} cannot be run from GGUF; use the original checkpoint as reference"
        )
    parts = model.parts(keys, vocab, path)
    return json.dumps({"version": "1.0", "added_tokens": added, **parts, "post_processor": _around(keys, tokens)})


def _around(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts BOS and EOS around a text, if the file says so."""
    ids = special_ids(keys)
    on = {name: ids[name] for name, yes in adds(keys).items() if yes and 0 <= ids.get(name, -1) < len(tokens)}
    if not on:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": kind}}]
        steps[:0] = [{"SpecialToken": {"id": tokens[on["bos"]], "type_id": kind}}] if "bos" in on else []
        return steps + ([{"SpecialToken": {"id": tokens[on["eos"]], "type_id": kind}}] if "eos" in on else [])

    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in on.values()}
    single, pair = sequence("A", 0), sequence("A", 0) + sequence("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
