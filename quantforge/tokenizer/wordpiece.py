"""WordPiece, llama.cpp's model "bert"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from typing_extensions import override

from ..errors import UnsupportedError
from .base import Model
from .files import Files
from .special import special_ids
from .vocabulary import Vocabulary

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType
_LOWERCASE = "tokenizer.ggml.normalizer.lowercase"
_STRIP_ACCENTS = "tokenizer.ggml.normalizer.strip_accents"


class WordPiece(Model):
    """The longest pieces from the left of each word; GGUF marks a word's first piece with ▁, tokenizer.json others with ##."""

    @override
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        return files.model == "WordPiece"

    @override
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        path, model = files.directory / "tokenizer.json", files.tokenizer["model"]
        if (mark := model.get("continuing_subword_prefix", "##")) != "##":
            raise UnsupportedError(f"{path}: pieces inside a word begin with {mark!r}; llama.cpp knows ##")
        if odd := [str(s.get("type")) for s in files.steps if s.get("type") != "BertPreTokenizer"]:
            raise UnsupportedError(f"{path}: pre-tokenizer {odd[0]} before WordPiece; llama.cpp has BertPreTokenizer alone")
        lowercase, accents = _normalizer(files)
        vocab = files.vocabulary()
        added = files.added(vocab)
        out = Vocabulary.sized(path, max([*vocab.values(), *added], default=0), config)
        for text, i in vocab.items():
            out.put(i, text[2:] if text.startswith("##") and len(text) > 2 else "▁" + text, _T.NORMAL)
        unk = model.get("unk_token")
        if unk in vocab:
            out.put(vocab[unk], unk, _T.CONTROL)
        out.put_added(added)
        keys = {_K.MODEL: "bert", _K.PRE: "default", **out.keys(scores=False)}
        return out, keys | {_LOWERCASE: lowercase, _STRIP_ACCENTS: accents}

    @override
    def owns(self, keys: Mapping[str, Any]) -> bool:
        return keys.get(_K.MODEL) == "bert"

    @override
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        types = keys.get(_K.TOKEN_TYPE, [_T.NORMAL] * len(keys[_K.LIST]))
        ids = special_ids(keys)

        def spelled(text: str, i: int) -> str:
            if int(types[i]) != _T.NORMAL or i in ids.values():
                return text
            return text[1:] if text.startswith("▁") else f"##{text}"

        lowercase = bool(keys.get(_LOWERCASE, True))
        unk = keys[_K.LIST][ids["unk"]]
        return {
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": True,
                "strip_accents": bool(keys.get(_STRIP_ACCENTS, lowercase)),
                "lowercase": lowercase,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "vocab": {spelled(t, i): i for t, i in vocab.items()},
                "unk_token": unk,
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            },
        }


def _normalizer(files: Files) -> tuple[bool, bool]:
    """Are letters made lower case, and are accents stripped? Raises UnsupportedError for what llama.cpp cannot do."""
    path = files.directory / "tokenizer.json"
    steps = files.normalizers
    if len(steps) != 1 or steps[0].get("type") != "BertNormalizer":
        names = ", ".join(str(s.get("type")) for s in steps) or "none"
        raise UnsupportedError(f"{path}: normalizer {names} before WordPiece; llama.cpp has BertNormalizer alone")
    if not steps[0].get("clean_text", True) or not steps[0].get("handle_chinese_chars", True):
        raise UnsupportedError(f"{path}: BertNormalizer without clean_text or handle_chinese_chars; llama.cpp always does both")
    lowercase = bool(steps[0].get("lowercase", True))
    accents = steps[0].get("strip_accents")
    return lowercase, lowercase if accents is None else bool(accents)


MODEL = WordPiece()
