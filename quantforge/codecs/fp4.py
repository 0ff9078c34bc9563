"""Four-bit floats (E2M1) under block scales: MXFP4 (a power of two per 32), NVFP4 (E4M3 per 16)."""

from __future__ import annotations

import numpy as np

from .. import native
from ..arrays import F8_E4M3, F8_E8M0, F32, Array, Parts, TensorInfo, empty
from .base import GgmlCodec, check_importance, check_parts, check_weights, raise_non_finite, register

E4M3_MAX, E2M1_MAX = 448.0, 6.0


class MXFP4(GgmlCodec):
    """MXFP4 in ggml's blocks: an E8M0 scale, which is a power of two, and 32 levels."""

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """The blocks' E8M0 [..., blocks]."""
        data = np.ascontiguousarray(parts["data"])
        return [data.reshape(*data.shape[:-1], -1, self.type_size)[..., 0].view(F8_E8M0)]


class NVFP4(GgmlCodec):
    """NVFP4 as llama.cpp loads it: ggml's blocks in `data`, and f32 `scale`, one per matrix.

    A weight is level · E4M3 block scale · scale. A GGUF file holds `scale` as a tensor of its
    own, `<stem>.scale` beside `<stem>.weight`; ggml's own encoder writes none, which loses
    weights below its smallest block scale. Each block scale is the best of a few by
    (importance-weighted) squared error.
    """

    row_local = False  # the scale comes from the whole matrix
    ggml_bytes = False

    def __init__(self, largest: float | None = None) -> None:
        super().__init__("NVFP4", takes_importance=True)
        self.largest = largest

    def sharing(self, largest: float) -> NVFP4:
        """This codec with a `scale` that serves several matrices, of which `largest` is the largest magnitude.

        Fused layers (vLLM's q/k/v, gate and up) have one for all.
        """
        return NVFP4(largest)

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """`data`: u8[..., row_bytes]; `scale`: f32[1], for stacked experts f32[experts]."""
        matrices = int(np.prod(shape[:-2], dtype=np.int64))
        return super().layout(shape) | {"scale": TensorInfo(np.dtype(np.float32), (matrices,))}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Quantize w: f32[..., out, in]; see `Codec.encode`."""
        w = check_weights(w, self)
        parts = {k: empty(i.shape, i.dtype) for k, i in self.layout(w.shape).items()}
        per: list[Array] = [] if importance is None else list(check_importance(importance, w.shape, self))
        scale = parts["scale"]
        for i, (rows, data) in enumerate(zip(_matrices(w, len(scale)), _matrices(parts["data"], len(scale)), strict=True)):
            amax = max(float(rows.max(initial=0)), -float(rows.min(initial=0)))
            if not np.isfinite(amax):
                raise_non_finite(w, self.name)
            amax = amax if self.largest is None else self.largest  # the same for all that share it, which may exceed it a little
            # the largest weight is the largest level under the largest block scale
            scale[i] = max(min(amax, 3.4e38) / (E4M3_MAX * E2M1_MAX), np.finfo(np.float32).tiny)
            q = [per[i % len(per)]] if per else []
            try:
                native.call_rows(self.name, "encode", [rows], [scale[i : i + 1], *q], [data], threads)
            except native.KernelError as e:
                if e.code != native.ELARGE:  # `scale` is an f32, which nothing finite overflows
                    raise
        return parts

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """The blocks' E4M3 [..., blocks, 4], and `scale`, which a file may lack."""
        data = np.ascontiguousarray(parts["data"])
        blocks = data.reshape(*data.shape[:-1], -1, self.type_size)[..., :4]
        return [blocks.view(F8_E4M3), *([parts["scale"]] if "scale" in parts else [])]

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]: what llama.cpp computes with. Without a part `scale` it is 1, as in ggml."""
        if "scale" not in parts:
            parts = parts | {"scale": np.ones(self.layout(shape)["scale"].shape, np.float32)}
        data, scale = check_parts(parts, shape, self)
        w = empty(shape, np.float32)
        for i, (rows, out) in enumerate(zip(_matrices(data, len(scale)), _matrices(w, len(scale)), strict=True)):
            native.call_rows(self.name, "decode", [rows], [scale[i : i + 1]], [out], threads)
        return w


def mxfp4_data(packed: Array, scale: Array) -> Array:
    """ggml's blocks u8[..., row_bytes] of codes u8[..., in/2], the even one in the low nibble, and E8M0 u8[..., in/32].

    ggml pairs weights half a block apart. Bits move, nothing else.
    """
    codes = _codes(packed).reshape(*scale.shape, 2, 16)
    data = np.concatenate([scale[..., None], codes[..., 0, :] | codes[..., 1, :] << np.uint8(4)], -1)
    return data.reshape(*scale.shape[:-1], -1)


def nvfp4_data(packed: Array, scale: Array) -> Array:
    """ggml's blocks of codes u8[..., in/2], the even one in the low nibble, and E4M3 [..., in/16]; see `mxfp4_data`."""
    lead = scale.shape[:-1]
    codes = _codes(packed).reshape(*lead, -1, 2, 8)
    pairs = (codes[..., 0, :] | codes[..., 1, :] << np.uint8(4)).reshape(*lead, -1, 32)
    return np.concatenate([scale.view(np.uint8).reshape(*lead, -1, 4), pairs], -1).reshape(*lead, -1)


def _codes(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], -1)


def _matrices(a: Array, n: int) -> Array:
    return a.reshape(n, -1, a.shape[-1])


register(MXFP4("MXFP4"))
register(NVFP4)
