"""Tokenizer files of a checkpoint (tokenizer.json, tokenizer.model) as GGUF's tokenizer.* metadata.

Byte-level BPE becomes GGUF's model "gpt2", SentencePiece BPE its model "llama". Templates are
carried over as text and never rendered.
"""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import gguf
import numpy as np

from .errors import FormatError, UnsupportedError, nearest

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType

# ---- pre-tokenizer kinds ---------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT4O = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# Escaped: some of these letters are canonical equivalents of others, and editors would replace them.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A pre-tokenizer of llama.cpp: the regexes that split the text one after the other."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    """Does llama.cpp put BOS first unless add_bos_token says otherwise?"""


# Source: llama.cpp src/llama-vocab.cpp (which name selects which regexes, merges and BOS handling)
# and the original patterns of the models' tokenizer.json; written in the form of _canonical.
_KINDS = (
    _Kind("gpt-2", (_GPT2,)),
    _Kind("llama-bpe", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    _Kind("smaug-bpe", (_LLAMA3,)),
    _Kind("qwen2", (_QWEN2,)),
    _Kind(
        "qwen35",
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    ),
    _Kind("smollm", (r"\p{N}", _GPT2)),
    _Kind(
        "tekken",
        (_CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        ignore_merges=True,
        adds_bos=True,
    ),
    _Kind("gpt-4o", (_GPT4O,)),
    # llama.cpp does without falcon's \p{N}+: no token spans its edge.
    _Kind("falcon", (r"[\p{P}$+<=>^~|`]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    _Kind("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    _Kind("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    _Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}+")),
    _Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}")),
    _Kind("bloom", (_BLOOM,)),
    _Kind("viking", (_BLOOM, r"\p{N}")),
    _Kind("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    _Kind("seed-coder", (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    _Kind(
        "jais-2",
        (
            rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
            r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
            r"|\s{1,2}(?!\S)|\s{1}",
        ),
    ),
    _Kind(
        "exaone-moe",
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_SPACES}",
        ),
    ),
)

# Other names that llama.cpp accepts, for --pre-tokenizer; those that add BOS by themselves.
# fmt: off
_OTHER_NAMES = frozenset((
    "default", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "mpt", "starcoder", "phi-2",
    "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert", "jina-v1-en",
    "jina-v2-code", "roberta-bpe", "refact", "command-r", "deepseek-r1-qwen", "kormo", "stablelm2", "olmo", "dbrx",
    "poro-chat", "glm4", "chatglm-bpe", "jais", "codeshell", "gpt3-finnish", "exaone", "exaone4", "chameleon", "minerva-7b",
    "megrez", "llama4", "kanana2", "trillion", "granite-docling", "bailingmoe", "bailingmoe2", "llada-moe", "hunyuan",
    "hunyuan-dense", "joyai-llm", "grok-2", "afmoe", "tiny_aya", "minimax-m2", "solar-open", "youtu", "kimi-k2",
))
# fmt: on
_ADDS_BOS = {k.name for k in _KINDS if k.adds_bos}
_ADDS_BOS |= {"llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "chameleon"}


def _canonical(regex: str) -> str:
    """The regex in one of several spellings that split every text alike."""
    for old, new in (
        ("\r", r"\r"),
        ("\n", r"\n"),
        (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
        (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
        (r"(?i:'s|'t|'re|'ve|'m|'d|'ll)", _CONTRACTIONS),
        # \s* gives back one newline and takes all before it: one or more is the same.
        (r"\s*[\r\n]+", r"\s*[\r\n]"),
        (r"\p{N}{1}", r"\p{N}"),
        # Possessive quantifiers before a disjoint class.
        ("]?+", "]?"),
        ("]++", "]+"),
        (r"\p{N}{1,3}+", r"\p{N}{1,3}"),
        (r"\s++", r"\s+"),
    ):
        regex = regex.replace(old, new)
    return regex


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of tokenizer.json's pre-tokenizer, sequences flattened."""
    if not pre_tokenizer:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [s for step in pre_tokenizer.get("pretokenizers", ()) for s in _steps(step)]
    return [pre_tokenizer]


def _splits(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The canonical regexes by which a step splits; something unlike any regex where that is not how it works."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return (_GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}" if step.get("individual_digits") else r"\p{N}+",)
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return (r"[\p{P}$+<=>^~|`]+",)
    if kind == "Split":
        pattern = step.get("pattern") or {}
        regex = _canonical(pattern["Regex"]) if "Regex" in pattern else re.escape(str(pattern.get("String", "")))
        # "keep what matches, drop the rest" is the same where the regex matches everything
        isolates = step.get("behavior") == "Isolated" or (
            step.get("behavior") == "Removed" and step.get("invert") and regex.endswith(r"\s+")
        )
        return (regex if isolates else f"{step.get('behavior')}({regex})",)
    return (f"{kind}({json.dumps({k: v for k, v in step.items() if k != 'type'}, ensure_ascii=False)})",)


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(tokenizer.get("pre_tokenizer")))


def _kind_of(files: _Files) -> _Kind:
    """The pre-tokenizer of llama.cpp that splits as this tokenizer.json does. Raises UnsupportedError."""
    tokenizer = files.tokenizer
    splits = tuple(s for step in _steps(tokenizer.get("pre_tokenizer")) for s in _splits(step))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    odd = [f"normalizer {step.get('type')}" for step in steps if step.get("type") != "NFC"]
    if not _is_byte_level(tokenizer):
        odd.append("no ByteLevel step")
    alike = [] if odd else sorted((k for k in _KINDS if k.splits == splits), key=lambda k: k.ignore_merges != ignore_merges)
    # Taking whole tokens without merging makes no difference where merges lead to every token anyway.
    if alike and (alike[0].ignore_merges == ignore_merges or _merges_reach_all(files)):
        if steps:
            logger.info("tokenizer.json normalizes text to NFC, llama.cpp does not: ids differ on decomposed text")
        return alike[0]
    near = max(_KINDS, key=lambda k: difflib.SequenceMatcher(None, " ".join(k.splits), " ".join(splits), False).ratio())
    shown = f"regex {' then '.join(splits) or '(none)'}, ignore_merges {str(ignore_merges).lower()}"
    shown = ", ".join([shown, *odd])
    raise UnsupportedError(
        f"tokenizer.json: llama.cpp has no pre-tokenizer with {shown}; the nearest is {near.name}: "
        f"--pre-tokenizer {near.name} to go on with it"
    )


def _merges_reach_all(files: _Files) -> bool:
    """Does BPE turn the text of every token, added ones aside, into that token?"""
    merges = _merges(files)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for token, i in _bpe_vocab(files).items():
        parts = [token] if i in files.added else list(token)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(merges)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(merges):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) > 1:
            return False
    return True


# ---- reading the checkpoint's files ----------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file. Raises FormatError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise FormatError(path, f"not readable as JSON: {e}") from None
    if not isinstance(found, dict):
        raise FormatError(path, "not a JSON object")
    return found


def _text(value: Any) -> str | None:
    """A token's text where files give either a string or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


@dataclass(slots=True)
class _Files:
    """Everything but the vocabulary itself."""

    directory: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_tokens: dict[str, Any]
    added: dict[int, tuple[str, bool]]
    """id -> text and "special" of tokens that are matched before the text is split."""

    @classmethod
    def read(cls, directory: Path) -> _Files:
        tokenizer = _json(directory / "tokenizer.json")
        config = _json(directory / "tokenizer_config.json")
        special_tokens = _json(directory / "special_tokens_map.json")
        added: dict[int, tuple[str, bool]] = {}
        try:
            for text, i in _json(directory / "added_tokens.json").items():
                added[int(i)] = (text, False)
            for key, entry in (config.get("added_tokens_decoder") or {}).items():
                added[int(key)] = (entry["content"], bool(entry.get("special")))
            for entry in tokenizer.get("added_tokens") or []:
                added[int(entry["id"])] = (entry["content"], bool(entry.get("special")))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(directory, f"the list of added tokens is malformed: {e!r}") from None
        # transformers makes every token that has a name (bos_token, ...) special
        named = {t for d in (config, special_tokens) for k, v in d.items() if k.endswith("_token") and (t := _text(v))}
        for d in (config, special_tokens):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                entries = d.get(key) or []
                for entry in entries.values() if isinstance(entries, Mapping) else entries:
                    named.add(_text(entry) or "")
        for i, (text, special) in added.items():
            added[i] = (text, special or text in named)
        return cls(directory, tokenizer, config, special_tokens, added)


def _looks_special(text: str) -> bool:
    """Control tokens that some models list as ordinary added ones."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    size = (config.get("text_config") or {}).get("vocab_size") or config.get("vocab_size")
    return size if isinstance(size, int) else None


_MOST_TOKENS = 1 << 24


@dataclass(slots=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def empty(cls, size: int, score: float) -> _Vocabulary:
        """`size` placeholders, for ids that the tokenizer leaves free below the embedding's rows."""
        tokens = [f"[PAD{i}]" for i in range(size)]
        return cls(tokens, [int(_T.UNUSED)] * size, [score] * size)

    def put(self, i: int, text: str, kind: int, score: float = 0.0) -> None:
        self.tokens[i], self.types[i], self.scores[i] = text, int(kind), score

    def put_added(self, added: Mapping[int, tuple[str, bool]], score: float = 0.0) -> None:
        """Added tokens; llama.cpp looks for user-defined ones in the raw text, so ▁ becomes a space."""
        for i, (text, special) in added.items():
            control = special or _looks_special(text)
            self.put(i, text if control else text.replace("▁", " "), _T.CONTROL if control else _T.USER_DEFINED, score)


def _size_for(path: Path, highest: int, config: Mapping[str, Any]) -> int:
    """Number of tokens to write: the embedding's rows."""
    size = _vocab_size(config) or highest + 1
    if not 0 < size <= _MOST_TOKENS:
        raise FormatError(path, f"a vocabulary of {size} tokens; the limit is {_MOST_TOKENS}")
    if highest >= size:
        raise FormatError(path, f"token id {highest} is outside of the model's vocab_size {size} (config.json)")
    return size


# ---- byte-level BPE --------------------------------------------------------------------------


def _bpe_vocab(files: _Files) -> dict[str, int]:
    vocab = files.tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise FormatError(files.directory / "tokenizer.json", "model.vocab is not a map of tokens to ids")
    if len(set(vocab.values())) != len(vocab):
        raise FormatError(files.directory / "tokenizer.json", "model.vocab has several tokens with one id")
    return vocab


def _merges(files: _Files) -> list[tuple[str, str]]:
    """Merges in rank order; both spellings, "a b" and ["a", "b"], occur."""
    found = []
    for merge in files.tokenizer["model"].get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise FormatError(files.directory / "tokenizer.json", f"merge {merge!r} is not a pair of tokens")
        found.append((pair[0], pair[1]))
    return found


def _byte_level(files: _Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    path = files.directory / "tokenizer.json"
    pre = pre_tokenizer or _kind_of(files).name
    vocab = _bpe_vocab(files)
    merges = _merges(files)
    if not merges:
        raise FormatError(path, "model.merges is empty: llama.cpp cannot run a BPE tokenizer without merges")
    if not files.tokenizer.get("added_tokens") and not vocab:
        raise FormatError(path, "the vocabulary is empty")
    out = _Vocabulary.empty(_size_for(path, max([*vocab.values(), *files.added], default=0), config), 0.0)
    for text, i in vocab.items():
        out.put(i, text, _T.NORMAL)
    out.put_added(files.added)
    found = {
        _K.MODEL: "gpt2",
        _K.PRE: pre,
        _K.LIST: out.tokens,
        _K.TOKEN_TYPE: np.array(out.types, np.int32),
        # A space inside a token would be the separator's twin; the byte alphabet has Ġ for it.
        _K.MERGES: [" ".join(p.replace(" ", "Ġ") for p in pair) for pair in merges],
    }
    found.update(_special(files, config, out, adds_bos=pre in _ADDS_BOS))
    if any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in _steps(files.tokenizer.get("pre_tokenizer"))):
        logger.warning("tokenizer.json puts a space before the text; llama.cpp's byte-level BPE does not: first ids differ")
    return found


# ---- SentencePiece BPE -----------------------------------------------------------------------


def _fields(data: memoryview, path: Path, base: int) -> Iterator[tuple[int, int | memoryview, int]]:
    """Protobuf fields of a message as number, value and offset: varints as int, others as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise FormatError(path, "truncated or malformed SentencePiece model", base + at)
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(data):
        tag, at = varint(at)
        if tag & 7 == 0:
            value, at = varint(at)
            yield tag >> 3, value, base + at
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 2:
            size, at = varint(at)
        if size is None or size > len(data) - at:
            raise FormatError(path, "truncated or malformed SentencePiece model", base + at)
        yield tag >> 3, data[at : at + size], base + at
        at += size


@dataclass(slots=True)
class _SentencePiece:
    """What tokenizer.model (sentencepiece_model.proto) says that matters here."""

    pieces: list[tuple[str, float, int]]
    model_type: int = 1
    normalizer: str = ""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def read(cls, path: Path) -> _SentencePiece:
        found = cls([])
        for number, value, at in _fields(memoryview(path.read_bytes()), path, 0):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                text, score, kind = "", 0.0, 1
                for n, v, _ in _fields(value, path, at):
                    if n == 1 and isinstance(v, memoryview):
                        try:
                            text = str(v, "utf-8")
                        except UnicodeDecodeError:
                            raise FormatError(path, f"piece {len(found.pieces)} is not UTF-8", at) from None
                    elif n == 2 and isinstance(v, memoryview) and len(v) == 4:
                        (score,) = struct.unpack("<f", v)
                    elif n == 3 and isinstance(v, int):
                        kind = v
                found.pieces.append((text, score, kind))
            elif number == 2:
                found.model_type = next((v for n, v, _ in _fields(value, path, at) if n == 3 and isinstance(v, int)), 1)
            elif number == 3:
                for n, v, _ in _fields(value, path, at):
                    if n == 1 and isinstance(v, memoryview):
                        found.normalizer = str(v, "utf-8", "replace")
                    elif n == 3:
                        found.add_dummy_prefix = bool(v)
                    elif n == 4:
                        found.remove_extra_whitespaces = bool(v)
        if not found.pieces:
            raise FormatError(path, "not a SentencePiece model: it has no pieces")
        if found.model_type != 2:
            names = {1: "unigram", 3: "word", 4: "char"}
            kind_name = names.get(found.model_type, f"type {found.model_type}")
            raise UnsupportedError(f"{path}: a {kind_name} SentencePiece model; only BPE ones are handled")
        return found


# SentencePiece's piece types are GGUF's token types but for the numbers of user-defined and unknown.
_PIECE_TYPES = {1: _T.NORMAL, 2: _T.UNKNOWN, 3: _T.CONTROL, 4: _T.USER_DEFINED, 5: _T.UNUSED, 6: _T.BYTE}


def _sentencepiece(files: _Files, config: Mapping[str, Any]) -> dict[str, Any]:
    path = files.directory / "tokenizer.model"
    model = _SentencePiece.read(path)
    if model.normalizer not in ("", "identity") or model.remove_extra_whitespaces:
        logger.warning(
            "%s normalizes text (%s%s), llama.cpp does not: ids differ on such text",
            path,
            model.normalizer or "identity",
            ", extra spaces removed" if model.remove_extra_whitespaces else "",
        )
    size = _size_for(path, (_vocab_size(config) or max(len(model.pieces), *(i + 1 for i in files.added), 1)) - 1, config)
    if len(model.pieces) > size:
        logger.warning("%s: pieces from id %d on are outside of the model's vocabulary and left out", path, size)
    out = _Vocabulary.empty(size, -10000.0)
    for i, (text, score, kind) in enumerate(model.pieces[:size]):
        user = kind == 4
        out.put(i, text.replace("▁", " ") if user else text, _PIECE_TYPES.get(kind, _T.NORMAL), score)
    out.put_added({i: t for i, t in files.added.items() if i < size}, -1000.0)
    return _llama_keys(files, config, out, model.add_dummy_prefix)


def _llama_json(files: _Files, config: Mapping[str, Any]) -> dict[str, Any]:
    """A SentencePiece BPE that is only there as tokenizer.json (byte fallback, merges, ▁ for spaces)."""
    path = files.directory / "tokenizer.json"
    vocab, merges = _bpe_vocab(files), _merges(files)
    out = _Vocabulary.empty(_size_for(path, max([*vocab.values(), *files.added], default=0), config), -10000.0)
    # llama.cpp merges the pair whose result scores best: the rank of its first merge, negated, as
    # SentencePiece scores its own pieces. (float32 counts exactly up to 2^24.)
    score: dict[str, float] = {}
    for rank, (a, b) in enumerate(merges):
        score.setdefault(a + b, -float(rank))
    for text, i in vocab.items():
        octet = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text)
        out.put(i, text, _T.BYTE if octet else _T.NORMAL, score.get(text, -1000.0 if octet else -float(len(merges))))
    unk = files.tokenizer["model"].get("unk_token")
    if unk in vocab:
        out.put(vocab[unk], unk, _T.UNKNOWN, -1000.0)
    out.put_added(files.added, -1000.0)
    known = set(merges)
    if extra := sum((t[:i], t[i:]) not in known for t in score for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab):
        logger.warning("%s: llama.cpp will also make %d merges that are not in its list: some ids may differ", path, extra)
    return _llama_keys(files, config, out, _spm_prefix(files.tokenizer))


def _spm_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Does this tokenizer.json put ▁ before the text: by normalizer, or by Metaspace?"""
    normalizer = tokenizer.get("normalizer") or {}
    if any(n.get("type") == "Prepend" for n in normalizer.get("normalizers", [normalizer])):
        return True
    pre = tokenizer.get("pre_tokenizer") or {}
    return any(
        p.get("type") == "Metaspace"
        and p.get("prepend_scheme", "always" if p.get("add_prefix_space", True) else "never") != "never"
        for p in pre.get("pretokenizers", [pre])
    )


def _llama_keys(files: _Files, config: Mapping[str, Any], out: _Vocabulary, prefix: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        _K.MODEL: "llama",
        _K.PRE: "default",
        _K.LIST: out.tokens,
        _K.SCORES: np.array(out.scores, np.float32),
        _K.TOKEN_TYPE: np.array(out.types, np.int32),
    }
    found.update(_special(files, config, out, adds_bos=True))
    if not prefix:
        found[_K.ADD_PREFIX] = False
    return found


# ---- special tokens and chat templates -------------------------------------------------------

_IDS = {
    "bos": _K.BOS_ID,
    "eos": _K.EOS_ID,
    "unk": _K.UNK_ID,
    "sep": _K.SEP_ID,
    "pad": _K.PAD_ID,
    "mask": _K.MASK_ID,
    "eot": _K.EOT_ID,
    "eom": _K.EOM_ID,
}
_ADDS = {"bos": _K.ADD_BOS, "eos": _K.ADD_EOS, "sep": _K.ADD_SEP}


def _special(files: _Files, config: Mapping[str, Any], out: _Vocabulary, adds_bos: bool) -> dict[str, Any]:
    """Ids of special tokens, which of them are added to a text, and the chat template.

    adds_bos: what llama.cpp would do with a file that does not say.
    """
    text = {n: t for n in (*_IDS, "cls") for d in (files.special_tokens, files.config) if (t := _text(d.get(f"{n}_token")))}
    if "cls" in text:
        text.setdefault("bos", text["cls"])
    if "sep" in text:
        text.setdefault("eos", text["sep"])
    adds = _added_by_template(files.tokenizer.get("post_processor"), text)
    for name in _ADDS:
        if isinstance(flag := files.config.get(f"add_{name}_token"), bool):
            adds[name] = flag
    if adds_bos and files.tokenizer:
        adds.setdefault("bos", False)

    unused = int(_T.UNUSED)
    where = {t: i for i, t in enumerate(out.tokens) if out.types[i] != unused}
    found: dict[str, Any] = {}
    for name, key in _IDS.items():
        stated = {**config, **(config.get("text_config") or {})}.get(f"{name}_token_id")
        if isinstance(stated, list) and stated:  # several end tokens: the first is the one to write
            stated = stated[0]
        number = where.get(text.get(name, ""), stated)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(out.tokens):
            found[key] = number
    found.update({_ADDS[name]: flag for name, flag in adds.items()})
    if isinstance(prefix := files.config.get("add_prefix_space"), bool):
        found[_K.ADD_PREFIX] = prefix
    found.update(_templates(files))
    return found


def _added_by_template(post_processor: Mapping[str, Any] | None, text: dict[str, str]) -> dict[str, bool]:
    """Which of bos, eos, sep the post-processor puts around a text; names that it alone defines go into `text`."""

    def token(step: Mapping[str, Any]) -> str | None:
        return (step.get("SpecialToken") or {}).get("id")

    adds: dict[str, bool] = {}
    for processor in (post_processor or {}).get("processors") or [post_processor or {}]:
        if processor.get("type") == "RobertaProcessing":
            adds |= {"bos": True, "eos": True, "sep": True}
            text.setdefault("cls", processor["cls"][0])
            text.setdefault("sep", processor["sep"][0])
        if processor.get("type") != "TemplateProcessing":
            continue
        single, pair = processor.get("single") or [], list(processor.get("pair") or [])
        first = token(single[0]) if len(single) > 1 else None
        last = token(single[-1]) if len(single) > 1 else None
        if first:
            adds["bos"] = first in (text.setdefault("bos", first), text.get("cls"))
            if not adds["bos"]:
                logger.warning("tokenizer.json puts %r first, which is not the bos_token: llama.cpp will not", first)
        if last:
            if (old := text.setdefault("eos", last)) != last:
                text["eot"], text["eos"] = old, last  # the turn's end stays known as such
            adds["eos"] = True
        if first and pair and token(pair[0]) == first:
            del pair[0]
        if last and pair and token(pair[-1]) == last:
            del pair[-1]
        if between := [token(step) for step in pair[1:-1]]:
            ends = (text.get("sep"), text.get("eos"))
            adds["sep"] = (between[0] in ends and not last) or (len(between) == 2 and between[1] in ends)
            if adds["sep"] and "eos" in text:
                text.setdefault("sep", text["eos"])
    return adds


def _templates(files: _Files) -> dict[str, Any]:
    """The chat template, or several by name, as text."""
    template = files.config.get("chat_template")
    jinja = files.directory / "chat_template.jinja"
    if template is None and jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
        if others := sorted((files.directory / "additional_chat_templates").glob("*.jinja")):
            template = [{"name": "default", "template": template}]
            template += [{"name": o.stem, "template": o.read_text(encoding="utf-8")} for o in others]
    elif template is None:
        template = _json(files.directory / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {_K.CHAT_TEMPLATE: template}
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found: dict[str, Any] = {}
    names = []
    for choice in template or []:
        name = "".join(c if c in ascii_letters + digits else "_" for c in str(choice.get("name", "")))
        text = choice.get("template")
        if not name or not isinstance(text, str):
            continue
        if name == "default":
            found[_K.CHAT_TEMPLATE] = text
        else:
            names.append(name)
            found[_K.CHAT_TEMPLATE_N.format(name=name)] = text
    if names:
        found[_K.CHAT_TEMPLATES] = names
    return found


def metadata(directory: str | Path, config: Mapping[str, Any], *, pre_tokenizer: str | None = None) -> dict[str, Any]:
    """All tokenizer.* keys for the GGUF file of the checkpoint in `directory`.

    pre_tokenizer: llama.cpp's name of the byte-level pre-tokenizer, instead of recognising it.
    Values: str, bool, int (UINT32), list[str], int32 and float32 arrays. Raises FormatError for
    malformed files, UnsupportedError for tokenizers that GGUF or llama.cpp cannot express.
    """
    directory = Path(directory)
    if pre_tokenizer is not None:
        known = _OTHER_NAMES | {k.name for k in _KINDS}
        if pre_tokenizer not in known:
            raise UnsupportedError(
                f"--pre-tokenizer {pre_tokenizer}: llama.cpp has none of that name{nearest(pre_tokenizer, known)}"
            )
    try:
        found = _read(_Files.read(directory), config, pre_tokenizer)
        "".join(t for v in found.values() if isinstance(v, (str, list)) for t in v).encode()
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as e:
        raise FormatError(directory, f"tokenizer.json or tokenizer_config.json is malformed: {e!r}") from e
    except OSError as e:
        raise FormatError(e.filename or directory, f"cannot be read: {e.strerror}") from None
    except UnicodeError as e:
        raise FormatError(directory, f"a token or template is not valid Unicode text: {e}") from None
    return found


def _read(files: _Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    directory = files.directory
    if _is_sentencepiece(files.tokenizer):
        if (directory / "tokenizer.model").is_file():
            return _sentencepiece(files, config)
        if files.tokenizer:
            return _llama_json(files, config)
        raise FormatError(directory, "no tokenizer.json and no tokenizer.model: copy the model's tokenizer files there")
    if (kind := files.tokenizer["model"].get("type", "BPE")) != "BPE":
        raise UnsupportedError(f"{directory / 'tokenizer.json'}: {kind} tokenizers are not handled, only BPE")
    return _byte_level(files, config, pre_tokenizer)


def _is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """No tokenizer.json, or one of Llama's kind: byte fallback instead of a byte alphabet."""
    return not tokenizer or (bool(tokenizer["model"].get("byte_fallback")) and not _is_byte_level(tokenizer))


# ---- running it ------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer that runs: from a checkpoint's files, or rebuilt from GGUF metadata."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, gguf_metadata: bool) -> None:
        """path: the model; config: its config.json, or, with gguf_metadata, its key-value pairs. Raises FormatError."""
        from tokenizers import Tokenizer as Engine

        path = Path(path)
        file = (path if path.is_dir() else path.parent) / "tokenizer.json"
        found: Mapping[str, Any] = {}
        try:
            found = config if gguf_metadata else metadata(file.parent, config)
            text = file.read_text(encoding="utf-8") if not gguf_metadata and file.is_file() else to_json(found, path)
        except UnsupportedError:
            if gguf_metadata or not file.is_file():
                raise
            text = file.read_text(encoding="utf-8")
        try:
            self._engine = Engine.from_str(text)
        except Exception as e:  # the tokenizers library raises bare Exception
            raise FormatError(path, f"the tokenizers library does not take this tokenizer: {e}") from None
        self.tokens: list[str] | None = found.get(_K.LIST)
        """Every token's text by id, where the tokenizer is of a kind that GGUF knows."""
        self.bos: int | None = found.get(_K.BOS_ID, config.get("bos_token_id"))
        self.eos: list[int] = _ids(found.get(_K.EOS_ID), found.get(_K.EOT_ID), config.get("eos_token_id"))
        self.adds_bos = self.bos is not None and adds(found)["bos"]
        """Does llama.cpp put BOS in front of a text?"""
        if not found:
            start = self._engine.encode("", add_special_tokens=True).ids
            self.adds_bos, self.bos = bool(start) and start[0] not in self.eos, start[0] if start else self.bos

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without BOS or EOS, and the position in the text at which each begins."""
        done = self._engine.encode(text, add_special_tokens=False)
        return done.ids, [a for a, _ in done.offsets]

    def transformers(self) -> Any:
        """The same as transformers has it, for libraries that want one."""
        from transformers import PreTrainedTokenizerFast

        name = self._engine.id_to_token
        named = {"bos_token": self.bos, "eos_token": self.eos[0] if self.eos else None}
        special = {k: name(i) for k, i in named.items() if i is not None}
        build: Any = PreTrainedTokenizerFast
        return build(tokenizer_object=self._engine, pad_token=special.get("eos_token"), **special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it."""
        texts = [self.decode(ids[:n]) for n in range(len(ids) + 1)]
        return [b[len(a) :] if b.startswith(a) else b[len(_common(a, b)) :] for a, b in pairwise(texts)]


def _common(a: str, b: str) -> str:
    return next((a[:i] for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), a[: len(b)])


def _ids(*values: Any) -> list[int]:
    found = [int(i) for v in values if v is not None for i in (v if isinstance(v, list) else [v])]
    return list(dict.fromkeys(found))


def special_ids(found: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens by name ("bos", "eos", "eot", ...) of GGUF's tokenizer.* keys."""
    assumed = {"unk": 0, "bos": 1, "eos": 2} if found.get(_K.MODEL) == "llama" else {}  # as llama.cpp does
    return assumed | {name: int(found[key]) for name, key in _IDS.items() if found.get(key) is not None}


def adds(found: Mapping[str, Any]) -> dict[str, bool]:
    """Which of "bos" and "eos" llama.cpp puts around a text, by GGUF's tokenizer.* keys."""
    bos = found.get(_K.MODEL) == "llama" or found.get(_K.PRE) in _ADDS_BOS
    return {"bos": bool(found.get(_K.ADD_BOS, bos)), "eos": bool(found.get(_K.ADD_EOS, False))}


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


# Names of llama.cpp for kinds that split alike.
_ALIASES = {
    alias: kind
    for kind, aliases in {
        "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
        "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        "qwen2": (
            "deepseek-r1-qwen",
            "kormo",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "megrez",
            "grok-2",
            "bailingmoe",
            "llada-moe",
        ),
        "gpt-4o": ("llama4", "kanana2", "minimax-m2"),
        "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
        "bloom": ("poro-chat", "gpt3-finnish"),
    }.items()
    for alias in aliases
}


def _byte_level_json(found: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
    pre = found.get(_K.PRE, "default")
    kind = next((k for k in _KINDS if k.name == _ALIASES.get(pre, pre)), None)
    if kind is None:
        known = ", ".join(dict.fromkeys(k.name for k in _KINDS))
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
