"""Round to nearest: the codec's own encoder, with importance where there is calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..arrays import Parts
from ..codecs import Codec
from .base import Stats, register


@dataclass(frozen=True)
class RTN:
    """Every weight by itself."""

    name: str = "rtn"
    needs: frozenset[str] = frozenset({"importance"})

    def settings(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def takes(self, codec: Codec) -> bool:
        """Every codec that encodes."""
        return codec.encodes

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """See `Method.quantize`."""
        importance = None if stats is None else stats.importance.cpu().numpy()
        return codec.encode(w.cpu().numpy(), importance)


register(RTN())
