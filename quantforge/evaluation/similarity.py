"""How alike are the answers? Greedy answers of a reference and of candidates, token by token and by meaning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32
from ..errors import FormatError, RecipeError, UnsupportedError
from ..tokenizer import Tokenizer
from . import metrics

if TYPE_CHECKING:
    from ..runtime import Model

Answers = list[list[int]]


def read_prompts(prompts: str | os.PathLike[str] | Sequence[str] | None) -> list[str]:
    """Prompts from a file with one on each line, from a sequence, or those that ship. Raises RecipeError if empty."""
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        found = [str(p) for p in prompts]
    else:
        path = Path(str(files("quantforge") / "data" / "prompts.txt")) if prompts is None else Path(prompts)
        try:
            found = path.read_text(encoding="utf-8").splitlines()
        except OSError as e:
            raise FormatError(path, f"cannot read the prompts: {e.strerror or e}") from None
        except UnicodeDecodeError as e:
            raise FormatError(path, f"the prompts are not UTF-8 ({e.reason})", e.start) from None
    found = [p for p in found if p.strip()]
    if len(found) < 2:
        raise RecipeError(f"{len(found)} prompts: at least two are needed (one on each line), or --metrics without similarity")
    return found


def ask(prompts: Sequence[str], tokenizer: Tokenizer, tokens: int, limit: int, embedder: str | None) -> Answers:
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


def compare(
    models: Sequence[Model],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    asked: Answers,
    tokens: int,
    embedder: str | None,
    memory: int,
) -> tuple[dict[str, Any], list[dict[str, float]], list[dict[str, dict[str, float]]]]:
    """Answers of every model compared with the reference's.

    models: the reference, the same in bf16 (the ceiling), candidates; the floor are answers to other prompts.
    asked: from `ask`; tokens: of an answer at most; memory: bytes for weights and cache, one model at a time.
    Returns what they have in common, and of every candidate figures and intervals.
    """
    from ..runtime import generate

    answers = [generate(m, asked, tokens, tokenizer.eos, memory) for m in models]
    if embedder is None:
        name = "mean final hidden state of the reference"
        vectors = _by_reference(models[0], asked, answers)
    else:
        name = embedder
        vectors = _by_sentence_transformer(embedder, [[tokenizer.decode(a) for a in some] for some in answers])
    shuffled = np.roll(np.arange(len(prompts)), 1)
    ref = answers[0]
    floor = _figures(ref, [ref[i] for i in shuffled], metrics.cosine(vectors[0], vectors[0][shuffled]))
    top = _figures(ref, answers[1], metrics.cosine(vectors[0], vectors[1]))
    found, intervals = [], []
    boot = metrics.Bootstrap(np.arange(len(prompts)))
    for mine, v in zip(answers[2:], vectors[2:], strict=True):
        cosines = metrics.cosine(vectors[0], v)
        figures = _figures(ref, mine, cosines)
        span = top["cosine"] - floor["cosine"]
        figures["scaled"] = (figures["cosine"] - floor["cosine"]) / span if span > 0 else float("nan")
        found.append(figures)
        equal = np.asarray([metrics.equal_share(a, b) for a, b in zip(ref, mine, strict=True)])
        intervals.append({"cosine": asdict(boot.interval(cosines)), "equal_tokens": asdict(boot.interval(equal))})
    pieces = [[tokenizer.pieces(a) for a in some] for some in answers]
    common = {
        "embedder": name,
        "prompts": len(prompts),
        "tokens": tokens,
        "weight_bytes": max(m.resident_bytes for m in models),
        "ceiling": top,
        "floor": floor,
        "answers": [
            {"prompt": p, "reference": pieces[0][i], "models": {m.name: pieces[2 + k][i] for k, m in enumerate(models[2:])}}
            for i, p in enumerate(prompts)
        ],
    }
    return common, found, intervals


def _figures(ref: Answers, mine: Answers, cosines: metrics.F64) -> dict[str, float]:
    parted = [metrics.first_divergence(a, b) for a, b in zip(ref, mine, strict=True)]
    return {
        "cosine": float(cosines.mean()),
        "equal_tokens": float(np.mean([metrics.equal_share(a, b) for a, b in zip(ref, mine, strict=True)])),
        # an answer that stays equal parts at its end
        "first_divergence": float(np.median([len(a) if p is None else p for a, p in zip(ref, parted, strict=True)])),
        "unchanged": sum(p is None for p in parted),
    }


def _by_reference(reference: Model, asked: Answers, answers: list[Answers]) -> list[F32]:
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
