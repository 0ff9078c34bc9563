"""Round to nearest: the codec's own encoder, with importance where there is calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arrays import Parts
from ..codecs import Codec
from .base import Stats, register


@dataclass(frozen=True)
class RTN:
    """Every weight by itself."""

    name: str = "rtn"
    needs: frozenset[str] = frozenset({"importance"})

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`."""
        importance = None if stats is None else stats.importance.cpu().numpy()
        return codec.encode(w.cpu().numpy(), importance)


register(RTN())
