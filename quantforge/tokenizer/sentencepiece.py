"""SentencePiece BPE, llama.cpp's model "llama": from SentencePiece's file, or from tokenizer.json where merges can be scores."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from typing_extensions import override

from ..errors import FormatError
from .base import Model, replacement
from .files import Files
from .special import special_ids
from .vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType
# SentencePiece's piece types are GGUF's token types but for the numbers of user-defined and unknown.
_PIECE_TYPES = {1: _T.NORMAL, 2: _T.UNKNOWN, 3: _T.CONTROL, 4: _T.USER_DEFINED, 5: _T.UNUSED, 6: _T.BYTE}


def put_pieces(out: Vocabulary, pieces: list[tuple[str, float, int]]) -> None:
    """SentencePiece's pieces, as many as there are rows."""
    if len(pieces) > len(out.tokens):
        logger.warning("%s: pieces from id %d on are outside of the model's vocabulary and left out", out.path, len(out.tokens))
    for i, (text, score, kind) in enumerate(pieces[: len(out.tokens)]):
        out.put(i, text.replace("▁", " ") if kind == 4 else text, _PIECE_TYPES.get(kind, _T.NORMAL), score)


def piece_rows(files: Files, config: Mapping[str, Any], path: Path, pieces: list[tuple[str, float, int]]) -> Vocabulary:
    """The vocabulary of a SentencePiece file and the tokens added to it."""
    added = files.added({text: i for i, (text, _, _) in enumerate(pieces)}, replaces=True)
    out = Vocabulary.sized(path, max(len(pieces) - 1, *added, 0), config, -10000.0)
    put_pieces(out, pieces)
    out.put_added(added, -1000.0)
    return out


def fallback_vocabulary(files: Files, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json with byte fallback.

    llama.cpp merges the pair whose result scores best: the rank of its first merge, negated, as SentencePiece scores its
    own pieces. (float32 counts exactly up to 2^24.)
    """
    vocab, merges = files.vocabulary(), files.merges()
    added = files.added(vocab)
    out = Vocabulary.sized(files.directory / "tokenizer.json", max([*vocab.values(), *added], default=0), config, -10000.0)
    score = _first_ranks(merges)
    for text, i in vocab.items():
        octet = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)
        fallback = -1000.0 if octet else -float(len(merges))
        if i not in added or i < len(out.tokens):
            out.put(i, text, _T.BYTE if octet else _T.NORMAL, -float(score[text]) if text in score else fallback)
    unk = files.tokenizer["model"].get("unk_token")
    if unk in vocab:
        out.put(vocab[unk], unk, _T.UNKNOWN, -1000.0)
    out.put_added(added, -1000.0)
    if unk in vocab and vocab[unk] < len(out.tokens):
        out.types[vocab[unk]] = int(_T.CONTROL if vocab[unk] in added else _T.UNKNOWN)
    return out


def _first_ranks(merges: list[tuple[str, str]]) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    return ranks


def _extra(files: Files) -> int:
    """How many merges llama.cpp would make by scores that the file does not list."""
    vocab, merges = files.vocabulary(), files.merges()
    known = set(merges)
    return sum(
        (t[:i], t[i:]) not in known for t in _first_ranks(merges) for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab
    )


def scores_say_it(files: Files) -> bool:
    """Do scores of the results say the same as the list of merges?"""
    merges = files.merges()
    ranks = _first_ranks(merges)
    order = [ranks[a + b] for a, b in merges]
    return order == sorted(order) and not _extra(files)


def _agree(files: Files) -> bool:
    """Has SentencePiece's file the tokens of tokenizer.json, which is what transformers reads where both are there?"""
    if files.model is None or files.spm is None:
        return True
    pieces, added = files.spm[1].pieces, {t.text for _, t in files.entries}
    texts = {i: text for text, i in files.vocabulary().items()}
    odd = next((i for i, (text, _, _) in enumerate(pieces) if texts.get(i, text) not in (text, *added)), None)
    if odd is not None:
        logger.warning(
            "%s is another tokenizer than tokenizer.json, which counts: token %d is %r there, %r here",
            *(files.spm[0], odd, pieces[odd][0], texts[odd]),
        )
    return odd is None


class SentencePieceBPE(Model):
    """Pieces with scores; spaces are ▁, bytes stand for unknown characters."""

    @override
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        if files.model is None:
            return files.spm is not None and files.spm[1].model_type == 2
        return files.model == "BPE" and bool(files.tokenizer["model"].get("byte_fallback")) and not files.is_byte_level

    @override
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        if files.spm and files.spm[1].model_type == 2 and _agree(files):
            out, prefix = self._pieces(files, config)
        else:
            out, prefix = fallback_vocabulary(files, config), files.has_prefix
            if extra := _extra(files):
                logger.warning(
                    "%s: llama.cpp will also make %d merges that are not in its list: some ids may differ", out.path, extra
                )
        keys = {_K.MODEL: "llama", _K.PRE: "default", **out.keys(scores=True)}
        return out, keys if prefix else {**keys, _K.ADD_PREFIX: False}

    def _pieces(self, files: Files, config: Mapping[str, Any]) -> tuple[Vocabulary, bool]:
        assert files.spm
        path, model = files.spm
        if model.normalizer not in ("", "identity") or model.remove_extra_whitespaces:
            logger.warning(
                "%s normalizes text (%s%s), llama.cpp does not: ids differ on such text",
                path,
                model.normalizer or "identity",
                ", extra spaces removed" if model.remove_extra_whitespaces else "",
            )
        return piece_rows(files, config, path, model.pieces), model.add_dummy_prefix

    @override
    def owns(self, keys: Mapping[str, Any]) -> bool:
        return keys.get(_K.MODEL) == "llama"

    @override
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        tokens = keys[_K.LIST]
        scores = [float(s) for s in keys.get(_K.SCORES, [0.0] * len(tokens))]
        if len(scores) < len(tokens):
            raise FormatError(path, f"{len(scores)} scores for {len(tokens)} tokens")
        # SentencePiece joins the pair whose result scores best: as merges, every way to make a piece, best piece first
        merges = [
            (-scores[i], i, min(vocab[t[:k]], vocab[t[k:]]), t[:k], t[k:])
            for t, i in vocab.items()
            for k in range(1, len(t))
            if t[:k] in vocab and t[k:] in vocab
        ]
        unk = tokens[special_ids(keys)["unk"]]
        prefix = keys.get(_K.ADD_PREFIX, True)
        decoders = [replacement({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), replacement({"String": " "}, "▁")]
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "vocab": vocab,
                "merges": [[a, b] for *_, a, b in sorted(merges)],
                "byte_fallback": True,
                "fuse_unk": True,
                "unk_token": unk if unk in vocab else None,
            },
        }


MODEL = SentencePieceBPE()
