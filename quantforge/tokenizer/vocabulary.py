"""A vocabulary as GGUF has it: text, type and score of every token by id, as many as the embedding has rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..errors import FormatError
from .files import Added

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_T = gguf.TokenType
_MOST_TOKENS = 1 << 24


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The model's, from config.json."""
    size = (config.get("text_config") or {}).get("vocab_size") or config.get("vocab_size")
    return size if isinstance(size, int) else None


def _looks_special(text: str) -> bool:
    """Control tokens that some models list as ordinary added ones."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


@dataclass(slots=True)
class Vocabulary:
    """Tokens by id; ids that nothing was put at are placeholders, [PADn]."""

    path: Path
    tokens: list[str]
    types: list[int]
    scores: list[float]
    score: float
    """Of placeholders."""

    @classmethod
    def sized(cls, path: Path, highest: int, config: Mapping[str, Any], score: float = 0.0) -> Vocabulary:
        """Placeholders only, as many as the model's vocab_size, or up to the highest id where config.json has none.

        path: the file that the tokens come from, for messages. Raises FormatError.
        """
        size = vocab_size(config) or highest + 1
        if not 0 < size <= _MOST_TOKENS:
            raise FormatError(path, f"a vocabulary of {size} tokens; the limit is {_MOST_TOKENS}")
        return cls(path, [""] * size, [int(_T.UNUSED)] * size, [score] * size, score)

    def put(self, i: int, text: str, kind: int, score: float = 0.0) -> None:
        """A token of the model. Raises FormatError for one beyond the embedding: it cannot be left out of a text."""
        if i >= len(self.tokens):
            raise FormatError(self.path, f"token id {i} is outside of the model's vocab_size {len(self.tokens)} (config.json)")
        self.tokens[i], self.types[i], self.scores[i] = text, int(kind), score

    def put_added(self, added: Mapping[int, Added], score: float = 0.0) -> None:
        """Added tokens; llama.cpp looks for user-defined ones in the raw text, so ▁ becomes a space."""
        for i, token in added.items():
            if i < len(self.tokens):
                control = token.special or _looks_special(token.text)
                text = token.text if control else token.text.replace("▁", " ")
                self.put(i, text, _T.CONTROL if control else _T.USER_DEFINED, score)
        if beyond := [t.text for i, t in sorted(added.items()) if i >= len(self.tokens)]:
            logger.warning(
                "%s: %d added tokens have no row in the embedding of %d and are left out: %s",
                self.path,
                len(beyond),
                len(self.tokens),
                ", ".join(map(repr, beyond[:3])) + (", ..." if beyond[3:] else ""),
            )

    def vocab(self) -> dict[str, int]:
        """Text -> id of the tokens that are in use."""
        return {t: i for i, t in enumerate(self.tokens) if t or self.types[i] != _T.UNUSED}

    def finish(self) -> None:
        """Names the placeholders. Raises FormatError where two ids have one text: llama.cpp cannot load such a file."""
        ids: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            if (text or self.types[i] != _T.UNUSED) and (first := ids.setdefault(text, i)) != i:
                raise FormatError(
                    self.path,
                    f"tokens {first} and {i} are both {text!r}: llama.cpp needs texts that differ; remove or rename one",
                )
        for i, text in enumerate(self.tokens):
            if not text and self.types[i] == _T.UNUSED:
                self.tokens[i] = f"[PAD{i}]" if f"[PAD{i}]" not in ids else f"[PAD{i}/unused]"

    def keys(self, *, scores: bool) -> dict[str, Any]:
        """GGUF's keys for it."""
        keys: dict[str, Any] = {_K.LIST: self.tokens, _K.TOKEN_TYPE: np.array(self.types, np.int32)}
        return keys | ({_K.SCORES: np.array(self.scores, np.float32)} if scores else {})
