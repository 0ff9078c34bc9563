"""What every back end owes, whichever it is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge as qf
from quantforge import backends, layouts
from quantforge.backends import worker
from quantforge.errors import UnsupportedError

LOAD = """
import runpy, sys
sys.argv = [sys.argv[1]]
seen = runpy.run_path(sys.argv[0])
import types
module = types.ModuleType(seen["__name__"]); module.__dict__.update(seen); sys.modules[seen["__name__"]] = module
print(seen["load"](FILE).name)
"""


@pytest.mark.parametrize("name", backends.names())
def test_a_python_without_quantforge_reads_it(name: str) -> None:
    file = inspect.getfile(qf.Library(name).known.quantize)
    code = LOAD.replace("FILE", repr(file))
    command = [sys.executable, "-I", "-S", "-c", code, str(Path(worker.__file__))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (name, "")


@pytest.mark.parametrize("name", backends.names())
def test_it_writes_in_layouts_that_there_are(name: str) -> None:
    known = qf.Library(name).known
    for method, written_in in known.methods.items():
        assert written_in and set(written_in) <= set(layouts.names())
        assert qf.Library(name.upper(), method=method.upper()).name == f"{method} ({name})"
    for theirs, ours in known.schemes.items():
        assert theirs == theirs.upper()
        layouts.get(next(iter(known.methods.values()))[0]).choose(ours, None, None, None, "bf16")


def test_what_is_no_back_end() -> None:
    with pytest.raises(UnsupportedError, match="is no instance of"):
        backends.register("gptqmodel")
