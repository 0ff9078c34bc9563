"""Prompts, the greedy answers of a reference and of candidates, and vectors of what they mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32
from ..errors import FormatError, RecipeError, UnsupportedError
from ..tokenizer import Tokenizer
from .metrics import Answers
from .metrics.similarity import bounds

if TYPE_CHECKING:
    from ..runtime import Model

Ids = list[list[int]]


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    """Prompts from a file with one on each line, from a sequence, or those that ship. Raises RecipeError if empty."""
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        lines = [str(p) for p in prompts]
    else:
        path = Path(str(files("quantforge") / "data" / "prompts.txt")) if prompts is None else Path(os.path.expanduser(prompts))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise FormatError(path, f"cannot read the prompts: {e.strerror or e}") from None
        except UnicodeDecodeError as e:
            raise FormatError(path, f"the prompts are not UTF-8 ({e.reason})", e.start) from None
    lines = [p for p in lines if p.strip()]
    if len(lines) < 2:
        raise RecipeError(f"{len(lines)} prompts: at least two are needed (one on each line), or --metrics without similarity")
    return lines


def ask(prompts: Sequence[str], tokenizer: Tokenizer, tokens: int, limit: int, embedder: str | None) -> Ids:
    """Token ids of prompts, with BOS where the tokenizer adds it.

    tokens: of an answer; limit: of prompt and answer. Raises RecipeError where that is exceeded, UnsupportedError for an
    embedder that cannot be had: both before anything long begins.
    """
    start = [tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []
    asked = [[*start, *tokenizer.encode(p)[0]] for p in prompts]
    longest = max((len(a) for a in asked), default=0)
    if asked and longest + tokens > limit:
        raise RecipeError(f"a prompt of {longest} tokens and an answer of {tokens} exceed the model's context of {limit}")
    if asked and embedder is not None:
        _sentence_transformer(embedder)
    return asked


def generate(
    models: Sequence[Model],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    asked: Ids,
    tokens: int,
    embedder: str | None,
    memory: int,
) -> Answers:
    """Greedy answers of every model.

    models: the reference, the same in bf16, candidates. asked: from `ask`; tokens: of an answer at most; memory: bytes for
    weights and cache, one model at a time.
    """
    from ..runtime import generate

    ids = [generate(m, asked, tokens, tokenizer.eos, memory) for m in models]
    name = embedder or "mean final hidden state of the reference"

    def embed() -> list[F32]:
        if embedder is None:
            return _by_reference(models[0], asked, ids)
        return _by_sentence_transformer(embedder, [[tokenizer.decode(a) for a in some] for some in ids])

    pieces = [[tokenizer.pieces(a) for a in some] for some in ids]
    held = max(m.resident_bytes for m in models)
    return Answers([m.name for m in models], prompts, tokens, ids, pieces, name, embed, held)


def side_by_side(answers: Answers) -> dict[str, Any]:
    """What a report shows of answers beside the models' figures: how they were made, the bounds of likeness, all texts."""
    floor, ceiling = bounds(answers)
    candidates = list(zip(answers.names, answers.pieces, strict=True))[2:]
    return {
        "embedder": answers.embedder,
        "prompts": len(answers.prompts),
        "tokens": answers.tokens,
        "weight_bytes": answers.weight_bytes,
        "ceiling": ceiling,
        "floor": floor,
        "answers": [
            {"prompt": p, "reference": answers.pieces[0][i], "models": {name: pieces[i] for name, pieces in candidates}}
            for i, p in enumerate(answers.prompts)
        ],
    }


def _by_reference(reference: Model, asked: Ids, answers: list[Ids]) -> list[F32]:
    from ..runtime import embed

    pairs = [(prompt, answer) for some in answers for prompt, answer in zip(asked, some, strict=True)]
    vectors = embed(reference, pairs)
    return [vectors[i * len(asked) : (i + 1) * len(asked)] for i in range(len(answers))]


def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UnsupportedError(f"--embedder {name} needs sentence-transformers: pip install 'quantforge[similarity]'") from None
    try:
        return SentenceTransformer(name, device="cpu")
    except Exception as e:  # whatever the library and its downloads raise
        raise UnsupportedError(f"--embedder {name}: sentence-transformers cannot load it: {str(e).splitlines()[0]}") from None


def _by_sentence_transformer(name: str, texts: list[list[str]]) -> list[F32]:
    model = _sentence_transformer(name)
    flat = [t for some in texts for t in some]
    vectors = np.asarray(model.encode(flat, show_progress_bar=False), np.float32)
    n = len(texts[0])
    return [vectors[i * n : (i + 1) * n] for i in range(len(texts))]
