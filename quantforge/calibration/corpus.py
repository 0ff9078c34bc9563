"""Text for measuring: documents, their tokens, and windows of tokens of which some are scored."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, RecipeError
from ..tokenizer import Tokenizer

BUILTIN = "builtin"
"""In place of a path: the text that ships with the package."""
HELD_OUT = Path(str(files("quantforge") / "data" / "text" / "heldout.txt"))
_BREAK = re.compile(r"\n{3,}")
_FEW = 10

Ints = NDArray[np.int64]
Stages: TypeAlias = Callable[[str, int, int], None]
"""Told of long work on text: what is being done, how much of it is done, of how much."""


def read_text(path: Path) -> tuple[bytes, str]:
    """A UTF-8 file as it is, and with lines that end as in Unix. Raises FormatError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise FormatError(path, f"cannot read the text: {e.strerror or e}") from None
    try:
        return data, data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise FormatError(path, f"the text is not UTF-8 ({e.reason})", e.start) from None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenized text. Documents are separated by two blank lines."""

    name: str
    sha256: str
    tokens: Ints
    document: Ints
    """Of which document each token is."""
    text: str = ""

    @classmethod
    def read(cls, text: str | os.PathLike[str], tokenizer: Tokenizer) -> Corpus:
        """Read and tokenize a UTF-8 file, or the shipped text ("builtin"). Raises FormatError."""
        builtin = os.fspath(text) == BUILTIN
        path = HELD_OUT if builtin else Path(os.path.expanduser(text))
        data, written = read_text(path)
        ids, starts = tokenizer.encode(written)
        first = [0, *(m.end() for m in _BREAK.finditer(written))]
        document = np.searchsorted(np.asarray(first), np.asarray(starts, np.int64), side="right") - 1
        name = path.name + (" (built in)" if builtin else "")
        return cls(name, hashlib.sha256(data).hexdigest(), np.asarray(ids, np.int64), document, written)

    @property
    def documents(self) -> int:
        """How many documents have tokens."""
        return len(np.unique(self.document))


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of tokens; where `scored`, the prediction of the next token counts."""

    ids: Ints
    """[windows, ctx]"""
    scored: NDArray[np.bool_]
    """[windows, ctx]: position i predicts ids[i + 1]."""
    document: Ints
    """[windows, ctx]: the document of each token."""
    stride: int | None
    bos: bool

    @property
    def targets(self) -> Ints:
        """The tokens to be predicted: int[scored], window by window."""
        return self.ids[:, 1:][self.scored[:, :-1]]

    def clusters(self) -> tuple[Ints, str]:
        """Which scored tokens belong together, and what such a block is called: documents; windows where those are few."""
        documents = self.document[:, 1:][self.scored[:, :-1]]
        if len(np.unique(documents)) >= _FEW:
            return documents, "documents"
        rows = np.broadcast_to(np.arange(len(self.ids))[:, None], self.scored.shape)
        return rows[self.scored], "windows"

    @property
    def scoring(self) -> str:
        """The convention in words."""
        ctx = self.ids.shape[1]
        if self.stride is None:
            return f"the last {ctx - ctx // 2 - 1} predictions of each window are scored, as llama-perplexity does"
        return f"sliding window, stride {self.stride}: each window scores the tokens that the one before did not see"


def cut(corpus: Corpus, tokenizer: Tokenizer, ctx: int, stride: int | None = None, chunks: int | None = None) -> Windows:
    """Cut a corpus into windows of `ctx` tokens.

    Without stride: one after another, the predictions after the first ctx/2 scored; where the tokenizer adds BOS,
    it is put in front of the text and in place of each window's first token. With stride: windows that begin
    `stride` tokens apart, each scoring what is new in it; BOS stands in front of the text only. chunks: at most so many.
    Raises RecipeError for options, and for a text shorter than one window.
    """
    if ctx < 4:
        raise RecipeError(f"--ctx {ctx}: a window needs at least 4 tokens")
    if stride is not None and not 0 < stride <= ctx:
        raise RecipeError(f"--stride {stride}: give 1 to {ctx} (the context)")
    if chunks is not None and chunks < 1:
        raise RecipeError(f"--chunks {chunks}: at least one window is needed")
    bos = tokenizer.bos if tokenizer.adds_bos else None
    tokens, document = corpus.tokens, corpus.document
    if bos is not None:
        tokens, document = np.concatenate([[bos], tokens]), np.concatenate([document[:1], document])
    if len(tokens) < ctx:
        raise RecipeError(
            f"{corpus.name}: {len(tokens)} tokens are less than one window of {ctx}; give more text or smaller windows"
        )
    if stride is None:
        n = min(len(tokens) // ctx, chunks or len(tokens))
        ids, where = tokens[: n * ctx].reshape(n, ctx).copy(), document[: n * ctx].reshape(n, ctx)
        if bos is not None:
            ids[:, 0] = bos
        scored = np.zeros(ids.shape, bool)
        scored[:, ctx // 2 : ctx - 1] = True
        return Windows(ids, scored, where, None, bos is not None)
    begins, end = [], 0
    for begin in range(0, len(tokens), stride):
        begins.append((begin, end))
        end = min(begin + ctx, len(tokens))
        if end == len(tokens) or len(begins) == chunks:
            break
    ids = np.zeros((len(begins), ctx), np.int64)  # the last window may be short: what follows a token does not change it
    where, scored = ids.copy(), np.zeros(ids.shape, bool)
    for row, (begin, seen) in enumerate(begins):
        part = tokens[begin : begin + ctx]
        ids[row, : len(part)], where[row, : len(part)] = part, document[begin : begin + ctx]
        scored[row, max(seen - begin - 1, 0) : len(part) - 1] = True
    return Windows(ids, scored, where, stride, bos is not None)
