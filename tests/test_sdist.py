"""The source archive has what it is built from; a package built from it alone converts."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(where), "sdist", "--dist-dir", str(where)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = where.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(where, filter="data")
    return next(p for p in where.iterdir() if (p / "setup.py").exists())


def test_has_everything_that_is_built_and_read(unpacked: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not tracked:
        pytest.skip("no git checkout")
    wanted = [f for f in tracked if f.startswith(("kernels/", "quantforge/", "docs/", "tests/")) or "/" not in f]
    missing = [f for f in wanted if not (unpacked / f).exists() and (ROOT / f).exists() and not f.startswith(".")]
    assert not missing


@pytest.mark.slow
def test_built_from_it_alone_converts(unpacked: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "p")]
    subprocess.run([*install, str(unpacked)], check=True, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "p")}
    code = "import quantforge as qf, quantforge.demo as d; print(qf.__file__); qf.convert(d.MODEL, 'm.gguf', 'Q4_K_M')"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(str(tmp_path))
    assert (tmp_path / "m.gguf").stat().st_size > 3_000_000
