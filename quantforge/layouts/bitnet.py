"""BitNet b1.58 as transformers keeps it: matrices of −1, 0, 1 under one scale.

bitlinear: weight u8[out / 4, in], four rows in the bits of one; w = (bits − 1) / weight_scale
autobitlinear, offline: the same, or the integers as floats; w = (bits − 1) · weight_scale
autobitlinear, online: floats that the model itself makes ternary: round(w / mean |w|), times the mean
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import F32, Array, Parts
from ..codecs.integers import pack_bits
from ..errors import ShapeError, UnsupportedError
from .base import SCALES, Arrays, Found, Gathered, Layout, Load, in_blocks

_U8 = np.dtype(np.uint8)


def _parts(ternary: Array, scale: np.float32) -> Parts:
    """ternary: −1, 0, 1. Raises ValueError for other numbers."""
    codes = ternary.astype(np.int8)
    if (codes != ternary).any() or np.abs(codes).max(initial=0) > 1:
        raise ValueError("other numbers than -1, 0 and 1")
    return {"codes": pack_bits((codes + 2).astype(np.uint8), 2), "scale": np.full((len(codes), 1), scale, np.float32)}


def _packed(weight: Array) -> Array:
    """−1, 0, 1 of u8[out / 4, in]: the lowest bits are the first quarter of the rows."""
    return np.concatenate([(weight >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)]).astype(np.int8) - np.int8(1)


def _stored(inverted: bool) -> Callable[[Parts], Parts]:
    def unpack(arrays: Parts) -> Parts:
        weight, scale = arrays["weight"], np.float32(arrays["scale"].astype(np.float32).reshape(-1)[0])
        ternary = _packed(weight) if weight.dtype == _U8 else weight.astype(np.float32)
        return _parts(ternary, np.float32(1) / scale if inverted else scale)

    return unpack


def _online(arrays: Parts) -> Parts:
    w: F32 = arrays["weight"].astype(np.float32)
    inverse = np.float32(1) / np.maximum(np.abs(w).mean(dtype=np.float32), np.float32(1e-5))
    scale = (np.float32(1) / inverse).astype(arrays["weight"].dtype).astype(np.float32)
    return _parts(np.clip(np.rint(w * inverse), -1, 1), scale)


@dataclass(frozen=True, slots=True)
class BitNet(Layout):
    """BitNet b1.58."""

    name: ClassVar[str] = "bitnet"

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        if config.get("use_rms_norm"):
            raise UnsupportedError("BitNet with use_rms_norm: its norms of activations are part of no other format")
        automatic = config.get("linear_class", "bitlinear") == "autobitlinear"
        online = automatic and config.get("quantization_mode", "offline") == "online"
        kept = tuple(config.get("modules_to_not_convert") or ())
        tensors, ternary = {}, codecs.get("ternary")
        for module in in_blocks(
            k.removesuffix(".weight") for k, v in arrays.items() if k.endswith(".weight") and len(v.shape) == 2
        ):
            weight, scale = f"{module}.weight", f"{module}.weight_scale"
            info = arrays[weight]
            if scale in arrays:
                if int(np.prod(arrays[scale].shape)) != 1 or not (info.dtype == _U8 or info.dtype in SCALES):
                    raise ShapeError(f"{weight}: {info.dtype}{list(info.shape)} and {scale} are no BitNet weights")
                shape = (info.shape[0] * (4 if info.dtype == _U8 else 1), info.shape[1])
                tensors[weight] = Gathered(ternary, shape, {"weight": weight, "scale": scale}, _stored(not automatic))
            elif info.dtype == _U8:
                raise ShapeError(f"{scale} is missing beside {weight}")
            elif online and not any(module == k or module.endswith(f".{k}") for k in kept):
                tensors[weight] = Gathered(ternary, info.shape, {"weight": weight}, _online)
        return Found(tensors)


LAYOUT = BitNet
