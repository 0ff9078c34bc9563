"""GGUF's tokenizer.* keys as tokenizer.json, for the tokenizers library and for checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from ..errors import FormatError, UnsupportedError
from .pretokenizers import ALIASES, KINDS
from .special import adds, special_ids

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType


def to_json(found: Mapping[str, Any], path: str | Path) -> str:
    """tokenizer.json for the tokenizers library from GGUF's tokenizer.* keys.

    Raises FormatError where keys are missing, UnsupportedError for kinds other than BPE and for
    pre-tokenizers whose regexes are not known here.
    """
    kind, tokens = found.get(_K.MODEL), found.get(_K.LIST)
    if not isinstance(tokens, list) or not tokens:
        raise FormatError(path, "the file has no tokenizer; give --reference a model that has one")
    types = [int(t) for t in found.get(_K.TOKEN_TYPE, [])] or [int(_T.NORMAL)] * len(tokens)
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != _T.UNUSED or not t.startswith("[PAD")}
    added = [
        {"id": i, "content": t, "special": types[i] != _T.USER_DEFINED, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, t in enumerate(tokens)
        if types[i] in (_T.CONTROL, _T.USER_DEFINED, _T.UNKNOWN)
    ]
    if kind == "gpt2":
        parts = _byte_level_json(found, vocab, path)
    elif kind == "llama":
        parts = _sentencepiece_json(found, vocab, [float(s) for s in found.get(_K.SCORES, [0.0] * len(tokens))], tokens)
    else:
        raise UnsupportedError(
            f"{path}: tokenizer model {kind!r} cannot be run from GGUF; use the original checkpoint as reference"
        )
    return json.dumps({"version": "1.0", "added_tokens": added, **parts, "post_processor": _around(found, tokens)})


def _around(found: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that puts BOS and EOS around a text, if the file says so."""
    ids = special_ids(found)
    on = {name: ids[name] for name, yes in adds(found).items() if yes and 0 <= ids.get(name, -1) < len(tokens)}
    if not on:
        return None

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": kind}}]
        steps[:0] = [{"SpecialToken": {"id": tokens[on["bos"]], "type_id": kind}}] if "bos" in on else []
        return steps + ([{"SpecialToken": {"id": tokens[on["eos"]], "type_id": kind}}] if "eos" in on else [])

    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in on.values()}
    single, pair = sequence("A", 0), sequence("A", 0) + sequence("B", 1)
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _byte_level_json(found: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
    pre = found.get(_K.PRE, "default")
    kind = next((k for k in KINDS if k.name == ALIASES.get(pre, pre)), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(k.name for k in KINDS))
        raise UnsupportedError(
            f"{path}: pre-tokenizer {pre!r} is not known here; use the original checkpoint, "
            f"or --pre-tokenizer with the one that splits alike: {known}"
        )
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False} for s in kind.splits
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
    merges = [m.split(" ", 1) for m in found.get(_K.MERGES, [])]
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": kind.ignore_merges},
    }


def _sentencepiece_json(
    found: Mapping[str, Any], vocab: dict[str, int], scores: list[float], tokens: list[str]
) -> dict[str, Any]:
    # SentencePiece joins the pair whose result scores best: as merges, every way to make a piece, best piece first
    merges = [
        (-scores[i], i, min(vocab[t[:k]], vocab[t[k:]]), t[:k], t[k:])
        for t, i in vocab.items()
        for k in range(1, len(t))
        if t[:k] in vocab and t[k:] in vocab
    ]
    unk = special_ids(found)["unk"]
    prefix = found.get(_K.ADD_PREFIX, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), replace]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[a, b] for *_, a, b in sorted(merges)],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": tokens[unk] if tokens[unk] in vocab else None,
        },
    }
