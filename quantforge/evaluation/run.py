"""Compare models with a reference on text: what did quantization cost?

Whatever quantforge reads can be compared. `comparison` runs all models together on the text, `answers` and `tasks` ask
them, `metrics` say in figures what came of it; here models are opened and checked against each other, and figures put together.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import gguf

from .. import sizes
from ..calibration import overlap
from ..calibration.corpus import BUILTIN, Corpus, Stages, Windows, cut
from ..device import available
from ..errors import RecipeError, ShapeError, UnsupportedError
from ..formats import Adapters, merged, open_path
from . import answers as asking
from . import metrics as registry
from . import tasks as harness
from .comparison import Comparison
from .metrics import Answers, Measured, Metric
from .report import Evaluation, ModelResult
from .report.base import check_path

if TYPE_CHECKING:
    from ..runtime import Model

logger = logging.getLogger(__name__)

METRICS = ("ppl", "kld", "flips", "similarity")
"""What is measured where nothing else is asked for."""
CTX = 512
_LEAST = 64 << 20
"""Bytes that answering may always take; else no more than the text took, so that memory does not depend on depth."""
_PACKED_ON = {"cuda"}
"""Devices on which the models that are compared compute from what is stored; elsewhere a block is decoded once for all tokens."""

PathLike: TypeAlias = str | os.PathLike[str]


def evaluate(
    models: PathLike | Sequence[PathLike] | Mapping[str, PathLike],
    *,
    reference: PathLike,
    text: PathLike = BUILTIN,
    ctx: int | None = None,
    stride: int | None = None,
    chunks: int | None = None,
    metrics: Iterable[str] = METRICS,
    prompts: PathLike | Sequence[str] | None = None,
    answer_tokens: int = 64,
    embedder: str | None = None,
    tasks: Sequence[str] = (),
    task_path: PathLike | None = None,
    task_limit: int | None = None,
    device: str = "cpu",
    noise_floor: bool = True,
    lora: Adapters = (),
    report: PathLike | Sequence[PathLike] = (),
    progress: Stages | None = None,
) -> Evaluation:
    """Measure how far models are from a reference, on text and on answers to prompts.

    models: paths, or names -> paths; anything `quantforge.open` reads. text: a file, or "builtin" (the
    shipped held-out text); documents in it are separated by two blank lines. ctx: tokens per window,
    default min(512, the model's); the second half of each window is scored, after BOS if the
    tokenizer adds one, as llama-perplexity does. stride: instead, a sliding window that scores the last
    `stride` tokens, as in transformers' documentation. chunks: no more windows than this. metrics: names of
    `evaluation.metrics`; ppl is always measured.
    prompts: a file with one prompt on each line, or the prompts. embedder: a sentence-transformers model;
    default: mean hidden state of the reference. tasks: of lm-evaluation-harness; task_path: a directory
    with task files of one's own; task_limit: examples of each. lora: adapters that are merged into the reference, as in
    `convert`. report: .json, .md or .html files to write.
    progress: called with (what, done, of).
    Raises RecipeError for options, FormatError, ShapeError (vocabularies differ), NonFiniteError.
    """
    named = (
        dict(models) if isinstance(models, Mapping) else _named([models] if isinstance(models, (str, os.PathLike)) else models)
    )
    asked_for = set(metrics)
    wanted = registry.chosen(asked_for)
    reports = [report] if isinstance(report, (str, os.PathLike)) else list(report)
    for path in reports:
        check_path(path)
    judges = [m for m in wanted if m.needs == "answers"]
    questions = asking.read_prompts(prompts) if judges else []
    if answer_tokens < 1:
        raise RecipeError(f"--answer-tokens {answer_tokens}: at least one is needed")
    manager = harness.manager(tasks, task_path) if tasks else None
    tell = progress or (lambda what, done, of: None)
    began = time.perf_counter()
    device = str(available(device))
    with ExitStack() as stack:
        party = _Party(stack, named, reference, device, floor=noise_floor and asked_for > {"ppl"}, lora=lora)
        asked = asking.ask(questions, party.tokenizer, answer_tokens, _max_context(party.reference), embedder)
        corpus = Corpus.read(text, party.tokenizer)
        party.check_text(corpus)
        windows = cut(corpus, party.tokenizer, _context(ctx, party.reference), stride, chunks)
        before = sizes.resident()
        run = Comparison(party.running(), windows, wanted, tell)
        run.go()
        loss = time.perf_counter() - began
        results = [_result(m, i, run, wanted) for i, m in enumerate(run.models)]
        answers = None
        if questions:
            tell("answers", 0, 1)
            memory = max(_LEAST, run.held_bytes)
            parties = (party.reference, party.ceiling, *party.candidates)
            answers = asking.generate(parties, party.tokenizer, questions, asked, answer_tokens, embedder, memory)
            for i, _ in enumerate(party.candidates):
                for m in judges:
                    _record(results[1 + i], m, m.judge(answers, 2 + i))
        done = None
        if tasks:
            done, numbers = harness.run([party.reference, *party.candidates], party.tokenizer, tasks, manager, task_limit)
            for r, t in zip(results, numbers, strict=False):
                r.tasks = t
        seconds = time.perf_counter() - began
        n = 1 + len(party.candidates)
        evaluation = Evaluation(
            reference=results[0],
            models=results[1:n],
            noise_floor=results[n] if len(results) > n else None,
            text=_about_text(corpus, windows),
            intervals=_differences(run, n, wanted),
            similarity=asking.side_by_side(answers) if answers and any(m.name == "similarity" for m in judges) else None,
            tasks=done,
            run=_about_run(run, windows, device, loss, seconds, before, answers),
            figures=[f for m in wanted for f in m.figures if f.key not in ModelResult.__slots__],
        )
    for path in reports:
        evaluation.save(path)
    return evaluation


def _named(paths: Iterable[PathLike]) -> dict[str, PathLike]:
    """Models by file name without suffix; by more of the path where two have the same."""
    listed = [Path(p) for p in paths]
    models: dict[str, PathLike] = {}
    for p in listed:
        name = p.name.removesuffix(".gguf").removesuffix(".safetensors") or p.resolve().name
        same = sum(q.name == p.name for q in listed) > 1
        name = f"{p.resolve().parent.name}/{name}" if same else name
        if name in models:
            raise RecipeError(f"{p}: a model named {name} is there already; name each model once")
        models[name] = p
    if not models:
        raise RecipeError("no model to evaluate: name at least one")
    return models


class _Party:
    """The reference, the candidates and the tokenizer, opened and checked against each other."""

    def __init__(
        self,
        stack: ExitStack,
        named: Mapping[str, PathLike],
        reference: PathLike,
        device: str,
        floor: bool,
        lora: Adapters = (),
    ) -> None:
        import torch

        from ..runtime import Model

        source = stack.enter_context(merged(open_path(Path(reference)), lora))
        path = Path(reference)
        name = path.resolve().name.removesuffix(".gguf")
        self.reference = Model(source, name, device=device)
        self.tokenizer = source.tokenizer()
        self.ceiling = Model(source, f"{name} in bf16", device=device, dtype=torch.bfloat16)
        self.floor = floor
        self.candidates = []
        for name, p in named.items():
            packed = device.partition(":")[0] in _PACKED_ON
            candidate = Model(stack.enter_context(open_path(Path(p))), name, device=device, packed=packed)
            self._check_vocabulary(candidate)
            self.candidates.append(candidate)

    def running(self) -> list[Model]:
        """The models that see the text."""
        return [self.reference, *self.candidates, *([self.ceiling] if self.floor else [])]

    def check_text(self, corpus: Corpus) -> None:
        """Raise CalibrationError if a model was calibrated with the text."""
        runs = None
        for model in (self.reference, *self.candidates):
            config = model.source.config
            if overlap.remembered(config):
                runs = overlap.runs(corpus.text) if runs is None else runs
                overlap.check(model.name, config, corpus.name, corpus.text, runs)
            elif corpus.name in re.split(r"[\\/, ]+", str(config.get("quantize.imatrix.dataset", ""))):
                logger.warning(
                    "%s: its importance comes from a text that is also named %s; if it is this one, the model looks better "
                    "than it is",
                    model.name,
                    corpus.name,
                )

    def _check_vocabulary(self, candidate: Model) -> None:
        mine, ref = candidate.shape()["vocabulary"], self.reference.shape()["vocabulary"]
        if mine != ref:
            raise ShapeError(
                f"{candidate.name} has a vocabulary of {mine}, the reference {self.reference.name} one of {ref}: not comparable"
            )
        theirs = candidate.source.config.get(gguf.Keys.Tokenizer.LIST)
        if theirs is not None and self.tokenizer.tokens is not None and theirs != self.tokenizer.tokens:
            at = next(i for i, (a, b) in enumerate(zip(theirs, self.tokenizer.tokens, strict=False)) if a != b)
            raise ShapeError(
                f"{candidate.name} has another vocabulary than the reference {self.reference.name}: "
                f"token {at} is {theirs[at]!r}, not {self.tokenizer.tokens[at]!r}"
            )


def _max_context(model: Model) -> int:
    return int(getattr(model.module.config, "max_position_embeddings", None) or CTX)


def _context(ctx: int | None, reference: Model) -> int:
    own = _max_context(reference)
    if ctx is not None and ctx > own:
        logger.warning("--ctx %s exceeds the model's context of %s: it was not trained for that", ctx, own)
    return min(CTX, own) if ctx is None else ctx


# ---- results


def _result(m: Model, i: int, run: Comparison, wanted: Sequence[Metric]) -> ModelResult:
    source = m.source
    names = m.outer_names()
    bits = {k: 8 * s.nbytes for k, s in source.weights.items()}
    count = {k: prod(s.shape) for k, s in source.weights.items()}
    body = [k for k in bits if k not in names] or list(bits)
    types: dict[str, int] = defaultdict(int)
    for k, s in source.weights.items():
        types[s.codec.name] += count[k]
    r = ModelResult(
        name=m.name,
        path=str(source.path),
        format=source.format,
        bytes=source.total_bytes,
        parameters=sum(count.values()),
        bpw=sum(bits.values()) / sum(count.values()),
        bpw_body=sum(bits[k] for k in body) / sum(count[k] for k in body),
        types=dict(types),
        shape=m.shape(),
        hidden_error=run.hidden_error[i],
        tensors=run.tensors[i],
    )
    for metric in wanted:
        if metric.needs == "text" and (i or not metric.against_reference):
            _record(r, metric, metric.measure(run.seen(i, metric.name)))
    return r


def _record(r: ModelResult, metric: Metric, measured: Measured) -> None:
    known = {f.key for f in metric.figures}
    for key, value in measured.figures.items():
        if key not in known:
            raise UnsupportedError(f"metric {metric.name} gave {key}, which is none of its figures: {', '.join(known)}")
        r.put(key, value)
    r.intervals |= {k: asdict(i) for k, i in measured.intervals.items()}


def _differences(run: Comparison, n: int, wanted: Sequence[Metric]) -> dict[str, Any]:
    boot, what = run.clusters

    def paired(a: int, b: int) -> dict[str, Any]:
        some = (m.paired(run.seen(a, m.name), run.seen(b, m.name)) for m in wanted if m.needs == "text")
        return {k: asdict(i) for intervals in some for k, i in intervals.items()}

    names = [m.name for m in run.models]
    return {
        "level": boot.level,
        "clusters": boot.n,
        "cluster": what,
        "resamples": boot.resamples,
        "seed": boot.seed,
        "method": f"{boot.level:.0%} paired bootstrap of {boot.n} {what}, {boot.resamples} resamples, expanded percentiles",
        "differences": [{"a": names[a], "b": names[b], **paired(a, b)} for a in range(1, n) for b in range(a + 1, n)],
    }


def _about_text(corpus: Corpus, windows: Windows) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "documents": corpus.documents,
        "tokens": len(corpus.tokens),
        "tokens_scored": int(windows.scored.sum()),
        "windows": len(windows.ids),
        "ctx": int(windows.ids.shape[1]),
        "stride": windows.stride,
        "bos": windows.bos,
        "scoring": windows.scoring,
        "bos_note": "no BOS"
        if not windows.bos
        else "BOS in front of every window"
        if windows.stride is None
        else "BOS in front of the text",
    }


def _about_run(
    run: Comparison, windows: Windows, device: str, loss: float, seconds: float, before: int, answers: Answers | None
) -> dict[str, Any]:
    from .. import __version__

    peak = sizes.resident(peak=True)
    passed = windows.ids.size
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "seconds": seconds,
        "seconds_text": loss,
        "tokens_per_second": passed / loss,
        "model_tokens_per_second": passed * len(run.models) / loss,
        "peak_rss_bytes": peak,
        "block_bytes": run.block_bytes,
        "hidden_bytes": run.hidden_bytes,
        "rss_before_bytes": before,
        "head_bytes": run.head_bytes,
        "logit_bytes": run.logit_bytes,
        "memory": f"peak {peak / 1e9:.2f} GB of the process, {before / 1e9:.2f} GB of it there before the first token; "
        f"held at a time: hidden states of all {len(run.models)} models ({run.hidden_bytes / 1e6:.1f} MB), and one block of each "
        f"({run.block_bytes / 1e6:.1f} MB) or a slice of each head ({run.head_bytes / 1e6:.1f} MB) with its logits "
        f"({run.logit_bytes / 1e6:.1f} MB)"
        + (f"; to answer, one model ({answers.weight_bytes / 1e6:.1f} MB)" if answers else ""),
        "device": device,
        "machine": _machine(),
        "versions": {"quantforge": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"
