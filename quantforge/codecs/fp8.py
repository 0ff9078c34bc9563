"""FP8 (E4M3) under a scale, a family of codecs: fp8-tensor, fp8-channel, fp8-block128 (blocks of 128 × 128), fp8-g32 (32
columns of a row, as MXFP8 has it); scales are f32, or -bf16, -f16."""

from __future__ import annotations

import re

import numpy as np

from .. import native
from ..arrays import BF16, F8_E4M3, F8_E8M0, F32, Array, Parts, TensorInfo
from ..errors import ShapeError, UnsupportedError
from .base import Codec, check_parts, check_weights, get, raise_non_finite, raise_out_of_range, register_family

_NAME = re.compile(r"fp8-(tensor|channel|block[1-9]\d{0,5}|g[1-9]\d{0,5})(?:-(f16|bf16|f32))?")
_DTYPES = {"f16": np.dtype(np.float16), "bf16": BF16, "f32": np.dtype(np.float32)}
_EXPONENTS = (F8_E8M0, np.dtype(np.uint8))
_MAX = np.float32(448)


class Fp8Codec(Codec):
    """w = code · scale.  Parts: codes: f8_e4m3[..., in]; scale: [1], [..., 1], [..., in/group], or [..., out/block, in/block]
    rounded up."""

    def __init__(self, per: str, scale: str = "f32") -> None:
        self.per, self.scale_dtype = per, _DTYPES[scale]
        self.side = int(per.removeprefix("block")) if per.startswith("block") else 0
        self.name = f"fp8-{per}" + ("" if scale == "f32" else f"-{scale}")
        self.group = int(per[1:]) if per[0] == "g" else 0
        self.row_local = per == "channel" or bool(self.group)
        self.shared = frozenset({"scale"}) if per == "tensor" else frozenset()

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Parts codes and scale."""
        if len(shape) < (2 if self.side else 1):
            raise ShapeError(f"{self.name}: weights {list(shape)} are no matrix; choose fp8-channel or a float type")
        scales: tuple[int, ...] = (1,)
        if self.side:
            scales = (*shape[:-2], -(-shape[-2] // self.side), -(-shape[-1] // self.side))
        elif self.group:
            scales = (*shape[:-1], -(-shape[-1] // self.group))
        elif self.row_local:
            scales = (*shape[:-1], 1)
        return {"codes": TensorInfo(F8_E4M3, shape), "scale": TensorInfo(self.scale_dtype, scales)}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """The largest weight of a scale becomes 448; round to the nearest. Importance does not matter here."""
        w = check_weights(w, self)
        info = self.layout(w.shape)["scale"]
        if self.side:
            magnitude = np.pad(np.abs(w), [(0, 0)] * (w.ndim - 2) + [(0, -n % self.side) for n in w.shape[-2:]])
            blocks = magnitude.reshape(*w.shape[:-2], info.shape[-2], self.side, info.shape[-1], self.side)
            amax = blocks.max((-3, -1), initial=0)
        else:
            rows = w if self.row_local else w.reshape(1, w.size)
            if self.group:
                wide = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % self.group)])
                rows = wide.reshape(*info.shape, self.group)
            amax = np.maximum(rows.max(-1, initial=0), -rows.min(-1, initial=0)).reshape(info.shape)
        if not np.isfinite(amax).all():
            raise_non_finite(w, self.name)
        largest = 65504.0 if self.scale_dtype == np.float16 else 3.38e38
        reason = f"{self.name} stores its scales in {self.scale_dtype}, up to {largest:g}"
        raise_out_of_range(w, amax / _MAX > largest, self, reason)
        scale = (amax / _MAX).astype(self.scale_dtype)
        wide = self._spread(scale.astype(np.float32), w.shape)
        with np.errstate(over="ignore"):
            x = w / np.where(wide > 0, wide, np.float32(np.inf))
        return {"codes": np.clip(x, -_MAX, _MAX).astype(F8_E4M3), "scale": scale}

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        codes, scale = check_parts(parts, shape, self)
        return np.asarray(codes.astype(np.float32) * self._spread(scale.astype(np.float32), shape), np.float32)

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`. Activations stay floats, as the codes are."""
        if self.group:
            return super().matmul(x, parts, shape, threads=threads, activations=activations)
        codes, scale = check_parts(parts, shape, self)
        cut = np.array([shape[1], self.side or int(self.row_local), self.side], np.int64)
        return native.product("F8_E4M3", x, [codes.view(np.uint8), scale, cut], shape[0], threads)

    def _spread(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """Scales in a shape that broadcasts to the weights'."""
        if self.group:
            return scale.repeat(self.group, -1)[..., : shape[-1]]
        if not self.side:
            return scale
        return scale.repeat(self.side, -2).repeat(self.side, -1)[..., : shape[-2], : shape[-1]]


def widened(scale: Array) -> Array:
    """Scales of one byte as f32, exactly: 2**(byte − 127); others as they are."""
    return scale.view(F8_E8M0).astype(np.float32) if scale.dtype in _EXPONENTS else scale


def fp8_under(scale: TensorInfo, weight: TensorInfo, what: str, side: int = 0) -> Fp8Codec:
    """The codec of a matrix [..., out, in] under scales of that dtype and shape: of all, a row, a square block, or
    columns of a row.

    Scales of one byte are powers of two (E8M0), which `widened` makes f32. side: the block's, where known; else the power of
    two that fits. what: names the tensor. Raises ShapeError, UnsupportedError.
    """
    kind = "f32" if scale.dtype in _EXPONENTS else next((k for k, dtype in _DTYPES.items() if dtype == scale.dtype), None)
    if weight.dtype != F8_E4M3 or kind is None:
        raise UnsupportedError(f"{what}: weights of {weight.dtype} under scales of {scale.dtype} are not known")
    n, k = weight.shape[-2:] if len(weight.shape) > 1 else (1, weight.shape[-1] if weight.shape else 0)
    shape, lead = scale.shape, weight.shape[:-2]
    if TensorInfo(np.dtype(np.uint8), shape).nbytes == 1 and (len(shape) < 2 or n > 1) and not lead:
        per = "tensor"
    elif shape in ((*lead, n), (*lead, n, 1)):
        per = "channel"
    elif len(shape) == len(weight.shape) > 1 and shape[:-1] == (*lead, n) and shape[-1] and k % shape[-1] == 0 and n > 1:
        per = f"g{k // shape[-1]}"
    elif len(shape) == len(weight.shape) > 1 and all(shape):
        least = max(-(-n // shape[-2]), -(-k // shape[-1]))
        per = f"block{side or 1 << (least - 1).bit_length()}"  # the last blocks may be cut off
    else:
        raise ShapeError(f"{what}: scales {list(shape)} do not fit weights {list(weight.shape)}")
    codec = get(f"fp8-{per}-{kind}")
    assert isinstance(codec, Fp8Codec)
    if codec.side and codec.layout(weight.shape)["scale"].shape != shape:
        raise ShapeError(
            f"{what}: scales {list(shape)} do not cut weights {list(weight.shape)} into blocks of {codec.side} x {codec.side}"
        )
    return codec


def _of_name(name: str) -> Codec | None:
    match = _NAME.fullmatch(name)
    return match and Fp8Codec(match[1], match[2] or "f32")


register_family(_of_name)
