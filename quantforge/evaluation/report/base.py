"""What an evaluation measured: plain dataclasses whose fields are the JSON schema."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ...errors import OutputError, UnsupportedError

SCHEMA = "quantforge.evaluation/1"
UNITS = {
    "bytes": "of the weight files",
    "bpw": "stored bits per weight; bpw_body leaves out embeddings and head",
    "ppl_stderr": "tokens taken as independent, as llama-perplexity does; intervals.ppl does not assume that",
    "kld_*": "nats, KL(reference || model) per token",
    "same_top": "percent",
    "dp_*": "percentage points of the probability of the token that followed",
    "flips.percent": "percent of scored tokens",
    "rel_rmse": "rms(w - reference) / rms(reference)",
    "weighted_error": "the same with columns weighted by the mean square of their inputs on the text: the layer's output error",
    "hidden_error": "relative rms error of the hidden states after each block",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """What reports say of one kind of figure."""

    key: str
    """Its name in JSON."""
    label: str
    """The head of its column."""
    unit: str
    better: Literal["lower", "higher"] | None = None


@dataclass(slots=True)
class TensorError:
    """One tensor of a candidate against the reference's."""

    name: str
    role: str
    layer: int | None
    type: str
    shape: list[int]
    bpw: float
    rel_rmse: float | None
    weighted_error: float | None


@dataclass(slots=True)
class ModelResult:
    """The figures of one model; None where a metric was not asked for."""

    name: str
    path: str
    format: str
    bytes: int
    parameters: int
    bpw: float
    bpw_body: float
    types: dict[str, int]
    """Weights stored in each type."""
    shape: dict[str, int] = field(default_factory=dict)
    """layers, hidden, vocabulary, context, kv_bytes_per_token (f16)."""
    ppl: float | None = None
    ppl_stderr: float | None = None
    ln_ppl_ratio: float | None = None
    kld_mean: float | None = None
    kld_median: float | None = None
    kld_p90: float | None = None
    kld_p95: float | None = None
    kld_p99: float | None = None
    kld_p999: float | None = None
    kld_max: float | None = None
    same_top: float | None = None
    dp_mean: float | None = None
    dp_rms: float | None = None
    flips: dict[str, float] | None = None
    similarity: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of other metrics, which have no field here; `Evaluation.figures` says what they are."""
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)
    hidden_error: list[float] = field(default_factory=list)
    tensors: list[TensorError] = field(default_factory=list)
    tasks: dict[str, Any] | None = None

    def put(self, key: str, value: Any) -> None:
        """Keep a figure: in its field where there is one."""
        if key in self.__slots__:
            setattr(self, key, value)
        else:
            self.metrics[key] = value


@dataclass(slots=True)
class Recommendation:
    """Which model to take under a memory limit, and why."""

    limit_bytes: int
    context: int
    kv_bytes: int
    best: str | None
    why: str
    needs: dict[str, int]
    """Weights and KV cache of every model, bytes."""


@dataclass(slots=True)
class Evaluation:
    """The result of `quantforge.evaluate`; `to_dict` is the JSON, `save` writes a report."""

    reference: ModelResult
    models: list[ModelResult]
    noise_floor: ModelResult | None
    """The reference computed in bf16 against itself in f32: differences below it mean nothing."""
    text: dict[str, Any]
    intervals: dict[str, Any]
    """How intervals were made, and `differences`: paired intervals of every pair of models."""
    similarity: dict[str, Any] | None
    tasks: dict[str, Any] | None
    run: dict[str, Any]
    choice: Recommendation | None = None
    figures: list[Figure] = field(default_factory=list)
    """What `ModelResult.metrics` has, in the order of the reports' columns."""
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: no NaN or infinity (None instead)."""
        fields = asdict(self)
        units = UNITS | {f"metrics.{f.key}": f.unit for f in self.figures}
        ordered = {"schema": fields.pop("schema"), "units": units, **fields}
        plain = _plain(ordered)
        assert isinstance(plain, dict)
        return plain

    def ranked(self) -> list[ModelResult]:
        """Models from the closest to the reference to the farthest, by mean KLD, else by perplexity."""

        def badness(m: ModelResult) -> float:
            return m.kld_mean if m.kld_mean is not None else m.ppl if m.ppl is not None else math.inf

        return sorted(self.models, key=badness)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a report; the suffix (.json, .md, .html) says which. Raises UnsupportedError for another."""
        save(self, path)


def save(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Render `evaluation` and write it to `path` as a whole: a reader never sees half a report."""
    path = Path(os.path.expanduser(path))
    check_path(path)
    module = importlib.import_module(f".{RENDERERS[path.suffix.lower()]}", __package__)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fresh.write_text(module.render(evaluation), encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


RENDERERS = {".json": "json_", ".md": "markdown", ".html": "html"}


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise unless a report can be written under that name: worth asking before hours of work.

    Raises UnsupportedError for another suffix, OutputError where there is no such directory.
    """
    if Path(path).suffix.lower() not in RENDERERS:
        raise UnsupportedError(f"report {os.fspath(path)}: the name must end in {', '.join(RENDERERS)}")
    if not Path(os.path.expanduser(path)).parent.is_dir():
        raise OutputError(path, "there is no such directory to write the report to; make it first")


def figure(x: float | None, sign: bool = False) -> str:
    """Three significant digits, or a dash."""
    if x is None or not math.isfinite(x):
        return "–"
    text = f"{x:{'+' if sign else ''}#.3g}".rstrip(".") if x else "0"
    return text if "e" not in text else f"{x:{'+' if sign else ''}.1e}"


def neighbours(e: Evaluation) -> list[str]:
    """One sentence for each pair of models that stand next to each other in rank."""
    pairs = {(d["a"], d["b"]): d["kld_mean"] for d in e.intervals.get("differences", []) if "kld_mean" in d}
    pairs |= {
        (b, a): {"estimate": -d["estimate"], "low": -d["high"], "high": -d["low"]}
        for (a, b), d in pairs.items()
        if (b, a) not in pairs
    }
    said = []
    ranked = e.ranked()
    for better, worse in pairwise(ranked):
        d = pairs.get((worse.name, better.name))
        if d is None:
            continue
        clear = d["low"] > 0
        verdict = "closer to the reference" if clear else "not distinguishable on this text"
        said.append(
            f"{better.name} against {worse.name}: {figure(d['estimate'])} ({figure(d['low'])} to {figure(d['high'])}), {verdict}"
        )
    return said


def method(e: Evaluation) -> list[tuple[str, str]]:
    """What a reader must know to repeat the measurement: (subject, statement)."""
    t, r = e.text, e.run
    said = [
        ("reference", f"{e.reference.path}, {e.reference.parameters:,} parameters"),
        ("text", f"{t['name']}, sha256 {t['sha256']}, {t['documents']} documents"),
        ("tokens", f"{t['tokens_scored']:,} scored in {t['windows']} windows of {t['ctx']}; {t['scoring']}; {t['bos_note']}"),
        ("intervals", e.intervals.get("method", "")),
        ("importance", r.get("imatrix", "")),
        ("KLD", "KL(reference ‖ model), float32 log-softmax of full logits"),
        ("noise floor", "the reference computed in bf16 against itself in f32")
        if e.noise_floor
        else ("noise floor", "not measured"),
        ("run", f"{r['seconds']:.1f} s, {r['tokens_per_second']:,.0f} tokens/s of every model, {r['device']}, {r['machine']}"),
        ("memory", r["memory"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in r["versions"].items())),
    ]
    return [(k, v) for k, v in said if v]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
