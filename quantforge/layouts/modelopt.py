"""NVIDIA ModelOpt's FP8 and NVFP4, as its unified checkpoints have them.

FP8: w = weight · weight_scale;  NVFP4: w = level · weight_scale · weight_scale_2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import F8_E4M3, Parts, TensorInfo
from ..codecs.fp4 import nvfp4_data
from ..codecs.fp8 import fp8_under
from ..errors import ShapeError, UnsupportedError
from .base import Arrays, Found, Gathered, Layout, Load, activations, stems, unpack_fp8

_ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MIXED_PRECISION", None)


def _unpack_nvfp4(arrays: Parts) -> Parts:
    return {"data": nvfp4_data(arrays["weight"], arrays["weight_scale"]), "scale": arrays["weight_scale_2"].reshape(1)}


@dataclass(frozen=True, slots=True)
class ModelOpt(Layout):
    """ModelOpt; scales of activations are left out, of which a converted model has no use."""

    name: ClassVar[str] = "modelopt"
    also: ClassVar[tuple[str, ...]] = ("modelopt_fp4", "modelopt_mixed")

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`. What each matrix is, the arrays say."""
        algorithm = config.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise UnsupportedError(f"ModelOpt's {algorithm!r} is not read; FP8, MXFP8 and NVFP4 are")
        tensors = {}
        for stem in stems(arrays, "weight_scale"):
            names = {k: f"{stem}.{k}" for k in ("weight", "weight_scale", "weight_scale_2") if f"{stem}.{k}" in arrays}
            info = {k: arrays[v] for k, v in names.items()}
            if f"{stem}.pre_quant_scale" in arrays or "weight" not in info:
                raise UnsupportedError(f"{stem}: AWQ's pre_quant_scale, or a weight_scale without its weight, is not read")
            if info["weight"].dtype == np.uint8:
                tensors[f"{stem}.weight"] = _nvfp4(stem, names, info)
                continue
            scale = info["weight_scale"]
            if len(scale.shape) == 4:  # of 128 × 128 tiles: [out / 128, 1, in / 128, 1]
                scale = TensorInfo(scale.dtype, (scale.shape[0], scale.shape[2]))
            codec, shape = fp8_under(scale, info["weight"], stem), info["weight"].shape
            places = {"weight": names["weight"], "scale": names["weight_scale"]}
            tensors[f"{stem}.weight"] = Gathered(codec, shape, places, partial(unpack_fp8, codec, shape))
        known = {name for g in tensors.values() for name in g.arrays.values()}
        left = [a for a, i in arrays.items() if a not in known and (i.dtype == F8_E4M3 or a.endswith(".weight_scale_2"))]
        if left:
            raise ShapeError(f"{left[0]} has no weight_scale beside it")
        return Found(tensors, activations(arrays))


def _nvfp4(stem: str, names: Mapping[str, str], info: Mapping[str, TensorInfo]) -> Gathered:
    shape = (*info["weight"].shape[:-1], info["weight"].shape[-1] * 2)
    whole, codec = info.get("weight_scale_2"), codecs.get("NVFP4")
    scales = TensorInfo(F8_E4M3, (*shape[:-1], shape[-1] // 16))
    if (
        len(shape) != 2
        or info["weight_scale"] != scales
        or whole != TensorInfo(np.dtype(np.float32), whole.shape if whole else ())
    ):
        raise ShapeError(f"{stem}: weight_scale and weight_scale_2 do not fit NVFP4 weights {list(shape)}")
    if whole is None or whole.nbytes != 4:
        raise ShapeError(f"{stem}: weight_scale_2 is not one number")
    codec.layout(shape)
    return Gathered(codec, shape, names, _unpack_nvfp4)


LAYOUT = ModelOpt
