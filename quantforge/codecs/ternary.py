"""Types of two to four evenly spaced levels: ggml's TQ1_0, TQ2_0 (ternary), Q2_0, Q1_0 (signs); rows of −1, 0, 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..arrays import F32, Parts
from .base import GgmlCodec, IntegerGrid, Integers, Params, check_weights, raise_non_finite, raise_out_of_range, register
from .grid import Spacing
from .integers import IntegerCodec, pack_bits

if TYPE_CHECKING:
    import torch


class TernaryBlocks(GgmlCodec):
    """−1, 0, 1 times an f16 per block of 256."""

    def __init__(self, name: str, half: int) -> None:
        super().__init__(name, halves=(half,))
        self.integers = IntegerGrid(2, 1, self.block_size)

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """Codes 0, 1, 2 and the blocks' scales."""
        (step,) = self.scales(parts, shape)
        step = step.astype(np.float32)
        codes = np.sign(self.decode(parts, shape)) * np.sign(step).repeat(self.block_size, -1) + 1
        return Integers(codes.astype(np.uint8), step, np.ones(step.shape, np.uint8))

    def from_integers(self, codes: Integers) -> Parts:
        """Inverse of `to_integers`; what it encodes is what a block's largest weight is."""
        w = (codes.codes.astype(np.float32) - 1) * codes.step.repeat(self.block_size, -1)[..., : codes.codes.shape[-1]]
        return self.encode(w)


class TernaryRows(IntegerCodec):
    """w = scale · −1, 0 or 1; a scale f32 per row: what BitNet b1.58 trains, whose files have one scale per matrix.

    Parts as those of int2-channel-sym-f32, of which only the codes 1, 2, 3 occur.
    """

    def __init__(self) -> None:
        super().__init__(2, "channel", scale="f32")
        self.name = "ternary"
        self.integers = IntegerGrid(2, 1, 0, step="f32")

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Rounded by the rows' mean magnitude, as BitNet does; then the scale is the mean of what is not 0."""
        w = check_weights(w, self)
        raise_non_finite(w, self.name)
        size = np.abs(w)
        mean = size.mean(-1, keepdims=True, dtype=np.float64) if w.shape[-1] else np.zeros((*w.shape[:-1], 1))
        codes = np.where(size > mean / 2, np.sign(w), 0)
        n = np.count_nonzero(codes, -1)[..., None]
        scale = np.where(codes != 0, size, 0).sum(-1, keepdims=True, dtype=np.float64) / np.maximum(n, 1)
        raise_out_of_range(w, scale > self._largest, self, self._reason)
        return {"codes": pack_bits((codes + 2).astype(np.uint8), 2), "scale": scale.astype(np.float32)}

    def _nearest(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        return super()._nearest(w, scale, zero).clamp_min_(1)

    def spacing(self, params: Params, at: int, n: int) -> Spacing:
        """See `GridCodec.spacing`."""
        return super().spacing(params, at, n)._replace(lowest=1)

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """Codes 0, 1, 2 and the rows' scales."""
        codes = super().to_integers(parts, shape)
        return Integers(codes.codes - np.uint8(1), codes.step, codes.zero - np.uint8(1))

    def from_integers(self, codes: Integers) -> Parts:
        """Inverse of `to_integers`."""
        return super().from_integers(Integers(codes.codes + np.uint8(1), codes.step, codes.zero + np.uint8(1)))


register(TernaryBlocks("TQ1_0", 52))
register(TernaryBlocks("TQ2_0", 64))
# newer than the gguf package's tables: (id, weights per block, bytes per block)
register(GgmlCodec("Q1_0", size=(41, 128, 18), halves=(0,)))
register(GgmlCodec("Q2_0", size=(42, 64, 18), halves=(0,)))
register(TernaryRows)
