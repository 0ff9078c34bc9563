"""llama.cpp's products: ggml's own library through ctypes, with our codecs' bytes as its tensors.

GGML is the folder with libggml.so and its backends (a build of llama.cpp or of ggml, or llama_cpp/lib of a
llama-cpp-python wheel), or one library that exports ggml. Without it, an installed xllamacpp is taken. One ggml graph has
a product with every copy of the matrix, several times over; ggml's CUDA backend replays it as a CUDA graph where it was
built with them. ggml takes f32 activations and rounds them to 8 bits, which is part of the time.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch

from . import harness
from .run import Row

PREFIX = "llama.cpp "
CODECS = ("Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_XS", "IQ2_XXS")
MOST = 512
"""The largest M: what llama.cpp cuts prompts into."""
NODES = 96
"""Products in a graph, at least: its launch is shared by them."""
OUTPUT = 2 << 30
"""Bytes of results in a graph, at most."""

_CPU, _GPU = 0, 1
_POINTER, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", _SIZE), ("buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_init": (_POINTER, [_Parameters]),
    "ggml_free": (None, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, ctypes.c_int, _INT64, _INT64]),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, _SIZE, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_backend_load_all_from_path": (None, [ctypes.c_char_p]),
    "ggml_backend_init_by_type": (_POINTER, [ctypes.c_int, ctypes.c_char_p]),
    "ggml_backend_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_POINTER, _POINTER]),
}


class Library:
    """ggml's functions, from wherever they are exported."""

    def __init__(self, where: Path) -> None:
        files = [where] if where.is_file() else [f for f in map(where.joinpath, ("libggml-base.so", "libggml.so")) if f.exists()]
        if not files:
            raise RuntimeError(f"GGML={where}: no libggml.so there")
        # ggml-base first: libggml.so needs it, and may not say where it is
        self._libraries = [ctypes.CDLL(str(f), mode=ctypes.RTLD_GLOBAL) for f in files]
        for name, (result, arguments) in _FUNCTIONS.items():
            found = next((f for lib in self._libraries if (f := getattr(lib, name, None))), None)
            if found is None:
                raise RuntimeError(f"GGML={where}: {files[-1].name} has no {name}")
            found.restype, found.argtypes = result, arguments
            setattr(self, name, found)
        if where.is_dir():
            self.ggml_backend_load_all_from_path(str(where).encode())  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        raise AttributeError(name)


def find() -> Path:
    """Where ggml is. Raises RuntimeError."""
    if given := os.environ.get("GGML"):
        return Path(given).resolve()
    spec = find_spec("xllamacpp")
    for folder in [] if spec is None or spec.origin is None else [Path(spec.origin).parent]:
        for file in folder.glob("xllamacpp*.so"):
            return file
    raise RuntimeError("GGML is not set: the folder of a llama.cpp build with libggml.so")


@cache
def _backend(device: str) -> tuple[Library, int]:
    where = find()
    library = Library(where)
    backend = library.ggml_backend_init_by_type(_GPU if device == "cuda" else _CPU, None)  # type: ignore[operator]
    if not backend:
        raise RuntimeError(f"{where}: a build without a backend for {device}")
    return library, backend


class _Tensors:
    """Tensors of a context, in memory of the backend."""

    def __init__(self, g: Library, backend: int, count: int, nodes: int = 0) -> None:
        self.g, self.backend = g, backend
        room = count * g.ggml_tensor_overhead() + g.ggml_graph_overhead_custom(nodes + 8, False) + 4096
        self.context = g.ggml_init(_Parameters(room, None, True))
        self.buffer = None

    def allocate(self) -> None:
        self.buffer = self.g.ggml_backend_alloc_ctx_tensors(self.context, self.backend)
        if not self.buffer:
            raise MemoryError("ggml finds no memory on the device")

    def free(self) -> None:
        if self.buffer:
            self.g.ggml_backend_buffer_free(self.buffer)
        self.g.ggml_free(self.context)


def rows(name: str, n: int, k: int, ms: list[int], device: str) -> Iterator[Row]:
    """Times of one type and shape."""
    codec, here = name.removeprefix(PREFIX), harness.of(device)
    g, backend = _backend(device)
    data = np.ascontiguousarray(harness.block(codec, k).parts["data"]).reshape(-1).view(np.uint8)
    data = np.tile(data, n // harness.BLOCK)
    copies = harness.copies_of(data.nbytes, here)
    weights = _Tensors(g, backend, copies)
    try:
        matrices = [g.ggml_new_tensor_2d(weights.context, int(gguf.GGMLQuantizationType[codec]), k, n) for _ in range(copies)]
        weights.allocate()
        for w in matrices:
            g.ggml_backend_tensor_set(w, data.ctypes.data, 0, data.nbytes)
        for m in ms:
            if m <= MOST:
                us, y = _product(g, backend, matrices, n, k, m, here)
                error = harness.relative_error(y.to(here), codec, k)
                yield Row(name, n, k, m, us, data.nbytes, error, "8-bit activations")
    finally:
        weights.free()


def _product(
    g: Library, backend: int, matrices: list[int], n: int, k: int, m: int, device: torch.device
) -> tuple[float, torch.Tensor]:
    """(microseconds of one product; the last one's result, f32[m, n])."""
    least = NODES if device.type == "cuda" else 1
    rounds = max(1, min(-(-least // len(matrices)), OUTPUT // (len(matrices) * n * m * 4)))
    count = rounds * len(matrices)
    tensors = _Tensors(g, backend, count + 1, count)
    try:
        x = g.ggml_new_tensor_2d(tensors.context, int(gguf.GGMLQuantizationType.F32), k, m)
        graph = g.ggml_new_graph_custom(tensors.context, count + 8, False)
        for i in range(count):
            y = g.ggml_mul_mat(tensors.context, matrices[i % len(matrices)], x)
            g.ggml_build_forward_expand(graph, y)
        tensors.allocate()
        given = harness.activations(m, k, device).float().cpu().contiguous().numpy()
        g.ggml_backend_tensor_set(x, given.ctypes.data, 0, given.nbytes)

        def seconds() -> float:
            began = time.perf_counter()
            status = g.ggml_backend_graph_compute(backend, graph)  # waits for the device
            if status:
                raise RuntimeError(f"ggml_backend_graph_compute: {status}")
            return time.perf_counter() - began

        for _ in range(3 if device.type == "cuda" else 1):  # the second replay is captured
            seconds()
        found: list[float] = []
        while len(found) < 3 or (device.type == "cuda" and sum(found) < 0.15 and len(found) < 50):
            found.append(seconds())
        result = np.full((m, n), np.nan, np.float32)
        g.ggml_backend_tensor_get(y, result.ctypes.data, 0, result.nbytes)
        return 1e6 * statistics.median(found) / count, torch.from_numpy(result)
    finally:
        tensors.free()
