"""Compare models with a reference on text: what did quantization cost?

All models advance together, a decoder block at a time; the head is applied to slices of tokens,
whose logits go into `metrics.Score` and are dropped. Whatever quantforge reads can be compared.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import gguf
import numpy as np

from . import metrics as stats
from . import overlap, similarity
from .arrays import F32
from .corpus import BUILTIN, Corpus, Windows, cut
from .errors import RecipeError, ShapeError, nearest
from .formats import open_path
from .report import Evaluation, ModelResult, TensorError
from .report.base import check_path
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runtime import Model

logger = logging.getLogger(__name__)

METRICS = ("ppl", "kld", "flips", "similarity")
CTX = 512
_LOGITS_AT_ONCE = 8 << 20
"""Logits of one model that exist together: 32 MB."""
_LOGITS_IN_CACHE = 1 << 20
_OBSERVED = 16384
"""Tokens from which input statistics and the error of hidden states are taken."""

PathLike: TypeAlias = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]


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
    report: PathLike | Sequence[PathLike] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how far models are from a reference, on text and on answers to prompts.

    models: paths, or names -> paths; anything `quantforge.open` reads. text: a file, or "builtin" (the
    shipped held-out text); documents in it are separated by two blank lines. ctx: tokens per window,
    default min(512, the model's); the second half of each window is scored, after BOS if the
    tokenizer adds one, as llama-perplexity does. stride: instead, a sliding window that scores the last
    `stride` tokens, as in transformers' documentation. chunks: no more windows than this.
    prompts: a file with one prompt on each line, or the prompts. embedder: a sentence-transformers model;
    default: mean hidden state of the reference. tasks: of lm-evaluation-harness; task_path: a directory
    with task files of one's own; task_limit: examples of each. report: .json, .md or .html files to write.
    progress: called with (what, done, of).
    Raises RecipeError for options, FormatError, ShapeError (vocabularies differ), NonFiniteError.
    """
    named = (
        dict(models) if isinstance(models, Mapping) else _named([models] if isinstance(models, (str, os.PathLike)) else models)
    )
    wanted = _metrics(metrics)
    reports = [report] if isinstance(report, (str, os.PathLike)) else list(report)
    for path in reports:
        check_path(path)
    questions = similarity.read_prompts(prompts) if "similarity" in wanted else []
    if answer_tokens < 1:
        raise RecipeError(f"--answer-tokens {answer_tokens}: at least one is needed")
    tell = progress or (lambda what, done, of: None)
    began = time.perf_counter()
    with ExitStack() as stack:
        party = _Party(stack, named, reference, device, floor=noise_floor and wanted > {"ppl"})
        corpus = Corpus.read(text, party.tokenizer)
        party.check_text(corpus)
        windows = cut(corpus, party.tokenizer, _context(ctx, party.reference), stride, chunks)
        run = _Run(party.running(wanted), windows, tell)
        run.go()
        loss = time.perf_counter() - began
        results = [_result(m, i, run, wanted) for i, m in enumerate(run.models)]
        answers = None
        if questions:
            tell("answers", 0, 1)
            limit = _max_context(party.reference)
            answers, figures, intervals = similarity.compare(
                party.reference, party.ceiling, party.candidates, party.tokenizer, questions, answer_tokens, embedder, limit
            )
            for r, f, i in zip(results[1:], figures, intervals, strict=False):
                r.similarity = f
                r.intervals |= i
        found = None
        if tasks:
            from . import tasks as harness

            found, numbers = harness.run([party.reference, *party.candidates], party.tokenizer, tasks, task_path, task_limit)
            for r, t in zip(results, numbers, strict=False):
                r.tasks = t
        seconds = time.perf_counter() - began
        n = 1 + len(party.candidates)
        evaluation = Evaluation(
            reference=results[0],
            models=results[1:n],
            noise_floor=results[n] if len(results) > n else None,
            text=_about_text(corpus, windows),
            intervals=_differences(run, n),
            similarity=answers,
            tasks=found,
            run=_about_run(run, windows, device, loss, seconds),
        )
    for path in reports:
        evaluation.save(path)
    return evaluation


def _named(paths: Iterable[PathLike]) -> dict[str, PathLike]:
    """Models by file name without suffix; by more of the path where two have the same."""
    listed = [Path(p) for p in paths]
    found: dict[str, PathLike] = {}
    for p in listed:
        name = p.name.removesuffix(".gguf").removesuffix(".safetensors") or p.resolve().name
        same = sum(q.name == p.name for q in listed) > 1
        name = f"{p.resolve().parent.name}/{name}" if same else name
        if name in found:
            raise RecipeError(f"{p}: a model named {name} is there already; name each model once")
        found[name] = p
    if not found:
        raise RecipeError("no model to evaluate: name at least one")
    return found


def _metrics(metrics: Iterable[str]) -> set[str]:
    wanted = set(metrics)
    for m in wanted - set(METRICS):
        raise RecipeError(f"unknown metric {m}{nearest(m, METRICS)}; known: {', '.join(METRICS)}")
    return wanted or {"ppl"}


class _Party:
    """The reference, the candidates and the tokenizer, opened and checked against each other."""

    def __init__(self, stack: ExitStack, named: Mapping[str, PathLike], reference: PathLike, device: str, floor: bool) -> None:
        import torch

        from .runtime import Model

        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise RecipeError(f"--device {device}: " + ("no CUDA device here" if device.startswith("cuda") else "cpu or cuda"))
        source = stack.enter_context(open_path(Path(reference)))
        path = Path(reference)
        name = path.resolve().name.removesuffix(".gguf")
        self.reference = Model(source, name, device=device)
        self.tokenizer = Tokenizer(path, source.config, gguf_metadata=source.format == "gguf")
        self.ceiling = Model(source, f"{name} in bf16", device=device, dtype=torch.bfloat16)
        self.floor = floor
        self.candidates = []
        for name, p in named.items():
            candidate = Model(stack.enter_context(open_path(Path(p))), name, device=device)
            self._check_vocabulary(candidate)
            self.candidates.append(candidate)

    def running(self, wanted: set[str]) -> list[Model]:
        """The models that see the text."""
        return [self.reference, *self.candidates, *([self.ceiling] if self.floor else [])]

    def check_text(self, corpus: Corpus) -> None:
        """Raise CalibrationError if a model was calibrated with the text."""
        found = None
        for model in (self.reference, *self.candidates):
            config = model.source.config
            if overlap.remembered(config):
                found = overlap.runs(corpus.text) if found is None else found
                overlap.check(model.name, config, corpus.name, corpus.text, found)
            elif corpus.name in re.split(r"[\\/, ]+", str(config.get("quantize.imatrix.dataset", ""))):
                logger.warning(
                    "%s: its importance comes from a text that is also named %s; if it is this one, the model looks better "
                    "than it is",
                    model.name,
                    corpus.name,
                )

    def _check_vocabulary(self, candidate: Model) -> None:
        mine, ref = int(candidate.config["vocab_size"]), int(self.reference.config["vocab_size"])
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


class _Run:
    """One pass of all models over all windows, with what was seen on the way."""

    def __init__(self, models: list[Model], windows: Windows, tell: Progress) -> None:
        self.models, self.windows, self.tell = models, windows, tell
        self.score = stats.Score([m.name for m in models])
        self.hidden_error: list[list[float]] = [[] for _ in models]
        self.tensors: list[list[TensorError]] = [[] for _ in models]
        self.block_bytes = self.hidden_bytes = 0
        self._inputs: dict[str, F32] = {}
        self._hooks: list[Any] = []
        self._roles = models[0].roles()

    def go(self) -> None:
        """Advance, then score."""
        import torch

        from .runtime import advance

        ids = torch.from_numpy(self.windows.ids)
        hidden = advance(
            self.models, ids, before=self._before, after=self._after, progress=lambda done, of: self.tell("blocks", done, of)
        )
        self.hidden_bytes = sum(h.nbytes for h in hidden)
        with torch.inference_mode():
            self._apply_heads(hidden)

    # ---- around each block

    def _before(self, i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        """Have the reference's linears note the mean square of their inputs."""
        import torch

        self.block_bytes = max(self.block_bytes, sum(p.nbytes for b in blocks for p in b.parameters()))
        self._inputs.clear()
        seen: dict[str, int] = defaultdict(int)

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                if seen[name] < _OBSERVED:
                    seen[name] += len(x)
                    square = (x.float() ** 2).sum(0).cpu().numpy()
                    self._inputs[name] = self._inputs.get(name, np.float32(0)) + square

            return hook

        self._hooks = [
            m.register_forward_pre_hook(note(k)) for k, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)
        ]

    def _after(self, i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        """Compare hidden states and weights with the reference's."""
        for hook in self._hooks:
            hook.remove()
        rows = max(1, _OBSERVED // hidden[0].shape[1])
        ref = hidden[0][:rows]
        norm = float(ref.norm())
        stem = f"{self.models[0].prefix}.{i}"
        for k in range(1, len(self.models)):
            if hidden[k].shape == hidden[0].shape:
                self.hidden_error[k].append(float((hidden[k][:rows].float() - ref).norm()) / norm)
            if self.models[k].source is not self.models[0].source:
                self._compare_weights(k, stem, blocks[0], blocks[k], i)

    def _compare_weights(self, k: int, stem: str, ours: nn.Module, theirs: nn.Module, layer: int | None) -> None:
        mine = dict(theirs.named_parameters())
        for name, w in ours.named_parameters():
            full = f"{stem}.{name}" if stem else name
            other = mine.get(name)
            if other is None or w.device.type == "meta" or other.device.type == "meta":
                continue
            square = self._inputs.get(name.removesuffix(".weight")) if layer is not None else None
            rel, weighted = _errors(w, other, square)
            parts = self.models[k].parts(full)
            if not parts:
                continue
            codec, shape = self.models[k].stored(parts[0])
            role = self._roles.get(full, name.removesuffix(".weight"))
            bits = 8 * codec.nbytes(shape) / max(1, int(np.prod(shape)))
            self.tensors[k].append(TensorError(full, role, layer, codec.name, list(w.shape), bits, rel, weighted))

    # ---- the head

    def _apply_heads(self, hidden: Sequence[torch.Tensor]) -> None:
        import torch

        ids, scored = self.windows.ids, self.windows.scored
        vocabulary = int(self.models[0].config["vocab_size"])
        rows = max(1, _LOGITS_AT_ONCE // vocabulary)
        cached = max(16, _LOGITS_IN_CACHE // vocabulary)
        device = hidden[0].device
        with ExitStack() as stack:
            heads = [stack.enter_context(m.head()) for m in self.models]
            for k in range(1, len(self.models)):
                if self.models[k].source is not self.models[0].source:
                    self._compare_weights(k, "", self.models[0].module, self.models[k].module, None)
            places = np.flatnonzero(scored.any(0))  # the same positions in nearly every window
            step, width = max(1, rows // len(places)), min(rows, len(places))
            for w in range(0, len(ids), step):
                for p in range(0, len(places), width):
                    some = places[p : p + width]
                    keep = scored[w : w + step, some]
                    if not keep.any():
                        continue
                    targets = torch.from_numpy(ids[w : w + step, some + 1][keep])
                    at = torch.from_numpy(some).to(device)
                    mask = torch.from_numpy(keep).to(device)
                    logits = [
                        head(h[w : w + step], at)[mask] if not keep.all() else head(h[w : w + step], at).flatten(0, 1)
                        for head, h in zip(heads, hidden, strict=True)
                    ]
                    for r in range(0, len(targets), cached):
                        self.score.add([z[r : r + cached] for z in logits], targets[r : r + cached])
                self.tell("tokens", min(w + step, len(ids)), len(ids))

    def bootstrap(self) -> tuple[stats.Bootstrap, str]:
        """Clusters in the order of the scored tokens, and what they are."""
        clusters, what = self.windows.clusters()
        return stats.Bootstrap(clusters), what


def _errors(w: torch.Tensor, other: torch.Tensor, square: F32 | None) -> tuple[float | None, float | None]:
    """Relative RMSE, and the same with columns weighted by the mean square of their inputs."""
    import torch

    if w.shape != other.shape:
        return None, None
    d, w = (other.float() - w.float()).reshape(-1, w.shape[-1]), w.float().reshape(-1, w.shape[-1])
    per, whole = (d**2).sum(0).double(), (w**2).sum(0).double()
    rel = float((per.sum() / whole.sum()).sqrt()) if float(whole.sum()) else None
    if square is None or not float(whole.sum()):
        return rel, None
    q = torch.from_numpy(square).to(per)
    return rel, float(((per * q).sum() / (whole * q).sum()).sqrt())


# ---- results


def _result(m: Model, i: int, run: _Run, wanted: set[str]) -> ModelResult:
    source = m.source
    names = m.outer_names()
    bits = {k: 8 * s.nbytes for k, s in source.weights.items()}
    count = {k: int(np.prod(s.shape, dtype=object)) for k, s in source.weights.items()}
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
    tokens, ref = run.score.tokens(i), run.score.tokens(0)
    found = stats.perplexity(tokens)
    if i and "kld" in wanted:
        found |= stats.divergence(tokens, ref)
    for k, v in found.items():
        setattr(r, k, v)
    boot, _ = run.bootstrap()
    if i:
        r.intervals = stats.intervals(tokens, ref, boot)
        if "kld" not in wanted:
            r.intervals = {"ppl": r.intervals["ppl"], "ln_ppl_ratio": r.intervals["ln_ppl_ratio"]}
            r.ln_ppl_ratio = r.intervals["ln_ppl_ratio"]["estimate"]
        if "flips" in wanted:
            r.flips = stats.flips(tokens.top, ref.top, run.score.targets)
    else:
        r.intervals = {"ppl": stats.intervals(tokens, ref, boot)["ppl"]}
    return r


def _differences(run: _Run, n: int) -> dict[str, Any]:
    boot, what = run.bootstrap()
    ref = run.score.tokens(0)
    tokens = {i: run.score.tokens(i) for i in range(1, n)}
    names = [m.name for m in run.models]
    return {
        "level": boot.level,
        "clusters": boot.n,
        "cluster": what,
        "resamples": boot.resamples,
        "seed": boot.seed,
        "method": f"{boot.level:.0%} paired bootstrap of {boot.n} {what}, {boot.resamples} resamples, expanded percentiles",
        "differences": [
            {"a": names[a], "b": names[b], **stats.difference(tokens[a], tokens[b], ref, boot)}
            for a in tokens
            for b in tokens
            if a < b
        ],
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


def _about_run(run: _Run, windows: Windows, device: str, loss: float, seconds: float) -> dict[str, Any]:
    from . import __version__

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
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
        "memory": f"peak {peak / 1e9:.2f} GB of the process; at a time one block of each model ({run.block_bytes / 1e6:.1f} MB) "
        f"and their hidden states ({run.hidden_bytes / 1e6:.1f} MB)",
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
