"""A pytest plug-in: `gpu` tests in order of what they tell, and a line of JSON for each as it ends.

    QUANTFORGE_GPU_TESTS=first|rest QUANTFORGE_GPU_RESULTS=FILE python -m pytest -p benchmarks.on_gpu.order -m gpu ...

first: one case of every kernel in every test; rest: the others. FILE: {"test", "outcome", "seconds", "why"}.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

TELLING = (
    "test_linear", "test_bytes_of_a_gpu", "test_graph", "test_on_a_gpu", "test_feedback_on_a_gpu", "test_dequantize",
    "test_what_is_around_stays", "test_the_callers_stream",
)  # fmt: skip
"""Tests, the most telling first; then the others."""


def kernel(item: pytest.Item) -> str:
    """What a test's case is of: its codec, however the parameter is called."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return next((str(given[name]) for name in ("codec", "name") if name in given), "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort, and take the part that was asked for."""
    seen: Counter[tuple[str, str]] = Counter()
    ranked = []
    for i, item in enumerate(items):
        test = item.name.partition("[")[0]
        rank = seen[test, kernel(item)]
        seen[test, kernel(item)] += 1
        ranked.append((rank, TELLING.index(test) if test in TELLING else len(TELLING), i, item))
    part = os.environ.get("QUANTFORGE_GPU_TESTS", "")
    items[:] = [item for rank, *_, item in sorted(ranked) if part not in ("first", "rest") or (rank == 0) == (part == "first")]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each test that has ended; of pytest-xdist's processes only the first one writes."""
    path = os.environ.get("QUANTFORGE_GPU_RESULTS")
    over = report.when != "teardown" and not (report.when == "setup" and report.passed)
    if path and over and "PYTEST_XDIST_WORKER" not in os.environ:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            row["why"] = lines[0][1:].strip()[:300] if lines else ""
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
