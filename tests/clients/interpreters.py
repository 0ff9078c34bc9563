"""Where other libraries live: interpreters named by environment variables, as the Makefile sets them."""

from __future__ import annotations

import os
import shutil

import pytest


def python_of(backend: str) -> str:
    """The interpreter that has a library of `quantforge.backends`; skips the test where none is named."""
    variable = f"QUANTFORGE_PYTHON_{backend.upper().replace('-', '_')}"
    python = os.environ.get(variable, "")
    if not python:
        target = "test-legacy" if backend == "auto-gptq" else "test-backends"
        pytest.skip(f"{variable} names no interpreter: make {target}")
    found = shutil.which(python)
    assert found, f"{variable}={python}: there is no such interpreter"
    return os.path.abspath(found)
