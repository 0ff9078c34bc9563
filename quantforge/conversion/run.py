"""Run a conversion: source → decode → arch transform → encode → sink, a tile of rows at a time."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import device, formats, sizes
from ..arrays import F32, Parts
from ..backends import Library
from ..codecs.plain import PlainCodec
from ..errors import OutputError, RangeError
from ..formats import Sink, Source
from . import tiles
from .contents import PENDING, SOURCE_DIGEST
from .options import Calibration
from .plan import Calibrated, Plan
from .tiles import Tiles

if TYPE_CHECKING:
    from ..calibration.corpus import Ints

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    type: str
    source_type: str
    shape: tuple[int, ...]
    bytes: int
    note: str | None
    rel_rmse: float | None
    """‖w − ŵ‖ / ‖w‖, where measured."""
    weighted_rel_rmse: float | None
    """The same with every column weighted by its importance, where there is importance."""
    method: str = "rtn"
    """How its codes were chosen: the method asked for, or rtn where that was no worse."""
    output_error: float | None = None
    """Relative squared error of its outputs on held-out calibration windows."""
    rtn_output_error: float | None = None
    """The same for rtn."""
    tokens: Sequence[int] | None = None
    """Calibration tokens that reached it; of stacked experts, one by one."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did and what it cost."""

    path: str
    """Where the output is: of several files beside each other, the first."""
    recipe: str
    total_bytes: int
    bpw: float
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    threads: int
    tensors: Sequence[TensorReport]
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Ready for json.dumps; `schema` names this layout."""
        tensors = [{k: getattr(t, k) for k in TensorReport.__slots__} for t in self.tensors]
        return {
            "schema": "quantforge.convert/1",
            **{k: getattr(self, k) for k in Report.__slots__ if k not in ("tensors", "warnings")},
            "warnings": list(self.warnings),
            "tensors": [{**t, "shape": list(t["shape"])} for t in tensors],
        }


@dataclass(slots=True)
class Status:
    """Where a conversion stands; passed to the progress callback after each tile."""

    tensors: int
    total_tensors: int
    weights: int
    total_weights: int
    bytes: int
    name: str


def run(
    job: Plan,
    out: str | Path,
    *,
    threads: int | None = None,
    force: bool = False,
    measure: bool = False,
    progress: Callable[[Status], None] | None = None,
) -> Report:
    """Carry out a plan: the output appears at `out` when it is complete, or not at all.

    threads: all CPUs by default; the output does not depend on it. force: overwrite. measure: also decode what was
    written and report each tensor's error. progress: called after each tile of rows. Raises OutputError, NonFiniteError,
    BackendError.
    """
    out = Path(out)
    written = job.format.paths(out, job.header)
    if not force and (there := next((p for p in written if p.exists()), None)):
        raise OutputError(there, "exists already; --force overwrites it")
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    began, cpu = time.perf_counter(), time.process_time()
    total_bytes = job.total_bytes
    if job.header.metadata.get(SOURCE_DIGEST) == PENDING:
        metadata = {**job.header.metadata, SOURCE_DIGEST: job.source.digest()}
        job = replace(job, header=replace(job.header, metadata=metadata))
    if job.finish is not None:
        work, total_bytes = _through_library(job, out, threads, measure, progress)
    else:
        work = _held(job, out, threads, measure, progress)
        total_bytes = work.job.total_bytes
    job = work.job
    warnings = [*job.warnings, *work.warnings]
    for warning in warnings:
        log.warning("%s", warning)
    return Report(
        path=str(written[0]),
        recipe=job.recipe,
        total_bytes=total_bytes,
        bpw=job.bpw,
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        peak_rss_bytes=sizes.resident(peak=True),
        threads=threads,
        tensors=[work.report(i) for i in range(len(job.tensors))],
        warnings=warnings,
    )


def _held(job: Plan, out: Path, threads: int, measure: bool, progress: Callable[[Status], None] | None) -> _Work:
    """The work, done; where there is a fallback, once more with that for the tensors whose values their types cannot hold."""
    encoder = device.encoder(job.device, threads)
    if job.calibrated is not None:  # methods take long, and change weights: what types cannot hold is found, and named, before
        trial = _Work(job, False, None, encoder)
        trial.workers(None, threads)
        job = job.falling_back(trial.unheld) if trial.unheld else job
    while True:
        work = _Work(job, measure, progress, encoder)
        try:
            work.run(out, threads)
            return work
        except _Unheld:
            job = job.falling_back(work.unheld)


class _Unheld(Exception):
    """Some tensors' values do not fit their types."""


@dataclass(slots=True)
class _Errors:
    """Sums of squares over rows of a tensor, plain and with every column weighted by its importance."""

    error: float = 0.0
    norm: float = 0.0
    weighted_error: float = 0.0
    weighted_norm: float = 0.0
    has_importance: bool = False

    @classmethod
    def of(cls, w: F32, decoded: F32, q: F32 | None = None) -> _Errors:
        """The sums for some rows; overwrites `decoded`. q: f32[in]."""
        w, decoded = w.reshape(-1, w.shape[-1]), decoded.reshape(-1, w.shape[-1])
        delta = np.subtract(decoded, w, out=decoded)
        if q is None:
            return cls(float(np.vdot(delta, delta)), float(np.vdot(w, w)))
        columns, norms = np.einsum("ij,ij->j", delta, delta), np.einsum("ij,ij->j", w, w)
        return cls(float(columns.sum()), float(norms.sum()), float(columns @ q), float(norms @ q), True)

    def add(self, other: _Errors) -> None:
        self.error += other.error
        self.norm += other.norm
        self.weighted_error += other.weighted_error
        self.weighted_norm += other.weighted_norm
        self.has_importance |= other.has_importance

    def ratios(self) -> tuple[float, float | None]:
        """‖w − ŵ‖ / ‖w‖; the same weighted, where there is importance."""
        plain = (self.error / self.norm) ** 0.5 if self.norm else 0.0
        weighted = (self.weighted_error / self.weighted_norm) ** 0.5 if self.weighted_norm else 0.0
        return plain, weighted if self.has_importance else None


class _Work:
    """The tiles of a plan, handed out to threads in order."""

    def __init__(
        self,
        job: Plan,
        measure: bool,
        progress: Callable[[Status], None] | None,
        encoder: device.Encoder | None,
        original: Source | None = None,
    ) -> None:
        self.job, self.measure, self.progress = job, measure, progress
        self.tiles = Tiles(job, encoder)
        self.original = original
        """What errors are measured against; None: the source."""
        self.errors = [_Errors() for _ in job.tensors]
        self.tokens: dict[str, list[int]] = {}
        self.warnings: list[str] = []
        self.methods: dict[str, tuple[str, float | None, float | None]] = {}
        """Tensor -> method kept, its output error, rtn's; of stacked experts, the means."""
        self.unheld: dict[str, str] = {}
        """Tensor whose values its type cannot hold -> why, where there is a fallback."""
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._queue = self._in_order()
        self._left: dict[int, int] = {}
        self._stopped = False
        self._state = Status(0, len(job.tensors), 0, sum(prod(t.shape) for t in job.tensors), 0, "")

    def run(self, out: Path, threads: int) -> None:
        """Do all of it."""
        with self.job.format.create(out, self.job.header) as sink:
            if self.job.calibrated is not None:
                self.calibrated(self.job.calibrated, sink)
            self.workers(sink, threads)
            if self.unheld:
                raise _Unheld
            sink.commit()

    def workers(self, sink: Sink | None, threads: int) -> None:
        """Do the tiles that are left; sink None: only to see whether types hold the values."""
        with ThreadPoolExecutor(threads, "quantforge") as pool:
            try:
                for worker in [pool.submit(self.drain, sink) for _ in range(threads)]:
                    worker.result()
            finally:
                self.stop()

    def adopt(self, out: Path, marks: Mapping[str, Any]) -> None:
        """Make the source itself, a library's checkpoint, the output; only config.json says a little more."""
        source = self.job.source
        for i, t in enumerate(self.job.tensors) if self.measure else ():
            assert self.original is not None
            w = tiles.original(self.original, t, 0, prod(t.shape[:-1]))
            self.errors[i].add(_Errors.of(w.reshape(-1, t.shape[-1]), source.read(t.name).decode()))
        config = source.path / "config.json"
        config.write_text(json.dumps({**source.config, **marks}, indent=2) + "\n")
        formats.adopt(source.path, out)

    def _in_order(self) -> Iterator[tuple[int, int, int]]:
        """(tensor, first row, last row) of every tile that is still to do, in file order."""
        for i, t in enumerate(self.job.tensors):
            if t.name not in self._done:
                cuts = list(self.tiles.cut(t))
                self._left[i] = len(cuts)
                yield from ((i, a, b) for a, b in cuts)

    def report(self, i: int) -> TensorReport:
        """What became of tensor i."""
        t = self.job.tensors[i]
        plain, weighted = self.errors[i].ratios() if self.measure else (None, None)
        kept, mine, rtn = self.methods.get(t.name, ("rtn", None, None))
        shape = tuple(t.shape)
        seen = self.tokens.get(t.name)
        stored = t.source_codec.name
        return TensorReport(t.name, t.codec.name, stored, shape, t.nbytes, t.note, plain, weighted, kept, mine, rtn, seen)

    def calibrated(self, how: Calibrated, sink: Sink) -> None:
        """Do the tensors of the model's blocks, one block after the other; the rest stays for the tiles."""
        from .blockwise import quantize_blocks
        from .moments import EXPERT_TOKENS
        from .outputs import Outcome

        at = {t.name: i for i, t in enumerate(self.job.tensors)}
        by_tensor: dict[str, list[Outcome]] = {}

        def write(o: Outcome) -> None:
            t = o.output.tensor
            sink.write(t.name, o.parts, o.output.row)
            if self.measure:
                self.errors[at[t.name]].add(_Errors.of(o.weights, t.codec.decode(o.parts, o.weights.shape)))
            by_tensor.setdefault(t.name, []).append(o)
            self._done.add(t.name)
            self._tell(t.name, o.weights.size, o.parts, done=len(by_tensor[t.name]) == max(1, len(t.weight.sources)))

        quantize_blocks(
            self.job.source, self.job.tensors, _windows(self.job.source, how.calibration), how.method, write, device=how.device
        )
        few: list[tuple[int, str]] = []
        for name, outcomes in by_tensor.items():
            kinds = sorted({o.method for o in outcomes})
            mine = [o.output_error for o in outcomes if o.output_error is not None]
            rtn = [o.rtn_error for o in outcomes if o.rtn_error is not None]
            self.tokens[name] = [o.tokens for o in sorted(outcomes, key=lambda o: o.output.row) if o.tokens is not None]
            self.methods[name] = (", ".join(kinds), sum(mine) / len(mine) if mine else None, sum(rtn) / len(rtn) if rtn else None)
            few += [(o.tokens, name) for o in outcomes if o.expert and o.tokens is not None and o.tokens < EXPERT_TOKENS]
        if few:
            tokens, least = min(few)
            self.warnings.append(
                f"{len(few)} experts' matrices saw fewer than {EXPERT_TOKENS} calibration tokens ({least}: {tokens}); "
                "the mean of all experts stands in for the missing ones: calibrate with more text (--calibration-chunks)"
            )

    def _tell(self, name: str, weights: int, parts: Parts, done: bool) -> None:
        """Say that rows of a tensor have been written; done: they were its last."""
        s = self._state
        s.tensors += done
        s.weights += weights
        s.bytes += sum(p.nbytes for p in parts.values())
        s.name = name
        if self.progress is not None:
            self.progress(s)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def drain(self, sink: Sink | None) -> None:
        """Do tiles until there are none left, or another thread failed."""
        while True:
            with self._lock:
                tile = None if self._stopped else next(self._queue, None)
            if tile is None:
                return
            try:
                self._do(*tile, sink)
            except RangeError as e:
                name, fallback = self.job.tensors[tile[0]].name, self.job.fallback
                if fallback is None or self.job.tensors[tile[0]].codec is fallback:
                    self.stop()
                    raise
                self.unheld[name] = e.reason
            except BaseException:
                self.stop()
                raise

    def _do(self, i: int, a: int, b: int, sink: Sink | None) -> None:
        t = self.job.tensors[i]
        if t.name in self.unheld:
            return
        tile = self.tiles.make(t, a, b)
        parts = tile.parts
        if sink is None:
            return
        sink.write(t.name, parts, a)
        errors = w = None
        if self.measure:
            w = tile.weights if self.original is None else tiles.original(self.original, t, a, b)
        if w is not None:
            q = tile.importance
            errors = _Errors.of(w, t.codec.decode(parts, w.shape), q if q is not None and q.ndim == 1 else None)
        with self._lock:
            if errors is not None:
                self.errors[i].add(errors)
            self._left[i] -= 1
            done = self._left[i] == 0
            self._tell(t.name, (b - a) * t.shape[-1], parts, done)
        if done:
            for name in t.weight.sources:
                self.job.source.release(name)


def _windows(source: Source, how: Calibration) -> Ints:
    """Calibration tokens: int[windows, ctx]."""
    from ..calibration.gather import context, read_windows
    from ..runtime import Model

    tokenizer = source.tokenizer()
    ctx = context(how.ctx, Model(source, source.path.name), "--calibration-ctx")
    return read_windows(how.text, tokenizer, ctx, how.chunks, spread=True)


def _through_library(
    job: Plan, out: Path, threads: int, measure: bool, progress: Callable[[Status], None] | None
) -> tuple[_Work, int]:
    """Let a library of `backends` quantize, and make the output from the checkpoint that it leaves."""
    how, finish = job.calibrated, job.finish
    assert how is not None and finish is not None and isinstance(how.method, Library)
    job.format.create(out, job.header).abort()  # it may take hours: what cannot be written is said before
    ids = _windows(job.source, how.calibration)
    with TemporaryDirectory(prefix=".quantforge-", suffix=".tmp", dir=out.absolute().parent) as directory:
        made = how.method.run(job.source.path, Path(directory), ids, device=how.device, threads=threads)
        rest = finish(made.path)
        try:
            name = f"{how.method.method} ({how.method.backend} {made.version})"
            marks = {k: v for k, v in job.header.metadata.items() if k.startswith("quantforge.")} | {"quantforge.method": name}
            rest = replace(rest, recipe=job.recipe, header=replace(rest.header, metadata={**rest.header.metadata, **marks}))
            # awq moves scales between layers: its weights are not near the original's
            size = rest.total_bytes
            if job.adopt:  # the types and bytes of the files as they are
                rest = replace(rest, tensors=[replace(t, codec=t.source_codec, note=None) for t in rest.tensors])
                size = sum(f.stat().st_size for f in made.path.glob("*.safetensors"))
            work = _Work(rest, measure and how.method.method != "awq", progress, None, job.source)
            work.methods = {t.name: (name, None, None) for t in rest.tensors if not isinstance(t.source_codec, PlainCodec)}
            if job.adopt:
                work.adopt(out, marks)
            else:
                work.run(out, threads)
            return work, size
        finally:
            rest.source.close()
