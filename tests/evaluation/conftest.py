"""The shipped model in a few types, for all tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantforge as qf
from quantforge.demo import MODEL


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("ggufs")
    paths = {t: out / f"{t}.gguf" for t in ("F16", "Q4_0", "Q4_K_M")}
    for t, p in paths.items():
        qf.convert(MODEL, p, t)
    return paths
