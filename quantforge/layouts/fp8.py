"""FP8 as DeepSeek, Qwen and transformers keep it: E4M3 under scales of 128 × 128 tiles, of rows or of the matrix; MXFP8:
of 32 columns. Scales are floats or powers of two (E8M0), as their own dtype or as bytes.

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
    also: ClassVar[tuple[str, ...]] = ("fbgemm_fp8", "mxfp8")

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        block = config.get("weight_block_size") or [0, 0]
        if len(block) != 2 or block[0] not in (1, block[1]):
            raise UnsupportedError(f"weight_block_size {block}: square blocks and parts of rows are read: [128, 128], [1, 32]")
        tensors = {}
        for weight, info in arrays.items():
            if info.dtype != F8_E4M3 or len(info.shape) < 2:
                continue
            scale = next((s for s in (f"{weight}_scale_inv", f"{weight}_scale") if s in arrays), None)
            if scale is None:
                raise ShapeError(f"{weight} is FP8, but has no {weight}_scale_inv beside it")
            codec = fp8_under(arrays[scale], info, weight, block[1] if block[0] > 1 else 0)
            tensors[weight] = Gathered(
                codec, info.shape, {"weight": weight, "scale": scale}, partial(unpack_fp8, codec, info.shape)
            )
        used = {name for g in tensors.values() for name in g.arrays.values()}
        if left := next((a for a in arrays if a.endswith("_scale_inv") and a not in used), None):
            raise ShapeError(f"{left} has no FP8 weight beside it")
        return Found(tensors, activations(arrays))


LAYOUT = Fp8
