"""A module that holds a stored tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from .. import codecs
from ..arrays import BF16, Array
from ..codecs import Codec, Encoded


def tensor(part: Array) -> torch.Tensor:
    """A copy of an array as a torch tensor: of the same dtype, or of bytes where not all of torch knows it (fp8, U16)."""
    fresh = np.array(part, order="C")
    if fresh.dtype == BF16:
        return torch.from_numpy(fresh.view(np.int16)).view(torch.bfloat16)
    known = fresh.dtype.isbuiltin == 1 and (fresh.dtype.kind in "fi" or fresh.dtype == np.uint8)
    return torch.from_numpy(fresh if known else fresh.view(np.uint8))


class Packed(nn.Module):
    """A matrix [out, in] in its stored form: a buffer for each part, `weight_<part>`, with the file's bytes.

    Moving to another device takes the parts along; a change of dtype leaves them as they are, and is that of `dtype`.
    """

    dtype: torch.dtype | None = None
    """Of the numbers that come out; None: of what comes in."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        self.codec_name = encoded.codec.name
        self.shape = tuple(int(n) for n in encoded.shape)
        self._parts = tuple(f"weight_{k}" for k in encoded.codec.layout(encoded.shape))
        for name, part in zip(self._parts, encoded.parts.values(), strict=True):
            self.register_buffer(name, tensor(part))

    @property
    def codec(self) -> Codec:
        """How the matrix is stored."""
        return codecs.get(self.codec_name)

    @property
    def planes(self) -> list[torch.Tensor]:
        """What the operators take: the parts in the codec's order."""
        return [getattr(self, k) for k in self._parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return sum(p.nbytes for p in self.planes)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers that the matrix stands for: [out, in] of `dtype`, by default float32."""
        dtype = dtype or self.dtype or torch.float32
        found: torch.Tensor = torch.ops.quantforge.dequantize(self.planes, self.codec_name, *self.shape, dtype)
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # as bytes, which .half() and .to(dtype) let pass
        kept = {k: self._buffers.pop(k) for k in self._parts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for k, part in kept.items():
            assert part is not None
            if self.dtype is not None:
                self.dtype = fn(torch.empty(0, dtype=self.dtype, device=part.device)).dtype
            self._buffers[k] = fn(part.reshape(-1).view(torch.uint8)).view(part.dtype).reshape(part.shape)
        return self

    def extra_repr(self) -> str:
        """Sizes, codec and bits per weight."""
        out, n = self.shape
        bpw = 8 * self.nbytes / max(1, out * n)
        return f"in_features={n}, out_features={out}, codec={self.codec_name}, bpw={bpw:.4g}"
