"""Without the extra "torch": what needs it says so, all else works."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from quantforge.demo import MODEL
from quantforge.extras import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the same packages, but for those of the extra."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    here, there = Path(spec.origin).parents[1], tmp_path_factory.mktemp("site-packages")
    for entry in here.iterdir():
        if not entry.name.startswith((*PACKAGES, "__editable__")) and entry.suffix != ".pth":
            (there / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{there}"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "OUT", "--reference", "MODEL"],
        ["compare", "MODEL"],
        ["calibrate", "MODEL", "OUT.imatrix"],
        ["generate", "MODEL", "--prompt", "x"],
        ["convert", "MODEL", "OUT2.gguf", "-t", "Q4_0", "--method", "gptq"],
    ],
    ids=lambda c: " ".join(c),
)
def test_says_what_to_install(command: list[str], without: dict[str, str], tmp_path: Path) -> None:
    spelled = [c.replace("MODEL", str(MODEL)).replace("OUT", str(tmp_path / "out")) for c in command]
    if command[0] == "evaluate":
        spelled[1] = str(MODEL)
    said = run(without, "-m", "quantforge", *spelled)
    assert said.returncode == 1, said.stderr
    assert "pip install 'quantforge[torch]'" in said.stderr.splitlines()[-1]
    assert "Traceback" not in said.stderr
    assert list(tmp_path.iterdir()) == []


def test_everything_else_works(without: dict[str, str], tmp_path: Path) -> None:
    made = tmp_path / "m.gguf"
    for command in (["convert", str(MODEL), str(made), "-t", "Q4_K_M"], ["inspect", str(made), "--hash"], ["types"]):
        said = run(without, "-m", "quantforge", *command)
        assert said.returncode == 0, said.stderr
    back = run(without, "-m", "quantforge", "convert", str(made), str(tmp_path / "back"), "-t", "BF16", "--allow-requantize")
    assert back.returncode == 0, back.stderr


def test_an_api_call_is_an_import_error_too(without: dict[str, str]) -> None:
    code = (
        "import quantforge as qf\n"
        "try:\n    qf.load('nowhere')\n"
        "except ModuleNotFoundError as e:\n    assert isinstance(e, qf.MissingError) and e.name == 'torch', e\n"
        "else:\n    raise AssertionError\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('torch') is None  # who only looks is not told"
    )
    said = run(without, "-c", code)
    assert said.returncode == 0, said.stderr
