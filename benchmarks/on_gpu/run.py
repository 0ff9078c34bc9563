"""What a run found, and its file. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One time."""

    name: str
    """A codec's name, or a library's."""
    n: int
    k: int
    m: int
    us: float
    nbytes: int
    """Of the weights."""
    error: float
    """‖y − exact‖ / ‖exact‖, exact in float64 from the stored weights and bf16 activations."""
    way: str = ""
    """Ours: which kernels; another library's: what it does to activations."""
    config: str = ""

    @property
    def gbs(self) -> float:
        return self.nbytes / self.us / 1e3


@dataclass
class Limits:
    """Of this machine, in this run."""

    copy_gbs: float
    """A device-to-device copy, bytes read and written."""
    gemm_tflops: float
    """bf16, 8192³, random numbers."""
    launch_us: float
    """The least that one kernel of a replayed graph costs."""
    issue_tops: float
    """Lane-instructions that the multiprocessors can issue, in 10¹² a second."""


@dataclass
class Run:
    """Everything that one run found; written as it grows."""

    machine: dict[str, Any] = field(default_factory=dict)
    limits: Limits | None = None
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """What was not measured -> why."""
    encode: list[dict[str, Any]] = field(default_factory=list)
    model: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0
    finished: bool = False

    def save(self, path: Path | None) -> None:
        """Whole or not at all: a run may be stopped at any time."""
        if path:
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(self)))
            fresh.replace(path)


def load(path: Path) -> Run:
    """A run's file, also one of an unfinished run."""
    found = json.loads(path.read_text())
    known = {f.name for f in fields(Run)}
    run = Run(**{k: v for k, v in found.items() if k in known})
    run.rows = [Row(**r) for r in found["rows"]]
    run.limits = Limits(**found["limits"]) if found.get("limits") else None
    return run


def merged(runs: list[Run]) -> Run:
    """Several runs on one machine as one: the last one's limits; the latest of times of one thing."""
    whole = Run(machine=runs[-1].machine, finished=all(r.finished for r in runs))
    rows: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        whole.limits = run.limits or whole.limits
        rows |= {(r.name, r.n, r.k, r.m, r.way, r.config): r for r in run.rows}
        whole.missing |= run.missing
        whole.encode += run.encode
        whole.model += run.model
        whole.seconds += run.seconds
    whole.rows = list(rows.values())
    return whole
