"""ggml itself, through ctypes: the installed xllamacpp wheel exports its quantization functions.

`available` is false, with `reason`, where the wheel is not installed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

IDS = {t.name: int(t) for t in gguf.GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
_NO_ENCODER = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return "xllamacpp is not installed (pip install xllamacpp==2026.10.11549)"
    try:
        lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
        lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    except (OSError, StopIteration, AttributeError) as e:
        return f"xllamacpp's library cannot be used as an oracle: {e}"
    return lib


reason = lib if isinstance(lib := _library(), str) else ""
available = not reason


def _lib() -> ctypes.CDLL:
    lib = _library()
    assert not isinstance(lib, str), lib
    return lib


def traits(kind: str | int) -> _Traits:
    """ggml's description of a type, by name ("Q4_K") or id."""
    return _lib().ggml_get_type_traits(IDS.get(kind, kind)).contents  # type: ignore[call-overload]


def can_encode(kind: str) -> bool:
    """True if ggml_quantize_chunk knows that type."""
    return available and kind in IDS and kind not in _NO_ENCODER


def needs_importance(kind: str | int) -> bool:
    """True if ggml refuses to encode this type without importance."""
    return bool(_lib().ggml_quantize_requires_imatrix(IDS.get(kind, kind)))  # type: ignore[call-overload]


def encode(kind: str | int, w: NDArray[np.float32], importance: Any = None) -> NDArray[np.uint8]:
    """ggml's bytes of w: f32[..., in]; importance: f32[in], or f32[experts, in] for w: f32[experts, out, in]."""
    t = traits(kind)
    w = np.ascontiguousarray(w, np.float32)
    n_in = w.shape[-1]
    assert n_in % t.block_size == 0
    out = np.empty((*w.shape[:-1], n_in // t.block_size * t.type_size), np.uint8)
    per = [None] if importance is None else list(np.ascontiguousarray(importance, np.float32).reshape(-1, n_in))
    for q, rows, data in zip(
        per, np.array_split(w.reshape(-1, n_in), len(per)), np.array_split(out.reshape(-1, out.shape[-1]), len(per)), strict=True
    ):
        encode_into(kind, rows, data, q)
    return out


def encode_into(
    kind: str | int, rows: NDArray[np.float32], out: NDArray[np.uint8], importance: NDArray[np.float32] | None
) -> None:
    """The bare call: rows f32[n, in] to out u8[n, row_bytes], both dense."""
    q = importance.ctypes.data if importance is not None else None
    n = _lib().ggml_quantize_chunk(IDS.get(kind, kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, q)  # type: ignore[call-overload]
    assert n == out.nbytes


def decode(kind: str | int, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """ggml's weights f32[shape] of those bytes."""
    w = np.empty(shape, np.float32)
    decode_into(kind, np.ascontiguousarray(data), w)
    return w


def decode_into(kind: str | int, data: NDArray[np.uint8], w: NDArray[np.float32]) -> None:
    """The bare call, on dense arrays."""
    t = traits(kind)
    assert data.nbytes == w.size // t.block_size * t.type_size
    if IDS.get(kind, kind) == 0:
        w.reshape(-1)[:] = data.reshape(-1).view(np.float32)
    else:
        t.to_float(data.ctypes.data, w.ctypes.data, w.size)
