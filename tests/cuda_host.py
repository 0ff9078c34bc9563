"""The CUDA kernels' decode and dot, compiled for the host by the C++ compiler: the same table as
_cuda.so, called with torch tensors on the CPU. Built once per state of the sources, under build/.

With CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined", LD_PRELOAD="$(g++ -print-file-name=libasan.so)"
and ASAN_OPTIONS=detect_leaks=0, the tests find what a kernel reads or writes beyond its arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from quantforge import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cuda"
CXX = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(shlex.split(c)[0])), None)


def build(name: str, command: list[str], log: bool = False) -> Path:
    """build/tests/…-<name>: what `command` -o writes (log: what it says), made again when a kernel source changes."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*SOURCES.iterdir(), *(ROOT / "kernels").glob("*.h"), *(ROOT / "kernels" / "cpu").iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    target = ROOT / "build" / "tests" / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(fresh)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if log:
            fresh.write_text(done.stdout + done.stderr)
        os.replace(fresh, target)
        for old in target.parent.glob(f"*-{name}"):
            if old != target:
                old.unlink(missing_ok=True)
    return target


@cache
def kernels() -> dict[tuple[str, str], ctypes._FuncPointer]:
    """(kind, op) -> function."""
    assert CXX, "no C++ compiler"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    path = build("host.so", [*shlex.split(CXX), *flags, "kernels/cuda/host.cpp"])
    return native._kernels(native._open(path).qf_open(None).contents)


def call(kind: str, op: str, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> int:
    """One kernel on dense CPU tensors -> its return code."""
    described = native._describe_tensors(inputs), native._describe_tensors([out])
    return kernels()[kind, op](described[0], len(inputs), described[1], 1, None)
