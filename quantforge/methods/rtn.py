"""Round to nearest: the codec's own encoder, with importance where there is calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arrays import Parts
from ..codecs import Codec
from .base import Method, Stats, register

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RTN(Method):
    """Every weight by itself."""

    name = "rtn"

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`."""
        importance = None if stats is None else stats.importance.cpu().numpy()
        return codec.encode(w.cpu().numpy(), importance)


register(RTN())
