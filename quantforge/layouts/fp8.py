"""FP8 as DeepSeek, Qwen and transformers keep it: E4M3 under f32 scales of 128 × 128 tiles, of rows or of the matrix.

w = weight · weight_scale_inv  (fbgemm_fp8 and vLLM's static fp8: weight_scale)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from .. import codecs  # noqa: F401 - registers the family
from ..arrays import F8_E4M3
from ..codecs.fp8 import fp8_under
from ..errors import ShapeError, UnsupportedError
from .base import Arrays, Found, Gathered, Layout, Load, activations, unpack_fp8


@dataclass(frozen=True, slots=True)
class Fp8(Layout):
    """FP8 under scales; also of stacked experts, whose names end in _scale_inv without "weight"."""

    name: ClassVar[str] = "fp8"
    also: ClassVar[tuple[str, ...]] = ("fbgemm_fp8",)

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        tile = config.get("weight_block_size") or [0, 0]
        if len(tile) != 2 or tile[0] != tile[1]:
            raise UnsupportedError(f"weight_block_size {tile}: square tiles are read, such as [128, 128]")
        tensors = {}
        for weight, info in arrays.items():
            if info.dtype != F8_E4M3 or len(info.shape) < 2:
                continue
            scale = next((s for s in (f"{weight}_scale_inv", f"{weight}_scale") if s in arrays), None)
            if scale is None:
                raise ShapeError(f"{weight} is FP8, but has no {weight}_scale_inv beside it")
            codec = fp8_under(arrays[scale], info, weight, tile[0])
            tensors[weight] = Gathered(
                codec, info.shape, {"weight": weight, "scale": scale}, partial(unpack_fp8, codec, info.shape)
            )
        return Found(tensors, activations(arrays))


LAYOUT = Fp8
