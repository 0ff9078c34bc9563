"""Encode and decode units for GPUs (kernels/cuda/encode_*.cu) against the CPU's, which are the specification.

Without a GPU the same units run on the CPU: built with the C++ compiler, CUDA's threads emulated
(kernels/cuda/emulate.h). With one, the built library does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from quantforge import codecs, native
from quantforge.codecs.base import GgmlCodec
from quantforge.codecs.iquants import KSIGNS, IQCodec
from tests.codecs.test_contract import CASES, IMPORTANCE, IN

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
UNITS = {
    "encode_k": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "encode_legacy": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4"),
    "encode_iq": ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
}
TYPES = [(unit, name) for unit, names in UNITS.items() for name in names]
CXX = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(shlex.split(c)[0])), None)


@cache
def emulated(unit: str) -> dict[tuple[str, str], ctypes._FuncPointer]:
    """The kernels of a unit of kernels/cuda, built for the CPU; kept in build/ until a source changes."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    command = [*shlex.split(CXX), "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    sources = sorted([*KERNELS.glob("*.h"), *KERNELS.glob("cpu/*"), *KERNELS.glob("cuda/e*"), *KERNELS.glob("cuda/feedback*")])
    key = hashlib.sha256(shlex.join(command).encode() + b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    library = ROOT / "build" / "emulated" / f"{unit}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        for old in set(library.parent.glob(f"{unit}-*.so")) - {library}:
            old.unlink(missing_ok=True)
        fresh = library.with_name(f"{library.name}.{os.getpid()}")
        subprocess.run([*command, str(KERNELS / "cuda" / f"{unit}.cu"), "-o", str(fresh)], check=True)
        os.replace(fresh, library)
    entries = (native._Kernel * 64).in_dll(ctypes.CDLL(str(library)), f"{unit}_kernels")
    found = {}
    for k in entries:
        if k.codec is None:
            break
        found[k.codec.decode(), k.op.decode()] = k.fn
    return found


def aligned(a: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes, as device memory is."""
    room = np.empty(a.nbytes + 64, np.uint8)
    at = -room.ctypes.data % 64
    copy = room[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def call(unit: str, name: str, op: str, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> int:
    fn = emulated(unit)[name, op]
    return int(fn(native._describe(inputs), len(inputs), native._describe(outputs), len(outputs), None))


def encode(unit: str, name: str, w: np.ndarray, q: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
    """(bytes, whether the kernel found what is not finite)."""
    codec = codecs.get(name)
    data, bad = aligned(np.full(codec.layout(w.shape)["data"].shape, 0xA5, np.uint8)), np.zeros(1, np.int32)
    inputs = [aligned(w)] if q is None else [aligned(w), aligned(q)]
    if isinstance(codec, IQCodec):
        inputs = [*inputs, *([np.empty(0, np.float32)] if q is None else []), codec.entries]
    assert call(unit, name, "encode", inputs, [data, bad]) == native.OK
    return data, bool(bad[0])


@pytest.mark.parametrize(("unit", "name"), TYPES)
@pytest.mark.usefixtures("unchecked")
def test_bytes_are_those_of_the_cpu(unit: str, name: str) -> None:
    codec = codecs.get(name)
    assert isinstance(codec, GgmlCodec)
    slow = name.startswith(("IQ1", "IQ2", "IQ3"))
    for n, (case, w) in enumerate(CASES.items()):
        kinds = {"none": None, **(IMPORTANCE if codec.takes_importance else {})}
        if slow:  # searches of millions of steps: two rows, and one of the importances
            w = w[:2]
            kinds = dict([("none", None), list(IMPORTANCE.items())[n % len(IMPORTANCE)]])
        for kind, q in kinds.items():
            data, bad = encode(unit, name, w, q)
            assert not bad
            expected = codec.encode(w, q)["data"]
            differ = np.flatnonzero(data.reshape(-1) != expected.reshape(-1))
            assert not len(differ), f"{case}, importance {kind}: {len(differ)} of {data.size} bytes, the first at {differ[:4]}"


@pytest.mark.parametrize("name", UNITS["encode_iq"])
def test_importance_of_every_weight(name: str) -> None:
    rng = np.random.default_rng(2)
    w, q = rng.normal(size=(3, IN)).astype(np.float32), np.exp(rng.normal(size=(3, IN))).astype(np.float32)
    data, _ = encode("encode_iq", name, w, q)
    np.testing.assert_array_equal(data, codecs.get(name).encode(w, q)["data"])


@pytest.mark.parametrize(("unit", "name"), TYPES)
def test_rows_that_fill_no_warp(unit: str, name: str) -> None:
    codec = codecs.get(name)
    w = np.random.default_rng(3).normal(size=(7, 3 * codec.block_size)).astype(np.float32)
    for rows in (0, 1, 2, 7):
        data, bad = encode(unit, name, w[:rows])
        assert not bad
        np.testing.assert_array_equal(data, codec.encode(w[:rows])["data"])


@pytest.mark.parametrize(("unit", "name"), TYPES)
def test_what_is_not_finite_is_reported(unit: str, name: str) -> None:
    w = np.random.default_rng(4).normal(size=(5, IN)).astype(np.float32)
    for at, value in (((0, 0), np.nan), ((4, IN - 1), np.inf), ((2, 255), -np.inf)):
        damaged = w.copy()
        damaged[at] = value
        for q in (None, IMPORTANCE["ones"])[: 1 + getattr(codecs.get(name), "takes_importance", False)]:
            assert encode(unit, name, damaged, q)[1]


@pytest.mark.parametrize(("unit", "name"), TYPES)
def test_decode_is_that_of_the_cpu(unit: str, name: str) -> None:
    codec = codecs.get(name)
    info = codec.layout((9, IN))["data"]
    data = np.random.default_rng(5).integers(0, 256, info.shape, np.uint8)
    w = np.empty((9, IN), np.float32)
    tables = [codec.entries, KSIGNS] if isinstance(codec, IQCodec) else []
    assert call(unit, name, "decode", [data, *tables], [w]) == native.OK
    np.testing.assert_array_equal(w.view(np.uint32), codec.decode({"data": data}, w.shape).view(np.uint32))


@pytest.mark.parametrize(("unit", "name"), TYPES)
def test_arrays_that_do_not_fit_are_refused(unit: str, name: str) -> None:
    codec = codecs.get(name)
    w = aligned(np.zeros((2, IN), np.float32))
    data, bad = aligned(np.zeros(codec.layout(w.shape)["data"].shape, np.uint8)), np.zeros(1, np.int32)
    tables = [np.empty(0, np.float32), codec.entries] if isinstance(codec, IQCodec) else []
    assert call(unit, name, "encode", [w, *tables], [data, bad]) == native.OK
    assert call(unit, name, "encode", [w, *tables], [data]) == native.ESHAPE
    assert call(unit, name, "encode", [w[:1], *tables], [data, bad]) == native.ESHAPE
    assert call(unit, name, "encode", [w, *tables], [data, bad.view(np.uint32)]) == native.EDTYPE
    assert call(unit, name, "encode", [w.reshape(-1)[1 : 1 + IN].reshape(1, IN), *tables], [data[:1], bad]) == native.ESHAPE
