"""Plain arrays: floats (F32, F16, BF16, F64, fp8) and the integers that GGUF files may hold."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from .. import native
from ..arrays import BF16, F8_E4M3, F8_E5M2, F8_E8M0, F32, Array, Parts, TensorInfo, empty, is_finite
from ..errors import RangeError
from .base import Codec, check_parts, check_weights, get, raise_non_finite, register


class PlainCodec(Codec):
    """One number per weight: part `data`, an array of `dtype` in the tensor's own shape."""

    row_local = True

    def __init__(self, name: str, dtype: np.dtype[Any]) -> None:
        self.name = name
        self.dtype = dtype
        kind = getattr(gguf.GGMLQuantizationType, name, None)
        self.ggml_type = None if kind is None else int(kind)
        self.ggml_bytes = name in ("F32", "F16", "BF16")
        self.encodes = dtype != F8_E8M0  # powers of two alone: scales

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """One part, `data`: dtype[shape]."""
        return {"data": TensorInfo(self.dtype, shape)}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Round to nearest even. Importance does not matter here."""
        w = check_weights(w, self)
        if native.has(self.name, "encode"):
            out = empty(w.shape, self.dtype)
            try:
                native.call_rows(self.name, "encode", [_rows(w)], [], [_bytes(out)], threads)
            except native.KernelError as e:
                if e.code != native.ELARGE:
                    raise
                raise_non_finite(w, self.name)
                self._check_range(w, out)
            return {"data": out}
        raise_non_finite(w, self.name)
        with np.errstate(over="ignore", invalid="ignore"):
            out = w.astype(self.dtype)
        self._check_range(w, out)
        return {"data": out}

    def _check_range(self, w: F32, out: Array) -> None:
        """Raise RangeError for a weight that became infinite, NaN or another number."""
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        bad = ~is_finite(out) if limits is None else (np.trunc(w) < limits.min) | (np.trunc(w) > limits.max)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), w.shape))
            largest = limits.max if limits else float(ml_dtypes.finfo(self.dtype).max)  # type: ignore[no-untyped-call]
            raise RangeError(self.name, f"{self.name} holds magnitudes up to {largest:g}", index, float(w[index]))

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """Exact widening to f32 (F64 and 64-bit integers round)."""
        (data,) = check_parts(parts, shape, self)
        if native.has(self.name, "decode"):
            w = empty(shape, np.float32)
            native.call_rows(self.name, "decode", [_bytes(data)], [], [_rows(w)], threads)
            return w
        return data.astype(np.float32)

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`."""
        (data,) = check_parts(parts, shape, self)
        if not native.has(self.name, "matmul"):
            return super().matmul(x, parts, shape, threads=threads, activations=activations)
        sources: list[Array] = [data.view(np.uint8)]
        if self.dtype.itemsize == 1:  # their kernels are those of scaled ones
            sources += [np.ones(1, np.float32), np.array([shape[1], 0, 0], np.int64)]
        return native.product(self.name, x, sources, shape[0], threads)


def _rows(w: Array) -> Array:
    return w.reshape(-1, w.shape[-1]) if w.ndim and w.size else w.reshape(w.size, 1)


def _bytes(a: Array) -> Array:
    return _rows(a).view(np.uint8)


for _name, _dtype in {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "F64": np.dtype(np.float64),
    "F8_E4M3": F8_E4M3,
    "F8_E5M2": F8_E5M2,
    "F8_E8M0": F8_E8M0,
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}.items():
    register(PlainCodec(_name, _dtype))


def as_floats(codec: Codec) -> Codec:
    """What a tensor of that codec is kept as where it is not quantized."""
    return codec if isinstance(codec, PlainCodec) else get("BF16")


def prevailing(tensors: Iterable[tuple[Codec, tuple[int, ...]]]) -> str:
    """What most weights of float matrices are, as codecs' names call it: "bf16" (also where there are none), "f16" or "f32"."""
    sizes = {"BF16": 0, "F16": 0, "F32": 0}
    for codec, shape in tensors:
        if codec.name in sizes and len(shape) > 1:
            sizes[codec.name] += prod(shape)
    return max(sizes, key=lambda k: sizes[k]).lower()
