"""MXFP4 as gpt-oss keeps its experts: stacked, 32 weights in 16 bytes, the even one in the low nibble.

    X_blocks u8[experts, out, in / 32, 16], X_scales u8[experts, out, in / 32];  w = level · 2**(scale − 127)

The tensor is called X_blocks, its shape is [experts, out, in]: the same model in floats has X of [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import Parts, TensorInfo
from ..codecs.fp4 import mxfp4_data
from ..errors import ShapeError
from .base import Arrays, Found, Gathered, Layout, Load

_U8 = np.dtype(np.uint8)


def _unpack(arrays: Parts) -> Parts:
    blocks = arrays["blocks"]
    return {"data": mxfp4_data(blocks.reshape(*blocks.shape[:-2], -1), arrays["scales"])}


@dataclass(frozen=True, slots=True)
class Mxfp4(Layout):
    """gpt-oss."""

    name: ClassVar[str] = "mxfp4"

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        tensors, codec = {}, codecs.get("MXFP4")
        for name, info in arrays.items():
            if not name.endswith("_blocks"):
                continue
            stem = name.removesuffix("_blocks")
            scales = arrays.get(f"{stem}_scales")
            if info.dtype != _U8 or len(info.shape) < 3 or info.shape[-1] != 16 or scales != TensorInfo(_U8, info.shape[:-1]):
                raise ShapeError(f"{name}: {info.dtype}{list(info.shape)} and {stem}_scales are no MXFP4 weights")
            shape = (*info.shape[:-2], info.shape[-2] * 32)
            tensors[name] = Gathered(codec, shape, {"blocks": name, "scales": f"{stem}_scales"}, _unpack)
        return Found(tensors)


LAYOUT = Mxfp4
