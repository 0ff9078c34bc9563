"""ggml's IQ types: groups of 8, 4 or 1 weights are entries of a codebook (grid) times a scale.

The grids are the `gguf` package's tables; the compiled kernels get them as extra inputs.
"""

from __future__ import annotations

from functools import cached_property

import gguf
import gguf.quants
import numpy as np

from .. import native
from ..arrays import F32, Array, Parts, empty, to_numpy
from ..errors import NonFiniteError, ShapeError
from .base import GgmlCodec, check_parts, check_weights, raise_non_finite, register


class IQCodec(GgmlCodec):
    """A codebook type of ggml; see `GgmlCodec`.

    Encoding minimises the sum of importance · (w − decoded)²; without importance, of
    sqrt(2·mean(w²) + w²) · (w − decoded)² within each block.
    """

    ggml_bytes = False

    def __init__(self, name: str, *, needs_importance: bool = False) -> None:
        super().__init__(name, takes_importance=True, needs_importance=needs_importance)

    @cached_property
    def grid(self) -> Array:
        """The codebook: i8[entries, vector]; without signs where the type stores them apart."""
        return _grid(self.name)

    @cached_property
    def tables(self) -> tuple[Array, ...]:
        """What the kernels get after their data."""
        return (self.grid,)

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Quantize w: f32[..., in]; importance: f32[in], or anything that broadcasts to w."""
        w = check_weights(w, self)
        info = self.layout(w.shape)["data"]
        data = empty(info.shape, info.dtype)
        rows, out = w.reshape(-1, w.shape[-1]), data.reshape(-1, info.shape[-1])
        by_row: list[Array] = []
        shared: list[Array] = [np.empty(0, np.float32)]
        if importance is not None:
            q = np.asarray(to_numpy(importance), dtype=np.float32)
            if q.ndim == w.ndim - 1:  # one row of importance per matrix
                q = q[..., None, :]
            if not np.isfinite(q).all() or (q < 0).any():
                raise NonFiniteError(f"{self.name}: importance must be finite and not negative", ())
            try:
                if q.size == w.shape[-1]:
                    shared = [np.ascontiguousarray(q.reshape(-1))]
                else:
                    by_row, shared = [np.ascontiguousarray(np.broadcast_to(q, w.shape)).reshape(rows.shape)], []
            except ValueError:
                raise ShapeError(
                    f"{self.name}: importance of shape {list(q.shape)} does not fit weights {list(w.shape)}; "
                    "give one value per column"
                ) from None
        try:
            native.call_rows(self.name, "encode", [rows, *by_row], [*shared, *self.tables], [out], threads)
        except native.KernelError as e:
            if e.code == native.ENONFINITE:
                raise_non_finite(w, self.name)
            raise
        return {"data": data}

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]; bit-equal to ggml's and gguf-py's dequantization."""
        (data,) = check_parts(parts, shape, self)
        data = data.reshape(-1, data.shape[-1])
        w = empty(shape, np.float32)
        native.call_rows(self.name, "decode", [data], [self.grid, KSIGNS], [w.reshape(-1, shape[-1])], threads)
        return w


KSIGNS: Array = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
"""Seven stored sign bits -> eight with an even number of ones."""


def _grid(name: str) -> Array:
    if name in ("IQ4_NL", "IQ4_XS"):
        return np.array(gguf.quants.IQ4_NL.kvalues, np.int8).reshape(16, 1)
    table = getattr(gguf.quants, name)
    table.init_grid()
    return np.ascontiguousarray(table.grid.reshape(table.grid_shape), np.int8)


for _name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"):
    register(IQCodec(_name, needs_importance=True))
for _name in ("IQ3_S", "IQ4_NL", "IQ4_XS"):
    register(IQCodec(_name))
