"""MLX's affine integers: one stream of bits a row, a scale and a bias per group of columns.

w = scales · q + biases
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import Parts
from ..errors import ShapeError, UnsupportedError
from .base import SCALES, Arrays, Found, Gathered, Layout, Load, octets, stems


def _unpack(arrays: Parts) -> Parts:
    return {"codes": octets(arrays["weight"].view(np.int32)), "scale": arrays["scales"], "min": arrays["biases"]}


@dataclass(frozen=True, slots=True)
class Mlx(Layout):
    """MLX."""

    name: ClassVar[str] = "mlx"

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`. Bits follow from the arrays and the group size."""
        tensors = {}
        for stem in stems(arrays, "scales"):
            names = {k: f"{stem}.{k}" for k in ("weight", "scales", "biases")}
            own = config.get(stem)
            own = {**config, **own} if isinstance(own, Mapping) else config
            if own.get("mode", "affine") != "affine" or names["biases"] not in arrays:
                raise UnsupportedError(f"{stem}: MLX's mode {own.get('mode', 'without biases')!r} is not read; affine is")
            if names["weight"] not in arrays:
                raise ShapeError(f"{names['weight']} is missing beside {names['scales']}")
            weight, scales, size = arrays[names["weight"]], arrays[names["scales"]], own.get("group_size")
            kind, groups = SCALES.get(scales.dtype), scales.shape[-1] if scales.shape else 0
            columns = groups * size if type(size) is int else 0
            bits = weight.shape[-1] * 32 // columns if columns and weight.shape else 0
            fits = kind and 2 <= bits <= 8 and weight.dtype == np.uint32 and weight.shape[-1] * 32 == columns * bits
            if not fits or weight.shape[:-1] != scales.shape[:-1] or arrays[names["biases"]] != scales:
                raise ShapeError(f"{stem}: weight {list(weight.shape)} and scales {list(scales.shape)} are no groups of {size}")
            codec = codecs.get(f"int{bits}-g{size}-min-{kind}")
            tensors[f"{stem}.weight"] = Gathered(codec, (*weight.shape[:-1], columns), names, _unpack)
        return Found(tensors)


LAYOUT = Mlx
