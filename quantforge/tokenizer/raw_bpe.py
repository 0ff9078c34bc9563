"""BPE on text itself, spaces written as ▁ and unknown characters as byte tokens: llama.cpp's "gemma4" and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from typing_extensions import override

from ..errors import FormatError
from .base import Model, replacement
from .files import Files, text_of
from .sentencepiece import fallback_vocabulary, scores_say_it
from .vocabulary import Vocabulary

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType

# Tokens of Gemma 4's calls and thoughts, which llama.cpp's chat parser has to see in the text.
_SHOWN = {f"<|{n}>" for n in ("channel", "tool_call", "tool_response", '"|')} | {"<channel|>", "<tool_call|>", "<tool_response|>"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def _splits_words(files: Files) -> bool:
    return any(s.get("type") == "Metaspace" and s.get("split", True) for s in files.steps) and files.has_prefix


def _newlines_alone(files: Files) -> bool:
    """llama.cpp splits at newlines first: no merge may cross one."""
    return not any("\n" in a + b and (a + b).strip("\n") for a, b in files.merges())


class RawBPE(Model):
    """Merges as the file lists them, where no scores could say the same (see `sentencepiece`).

    Three names: "gemma4" (BOS always first), with pre-tokenizer "sarvam-moe" the same without BOS, with "mmbert" a ▁
    before each line and words split at ▁.
    """

    @override
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        if files.model != "BPE" or files.is_byte_level or not files.tokenizer["model"].get("byte_fallback"):
            return False
        gemma4 = str(config.get("model_type") or "").startswith("gemma4")
        if not gemma4 and (files.spm or scores_say_it(files)):
            return False
        return (not files.has_prefix or _splits_words(files)) and _newlines_alone(files)

    @override
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        path = files.directory / "tokenizer.json"
        merges = files.merges()
        if not merges:
            raise FormatError(path, "model.merges is empty: llama.cpp cannot run a BPE tokenizer without merges")
        if unspeakable := next((m for m in merges if " " in m[0] + m[1]), None):
            raise FormatError(path, f"merge {unspeakable!r} has a space, which GGUF's list of merges cannot spell")
        out = fallback_vocabulary(files, config)
        for i, text in enumerate(out.tokens):
            if text in _SHOWN and out.types[i] == _T.CONTROL:
                out.types[i] = int(_T.USER_DEFINED)
        if _splits_words(files):
            names = {_K.MODEL: "gpt2", _K.PRE: "mmbert"}
        elif text_of(files.config.get("bos_token")) is not None:
            names = {_K.MODEL: "gemma4", _K.PRE: "gemma4"}
        else:
            names = {_K.MODEL: "gpt2", _K.PRE: "sarvam-moe"}
        return out, {
            **names,
            **out.keys(scores=True),
            _K.MERGES: [" ".join(pair) for pair in merges],
            _K.ADD_PREFIX: False,
        }

    @override
    def owns(self, keys: Mapping[str, Any]) -> bool:
        return keys.get(_K.MODEL) == "gemma4" or (
            keys.get(_K.MODEL) == "gpt2" and keys.get(_K.PRE) in ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "mmbert")
        )

    @override
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        words = keys.get(_K.PRE) == "mmbert"
        unk = keys.get(_K.UNK_ID)
        by_id = {i: t for t, i in vocab.items()}
        return {
            "normalizer": None if words else replacement({"String": " "}, "▁"),
            "pre_tokenizer": _METASPACE if words else None,
            "decoder": {
                "type": "Sequence",
                "decoders": [replacement({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
                + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if words else []),
            },
            "model": {
                "type": "BPE",
                "vocab": vocab,
                "merges": [m.split(" ", 1) for m in keys.get(_K.MERGES, [])],
                "byte_fallback": True,
                "fuse_unk": True,
                "unk_token": None if unk is None else by_id.get(int(unk)),
            },
        }


MODEL = RawBPE()
