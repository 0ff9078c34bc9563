"""Round to nearest: the codec's own encoder, with importance where there is calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arrays import Parts
from ..codecs import Codec
from ..codecs.integers import IntegerCodec
from ..device import quantize
from .base import Method, Stats, register

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RTN(Method):
    """Every weight by itself."""

    name = "rtn"

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`. On a GPU where the type has a kernel, or is a grid whose encoder is `fit` and `round`."""
        if w.is_cuda and isinstance(codec, IntegerCodec) and stats is not None:
            params = codec.fit(w, stats.importance)
            return codec.pack(codec.round(w, params), params)
        importance = None if stats is None else stats.importance.cpu().numpy()
        if w.is_cuda:
            return quantize(w, codec, importance=importance).parts
        return codec.encode(w.cpu().numpy(), importance)


register(RTN())
