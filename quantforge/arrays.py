"""Array types, the dtypes that NumPy lacks (bf16, fp8), and views between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
F32: TypeAlias = NDArray[np.float32]
Parts: TypeAlias = dict[str, Array]

BF16 = np.dtype(ml_dtypes.bfloat16)
F8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
F8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)
F8_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

# safetensors' dtype names
SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F8_E4M3": F8_E4M3,
    "F8_E5M2": F8_E5M2,
    "F8_E8M0": F8_E8M0,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The dtype and shape of an array that need not exist yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes, computed in Python integers (no overflow)."""
        n = self.dtype.itemsize
        for dim in self.shape:
            n *= dim
        return n


_EXPONENTS = {
    np.dtype(np.float16): ("<u2", 0x7C00),
    BF16: ("<u2", 0x7F80),
    F8_E4M3: ("u1", 0x7F),
    F8_E5M2: ("u1", 0x7C),
    F8_E8M0: ("u1", 0xFF),
}
"""Of floats that NumPy is slow with: as unsigned integers, and the bits that are all set in what is not finite."""


def is_finite(a: Array) -> NDArray[np.bool_]:
    """np.isfinite, for any dtype that weights or scales are stored in; True of integers."""
    if a.dtype in _EXPONENTS:
        kind, bits = _EXPONENTS[a.dtype]
        return np.asarray((a.view(kind) & bits) != bits)
    return np.isfinite(a) if a.dtype.kind == "f" else np.ones(a.shape, bool)


def empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """np.empty at a multiple of 64 bytes, where the kernels' full-width stores straddle no cache line."""
    n = TensorInfo(np.dtype(dtype), shape).nbytes
    room = np.empty(n + 64, np.uint8)
    at = -room.ctypes.data % 64
    return np.ndarray(shape, dtype, room, at)


def to_numpy(x: Any) -> Array:
    """`x` as a NumPy array without copying where possible; takes NumPy arrays and torch tensors.

    torch bfloat16 comes back as ml_dtypes.bfloat16. torch itself is not imported.
    """
    if isinstance(x, np.ndarray):
        return x
    if type(x).__module__.partition(".")[0] == "torch":
        t = x.detach().cpu()
        if str(t.dtype) == "torch.bfloat16":
            import torch  # already loaded: x is one of its tensors

            return np.asarray(t.contiguous().view(torch.int16).numpy().view(BF16))
        return np.asarray(t.numpy())
    return np.asarray(x)


def shortest(value: Any) -> float:
    """The shortest number that is this f32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
