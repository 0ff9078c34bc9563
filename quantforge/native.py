"""The one binding to the compiled kernels (kernels/quantforge.h), through ctypes.

ctypes releases the GIL during a call, so threads over rows run in parallel. The environment
variable QUANTFORGE_ISA forces an instruction set (scalar, avx2, avx512, neon).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import BF16, F32, Array, empty
from .errors import NativeError

ABI = 3
OK, ESHAPE, EDTYPE, ENONFINITE, ENOMEM, EDEVICE, ELARGE = range(7)
_REASONS = {
    ESHAPE: "the arrays' shapes do not fit the kernel",
    EDTYPE: "the arrays' dtypes do not fit the kernel",
    ENONFINITE: "NaN or infinity in the input",
    ENOMEM: "out of memory",
    EDEVICE: "the device reported an error",
    ELARGE: "weights so large that what was stored may have overflowed",
}
_DTYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f2", BF16, "f4", "f8"]
_DTYPE_CODES = {np.dtype(d): i for i, d in enumerate(_DTYPES)}


_DESCRIPTOR = struct.Struct("@P4qii")  # qf_array
_PADDING = [(0,) * (4 - n) for n in range(5)]


# qf_fn; the descriptors go as packed bytes, several times quicker to make than ctypes structures
_Fn = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)


class _Kernel(ctypes.Structure):
    _fields_ = (("codec", ctypes.c_char_p), ("op", ctypes.c_char_p), ("fn", _Fn))


class _Table(ctypes.Structure):
    _fields_ = (("abi", ctypes.c_int32), ("n", ctypes.c_int32), ("isa", ctypes.c_char_p), ("kernels", ctypes.POINTER(_Kernel)))


_CUDA_REASONS = {
    2: "out of memory",
    35: "the driver is older than the CUDA that built the kernels; update it or build with an older toolkit",
    100: "no CUDA device",
    209: "the kernels were not built for this GPU; build again with QUANTFORGE_CUDA_ARCH set to its compute capability",
    700: "an illegal address, in this kernel or one before it; CUDA_LAUNCH_BLOCKING=1 shows where",
    900: "not while a graph is captured: run the model once before",
}
"""What some of cudaError's numbers mean here."""


class KernelError(NativeError):
    """A kernel returned an error code: `.code`, one of this module's constants; `.cuda`: CUDA's own, or 0."""

    def __init__(self, what: str, code: int) -> None:
        self.code, self.cuda = code & 255, code >> 8
        reason = _REASONS.get(self.code, f"error {self.code}")
        if self.cuda:
            reason += f": CUDA error {self.cuda}" + (f" ({known})" if (known := _CUDA_REASONS.get(self.cuda)) else "")
        super().__init__(f"kernel {what}: {reason}")


def _open(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.qf_open.restype = ctypes.POINTER(_Table)
    lib.qf_open.argtypes = [ctypes.c_char_p]
    lib.qf_isa.restype = ctypes.c_char_p
    lib.qf_isa.argtypes = [ctypes.c_int]
    return lib


@cache
def _library() -> ctypes.CDLL:
    try:
        return _open(Path(__file__).with_name("_cpu.so"))
    except OSError as e:
        raise NativeError(
            f"cannot load quantforge's compiled kernels ({e}); reinstall with a C++17 compiler present "
            "(Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install), in a checkout: make build"
        ) from None


def _kernels(table: _Table) -> dict[tuple[str, str], ctypes._FuncPointer]:
    """(codec, op) -> function. Raises NativeError for a library of another ABI."""
    if table.abi != ABI:
        raise NativeError(f"the compiled kernels are of ABI {table.abi}, this quantforge wants {ABI}; rebuild (make build)")
    return {(table.kernels[i].codec.decode(), table.kernels[i].op.decode()): table.kernels[i].fn for i in range(table.n)}


def isas() -> list[str]:
    """The instruction sets that this build has and this CPU can run, best first."""
    names: list[str] = []
    while (isa := _library().qf_isa(len(names))) is not None:
        names.append(isa.decode())
    return names


@cache
def _table(isa: str | None) -> tuple[str, dict[tuple[str, str], ctypes._FuncPointer]]:
    table = _library().qf_open(isa.encode() if isa else None)
    if not table:
        raise NativeError(
            f"QUANTFORGE_ISA={isa}: not an instruction set of this build and CPU; choose one of {', '.join(isas())}"
        )
    return table.contents.isa.decode(), _kernels(table.contents)


def isa() -> str:
    """The instruction set in use."""
    return _table(os.environ.get("QUANTFORGE_ISA") or None)[0]


def has(codec: str, op: str) -> bool:
    """True if a compiled kernel for that codec and operation exists."""
    return (codec, op) in _table(os.environ.get("QUANTFORGE_ISA") or None)[1]


def _describe(arrays: Sequence[Array]) -> bytes:
    packed = []
    for a in arrays:
        assert a.flags.c_contiguous and a.ndim <= 4
        packed.append(_DESCRIPTOR.pack(a.ctypes.data, *a.shape, *_PADDING[a.ndim], a.ndim, _DTYPE_CODES[a.dtype]))
    return b"".join(packed)


def _kernel(codec: str, op: str) -> ctypes._FuncPointer:
    name, kernels = _table(os.environ.get("QUANTFORGE_ISA") or None)
    try:
        return kernels[codec, op]
    except KeyError:
        raise NativeError(f"no compiled {op} kernel for {codec} in the {name} unit") from None


def call(codec: str, op: str, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Run one kernel on dense arrays. Raises KernelError, or NativeError if there is none."""
    code = _kernel(codec, op)(_describe(inputs), len(inputs), _describe(outputs), len(outputs), None)
    if code != OK:
        raise KernelError(f"{codec} {op}", code)


def call_rows(
    codec: str, op: str, rowwise: Sequence[Array], shared: Sequence[Array], outputs: Sequence[Array], threads: int = 1
) -> None:
    """Run a kernel over row ranges in `threads` threads.

    rowwise and outputs: arrays [rows, ...] that are cut along axis 0; shared: passed whole, after
    the row-wise inputs. Results do not depend on `threads`.
    """
    rows = outputs[0].shape[0]
    n = max(1, min(threads, rows))
    if n == 1:
        call(codec, op, [*rowwise, *shared], outputs)
        return
    cuts = [rows * i // n for i in range(n + 1)]

    def part(i: int) -> None:
        a, b = cuts[i], cuts[i + 1]
        call(codec, op, [*(x[a:b] for x in rowwise), *shared], [y[a:b] for y in outputs])

    with ThreadPoolExecutor(n) as pool:
        for done in [pool.submit(part, i) for i in range(n)]:
            done.result()


_WORTH_A_THREAD = 1 << 18
"""Multiplications below which another thread costs more than it saves."""


def matmul(codec: str, op: str, x: Array, parts: Sequence[Array], out: F32, threads: int = 1) -> None:
    """out[m, rows] = x wᵀ, in `threads` threads over the rows of w. x: f32[m, in], or as the op has it; parts: what w is
    stored in, and tables. Results do not depend on `threads`.
    """
    m, rows = out.shape
    n = max(1, min(threads, m * rows * x.shape[1] // _WORTH_A_THREAD))
    inputs = [x, np.array([0, rows], np.int64), *parts]
    if n == 1:
        call(codec, op, inputs, [out])
        return
    fn = ctypes.cast(_kernel(codec, op), ctypes.c_void_p)
    code = _library().qf_product(fn, _describe(inputs), len(inputs), _describe([out]), 1, 1, n)
    if code != OK:
        raise KernelError(f"{codec} {op}", code)


def product(codec: str, x: F32, parts: Sequence[Array], rows: int, threads: int = 1, int8: bool = False) -> F32:
    """x wᵀ for a matrix w of `rows` rows: f32[m, in] -> f32[m, rows]. int8: x is rounded to 8 bits, where there is a kernel
    for that. See `matmul`.
    """
    out = empty((len(x), rows), np.float32)
    if int8 and has(codec, "matmul_int8"):
        matmul(codec, "matmul_int8", round_activations(x, threads), parts, out, threads)
    else:
        matmul(codec, "matmul", x, parts, out, threads)
    return out


def round_activations(x: F32, threads: int = 1) -> Array:
    """x: f32[m, in] as 8-bit integers under a scale for each 16, in the order that the op matmul_int8 wants: u8[m, bytes]."""
    out = empty((len(x), -(-x.shape[1] // 256) * 384), np.uint8)
    if x.size:
        call_rows("", "round_activations", [x], [], [out], threads if x.size > _WORTH_A_THREAD else 1)
    return out


# ---- the CUDA library


_TORCH_DTYPES = {
    "torch.uint8": 0, "torch.int8": 1, "torch.uint16": 2, "torch.int16": 3, "torch.uint32": 4, "torch.int32": 5, "torch.int64": 6,
    "torch.float16": 7, "torch.bfloat16": 8, "torch.float32": 9, "torch.float64": 10,
    "torch.float8_e4m3fn": 0, "torch.float8_e5m2": 0,  # bytes to the kernels
}  # fmt: skip


@cache
def _cuda() -> tuple[dict[tuple[str, str], ctypes._FuncPointer], str]:
    """The kernels of _cuda.so, or none and why. The library loads without a driver."""
    path = Path(__file__).with_name("_cuda.so")
    if not path.exists():
        return {}, "quantforge was built without CUDA kernels (make cuda, or QUANTFORGE_CUDA=1 pip install .)"
    try:
        return _kernels(_open(path).qf_open(None).contents), ""
    except (OSError, NativeError) as e:
        return {}, f"the CUDA kernels cannot be loaded: {e}"


def cuda_missing() -> str:
    """Why there are no CUDA kernels; empty if there are."""
    return _cuda()[1]


def cuda_has(codec: str, op: str) -> bool:
    """True if a CUDA kernel for that codec (or kernel family) and operation exists."""
    return (codec, op) in _cuda()[0]


def cuda_call(codec: str, op: str, inputs: Sequence[Any], outputs: Sequence[Any], stream: int) -> None:
    """Run one kernel on dense torch tensors of the current device, on a CUDA stream (its handle).

    Returns as soon as the kernel is launched. Raises KernelError, or NativeError if there is none.
    """
    kernels, missing = _cuda()
    fn = kernels.get((codec, op))
    if fn is None:
        raise NativeError(missing or f"no CUDA kernel {op} for {codec}")
    code = fn(_describe_tensors(inputs), len(inputs), _describe_tensors(outputs), len(outputs), stream)
    if code != OK:
        raise KernelError(f"{codec} {op} (CUDA)", code)


def _describe_tensors(tensors: Sequence[Any]) -> bytes:
    packed = []
    for t in tensors:
        assert t.is_contiguous() and t.dim() <= 4
        shape = (*t.shape, 0, 0, 0, 0)[:4]
        packed.append(_DESCRIPTOR.pack(t.data_ptr(), *shape, t.dim(), _TORCH_DTYPES[str(t.dtype)]))
    return b"".join(packed)
