"""Byte-level BPE, llama.cpp's model "gpt2"."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from typing_extensions import override

from ..errors import FormatError, UnsupportedError
from .base import Model, regex_split
from .files import Files
from .pretokenizers import BY_NAME, recognise
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType


class ByteLevel(Model):
    """Text is split by regexes, and each byte becomes a letter of an alphabet of 256."""

    @override
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        return files.model == "BPE"  # what is not of the kinds before it is refused here, with the reason

    @override
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        path = files.directory / "tokenizer.json"
        pre = pre_tokenizer or recognise(files).name
        vocab, merges = files.vocabulary(), files.merges()
        if not merges:
            raise FormatError(path, "model.merges is empty: llama.cpp cannot run a BPE tokenizer without merges")
        added = files.added(vocab)
        out = Vocabulary.sized(path, max([*vocab.values(), *added], default=0), config)
        for text, i in vocab.items():
            if i not in added or i < len(out.tokens):
                out.put(i, text, _T.NORMAL)
        out.put_added(added)
        if any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in files.steps):
            logger.warning("tokenizer.json puts a space before the text; llama.cpp's byte-level BPE does not: first ids differ")
        # A space inside a token would be the separator's twin; the byte alphabet has Ġ for it.
        spelled = [" ".join(p.replace(" ", "Ġ") for p in pair) for pair in merges]
        return out, {_K.MODEL: "gpt2", _K.PRE: pre, **out.keys(scores=False), _K.MERGES: spelled}

    @override
    def owns(self, keys: Mapping[str, Any]) -> bool:
        return keys.get(_K.MODEL) == "gpt2"

    @override
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        pre = keys.get(_K.PRE, "default")
        if (kind := BY_NAME.get(pre)) is None:
            raise UnsupportedError(
                f"{path}: pre-tokenizer {pre!r} is not known here; use the original checkpoint, "
                f"or --pre-tokenizer with the one that splits alike: {', '.join(BY_NAME)}"
            )
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        merges = [m.split(" ", 1) for m in keys.get(_K.MERGES, [])]
        return {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(regex_split, kind.splits), step]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": kind.ignore_merges},
        }


MODEL = ByteLevel()
