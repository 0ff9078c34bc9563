"""A checkpoint's tokenizer as GGUF's tokenizer.* keys: byte-level BPE becomes its model "gpt2", SentencePiece BPE "llama"."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import gguf
import numpy as np

from ..errors import FormatError, UnsupportedError, nearest
from .files import Files, read_json
from .pretokenizers import ADDS_BOS, KINDS, OTHER_NAMES, recognise
from .sentencepiece import SentencePieceModel
from .special import special_keys

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType
_MOST_TOKENS = 1 << 24


def metadata(directory: str | Path, config: Mapping[str, Any], *, pre_tokenizer: str | None = None) -> dict[str, Any]:
    """All tokenizer.* keys for the GGUF file of the checkpoint in `directory`.

    pre_tokenizer: llama.cpp's name of the byte-level pre-tokenizer, instead of recognising it.
    Values: str, bool, int (UINT32), list[str], int32 and float32 arrays. Raises FormatError for
    malformed files, UnsupportedError for tokenizers that GGUF or llama.cpp cannot express.
    """
    directory = Path(directory)
    if pre_tokenizer is not None:
        known = OTHER_NAMES | {k.name for k in KINDS}
        if pre_tokenizer not in known:
            raise UnsupportedError(
                f"--pre-tokenizer {pre_tokenizer}: llama.cpp has none of that name{nearest(pre_tokenizer, known)}"
            )
    try:
        found = _read(Files.read(directory), config, pre_tokenizer)
        "".join(t for v in found.values() if isinstance(v, (str, list)) for t in v).encode()
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as e:
        raise FormatError(directory, f"tokenizer.json or tokenizer_config.json is malformed: {e!r}") from e
    except OSError as e:
        raise FormatError(e.filename or directory, f"cannot be read: {e.strerror}") from None
    except UnicodeError as e:
        raise FormatError(directory, f"a token or template is not valid Unicode text: {e}") from None
    return found


def _read(files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    directory = files.directory
    if files.is_sentencepiece:
        if (directory / "tokenizer.model").is_file():
            return _sentencepiece(files, config)
        if files.tokenizer:
            return _llama_json(files, config)
        raise FormatError(directory, "no tokenizer.json and no tokenizer.model: copy the model's tokenizer files there")
    if (kind := files.tokenizer["model"].get("type", "BPE")) != "BPE":
        raise UnsupportedError(f"{directory / 'tokenizer.json'}: {kind} tokenizers are not handled, only BPE")
    return _byte_level(files, config, pre_tokenizer)


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


@dataclass(slots=True)
class _Vocabulary:
    """What GGUF says of every token, by id."""

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


def _byte_level(files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    path = files.directory / "tokenizer.json"
    pre = pre_tokenizer or recognise(files).name
    vocab = files.vocabulary()
    merges = files.merges()
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
    found |= _keys_beside(files, config, out, adds_bos=pre in ADDS_BOS)
    if any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in files.steps):
        logger.warning("tokenizer.json puts a space before the text; llama.cpp's byte-level BPE does not: first ids differ")
    return found


# SentencePiece's piece types are GGUF's token types but for the numbers of user-defined and unknown.
_PIECE_TYPES = {1: _T.NORMAL, 2: _T.UNKNOWN, 3: _T.CONTROL, 4: _T.USER_DEFINED, 5: _T.UNUSED, 6: _T.BYTE}


def _sentencepiece(files: Files, config: Mapping[str, Any]) -> dict[str, Any]:
    path = files.directory / "tokenizer.model"
    model = SentencePieceModel.read(path)
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


def _llama_json(files: Files, config: Mapping[str, Any]) -> dict[str, Any]:
    """A SentencePiece BPE that is only there as tokenizer.json (byte fallback, merges, ▁ for spaces)."""
    path = files.directory / "tokenizer.json"
    vocab, merges = files.vocabulary(), files.merges()
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


def _llama_keys(files: Files, config: Mapping[str, Any], out: _Vocabulary, prefix: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        _K.MODEL: "llama",
        _K.PRE: "default",
        _K.LIST: out.tokens,
        _K.SCORES: np.array(out.scores, np.float32),
        _K.TOKEN_TYPE: np.array(out.types, np.int32),
    }
    found |= _keys_beside(files, config, out, adds_bos=True)
    if not prefix:
        found[_K.ADD_PREFIX] = False
    return found


def _keys_beside(files: Files, config: Mapping[str, Any], out: _Vocabulary, adds_bos: bool) -> dict[str, Any]:
    """What goes with a vocabulary of either kind. adds_bos: what llama.cpp would do with a file that does not say."""
    unused = int(_T.UNUSED)
    ids = {t: i for i, t in enumerate(out.tokens) if out.types[i] != unused}
    found = special_keys(files, config, ids, len(out.tokens), adds_bos)
    if isinstance(prefix := files.config.get("add_prefix_space"), bool):
        found[_K.ADD_PREFIX] = prefix
    return found | _templates(files)


def _templates(files: Files) -> dict[str, Any]:
    """The chat template, or several by name, as text."""
    template = files.config.get("chat_template")
    jinja = files.directory / "chat_template.jinja"
    if template is None and jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
        if others := sorted((files.directory / "additional_chat_templates").glob("*.jinja")):
            template = [{"name": "default", "template": template}]
            template += [{"name": o.stem, "template": o.read_text(encoding="utf-8")} for o in others]
    elif template is None:
        template = read_json(files.directory / "chat_template.json").get("chat_template")
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
