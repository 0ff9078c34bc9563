"""SentencePiece unigram, llama.cpp's model "t5": from SentencePiece's file or from tokenizer.json."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from typing_extensions import override

from ..errors import FormatError, UnsupportedError
from .base import Model, replacement
from .files import Files, text_of
from .sentencepiece import piece_rows
from .special import special_ids
from .spm_file import SentencePieceModel
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType
_TIDY = (r" {2,}", r"\A +| +\z")
"""Regexes of spaces that SentencePiece's remove_extra_whitespaces joins and removes."""


class Unigram(Model):
    """Pieces with log probabilities, the likeliest sequence of them; a compiled normalizer."""

    @override
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        return files.model == "Unigram" if files.model else files.spm is not None and files.spm[1].model_type == 1

    @override
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        if files.model is None:
            assert files.spm
            path, model = files.spm
            out = piece_rows(files, config, path, _aligned(files, model))
            charsmap, prefix, tidy = model.charsmap, model.add_dummy_prefix, model.remove_extra_whitespaces
        else:
            out = self._from_json(files, config)
            charsmap, tidy = _normalizer(files)
            prefix = files.has_prefix
        if any(kind == _T.BYTE for kind in out.types):
            raise UnsupportedError(f"{out.path}: a unigram model with byte tokens, which llama.cpp does not use")
        keys = {_K.MODEL: "t5", _K.PRE: "default", **out.keys(scores=True), _K.ADD_PREFIX: prefix, _K.REMOVE_EXTRA_WS: tidy}
        return out, {**keys, _K.PRECOMPILED_CHARSMAP: np.frombuffer(charsmap, np.uint8)} if charsmap else keys

    def _from_json(self, files: Files, config: Mapping[str, Any]) -> Vocabulary:
        path, model = files.directory / "tokenizer.json", files.tokenizer["model"]
        if model.get("byte_fallback"):
            raise UnsupportedError(f"{path}: a unigram model with byte fallback, which llama.cpp does not do")
        pieces: list[tuple[str, float, int]] = []
        for piece in model["vocab"]:
            if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[0], str):
                raise FormatError(path, f"model.vocab has {piece!r} where a piece and its score are expected")
            pieces.append((piece[0], float(piece[1]), 1))
        vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        added = files.added(vocab)
        out = Vocabulary.sized(path, max(len(pieces) - 1, *added, 0), config, -10000.0)
        for i, (text, score, _) in enumerate(pieces):
            out.put(i, text, _T.NORMAL, score)
        # The model's own scores stay: of pieces that are added tokens as well, too.
        out.put_added({i: t for i, t in added.items() if i >= len(pieces)})
        for i, token in added.items():
            if i < len(pieces):
                out.put(i, token.text, _T.CONTROL if token.special else _T.USER_DEFINED, out.scores[i])
        unk = model.get("unk_id")
        if isinstance(unk, int) and 0 <= unk < len(pieces):
            out.types[unk] = int(_T.UNKNOWN)
        return out

    @override
    def owns(self, keys: Mapping[str, Any]) -> bool:
        return keys.get(_K.MODEL) == "t5"

    @override
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        tokens, scores = keys[_K.LIST], [float(s) for s in keys.get(_K.SCORES, [])]
        if len(scores) < len(tokens):
            raise FormatError(path, f"{len(scores)} scores for {len(tokens)} tokens")
        tidy = bool(keys.get(_K.REMOVE_EXTRA_WS, False))
        prefix = tidy or bool(keys.get(_K.ADD_PREFIX, False))  # where llama.cpp tidies, it puts ▁ before each word
        normalizers = []
        if (charsmap := keys.get(_K.PRECOMPILED_CHARSMAP)) is not None:
            text = base64.b64encode(np.asarray(charsmap).astype(np.uint8).tobytes()).decode()
            normalizers.append({"type": "Precompiled", "precompiled_charsmap": text})
        normalizers += [replacement({"Regex": regex}, new) for regex, new in zip(_TIDY, (" ", ""), strict=True)] if tidy else []
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" if prefix else "never", "split": False}
        last = max(vocab.values(), default=0) + 1
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": metaspace,
            "decoder": metaspace,
            "model": {
                "type": "Unigram",
                "vocab": [[t, s] for t, s in zip(tokens[:last], scores, strict=False)],
                "unk_id": special_ids(keys).get("unk"),
                "byte_fallback": False,
            },
        }


def _aligned(files: Files, model: SentencePieceModel) -> list[tuple[str, float, int]]:
    """The pieces by the model's ids: XLM-R's are fairseq's, with <s>, <pad>, </s>, <unk> first and <mask> last."""
    if (files.directory / "sentencepiece.bpe.model") != (files.spm or ("",))[0]:
        return model.pieces
    if (name := files.config.get("tokenizer_class") or "XLMRobertaTokenizer").removesuffix("Fast") != "XLMRobertaTokenizer":
        raise UnsupportedError(
            f"{files.directory}: no tokenizer.json, and ids of {name} cannot be read from sentencepiece.bpe.model"
        )
    first = [("<s>", 0.0, 3), ("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    return [*first, *model.pieces[3:], (text_of(files.config.get("mask_token")) or "<mask>", 0.0, 3)]


def _normalizer(files: Files) -> tuple[bytes, bool]:
    """tokenizer.json's compiled normalizer, and whether extra spaces are removed. Raises UnsupportedError, FormatError."""
    path = files.directory / "tokenizer.json"
    charsmap, tidy = b"", any(s.get("type") in ("WhitespaceSplit", "Whitespace") for s in files.steps)
    for step in files.normalizers:
        if step.get("type") == "Precompiled":
            try:
                charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
            except (binascii.Error, TypeError, ValueError):
                raise FormatError(path, "the normalizer's precompiled_charsmap is not base64") from None
        elif step.get("type") == "Replace" and (step.get("pattern") or {}).get("Regex") in (*_TIDY, r" {2,}", r"\s{2,}"):
            tidy = True
        elif step.get("type") not in ("Strip", "Prepend") and step != replacement({"String": " "}, "▁"):
            raise UnsupportedError(f"{path}: normalizer {step.get('type')}, which llama.cpp's unigram model does not do")
    if odd := [str(s.get("type")) for s in files.steps if s.get("type") not in ("Metaspace", "WhitespaceSplit")]:
        raise UnsupportedError(f"{path}: pre-tokenizer {odd[0]}, which llama.cpp's unigram model does not do")
    return charsmap, tidy


MODEL = Unigram()
