"""Planes of fp8 (kernels/cuda/fp8.cuh): codes as bytes, scales as f32, one of each row or of a tile's columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..arrays import BF16, Array, to_numpy
from ..codecs.base import Codec, Encoded
from ..codecs.fp8 import Fp8Codec
from .base import tensor
from .tiles import TILE, gather, pack_fields, pack_rows, spread, unpack_fields, unpack_rows

CHUNK = 128


def _wide(scale: Array) -> torch.Tensor:
    """f32 that `_narrow` makes the same bits of."""
    if scale.dtype == BF16:
        return tensor(np.left_shift(scale.view(np.uint16).astype(np.uint32), 16).view(np.float32))
    return tensor(scale.astype(np.float32))


def _narrow(scale: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    values = np.ascontiguousarray(to_numpy(scale))
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(BF16) if dtype == BF16 else values.astype(dtype)


@dataclass(frozen=True, slots=True)
class Fp8:
    """How matrices of one codec lie."""

    kind: str
    chunk: int = CHUNK

    def pack(self, e: Encoded) -> dict[str, torch.Tensor]:
        """Planes codes and scales: f32[tiles, 1, 16] of rows, f32[tiles, chunks, 1] of blocks, f32[tiles, 1, 1] of the whole."""
        codec, (out, n) = e.codec, e.shape
        assert isinstance(codec, Fp8Codec)
        codes = pack_fields(spread(tensor(e.parts["codes"]).reshape(out, n), CHUNK, 32), 8)
        scale, tiles, chunks = _wide(e.parts["scale"]), codes.shape[0], codes.shape[1]
        if codec.row_local:
            scale = pack_rows(scale.view(torch.uint8).reshape(out, 1, 4), 1).view(torch.float32)
        elif codec.side:
            rows = torch.arange(tiles) * TILE // codec.side
            scale = scale[rows][:, torch.arange(chunks) * CHUNK // codec.side].unsqueeze(-1).contiguous()
        else:
            scale = scale.expand(max(tiles, 1), 1, 1).contiguous()
        return {"codes": codes, "scales": scale}

    def unpack(self, codec: Codec, shape: tuple[int, ...], planes: Sequence[torch.Tensor]) -> Encoded:
        """Inverse of `pack`."""
        assert isinstance(codec, Fp8Codec)
        layout, (out, n), scale = codec.layout(shape), shape, planes[1]
        codes = gather(unpack_fields(planes[0], 8), 32, out, n).contiguous()
        if codec.row_local:
            scale = unpack_rows(scale.view(torch.uint8), 4, out, 1).contiguous().view(torch.float32)
        elif codec.side:
            scale = scale[:: codec.side // TILE, :: codec.side // CHUNK].contiguous()
        else:
            scale = scale[0]
        narrow = _narrow(scale, layout["scale"].dtype)
        return Encoded(
            codec, shape, {"codes": to_numpy(codes).view(layout["codes"].dtype), "scale": narrow.reshape(layout["scale"].shape)}
        )


def family(codec: Codec) -> Fp8 | None:
    """None where there is no kernel: blocks that are no multiples of 128."""
    if not isinstance(codec, Fp8Codec) or codec.side % CHUNK or codec.group:
        return None
    return Fp8("fp8-row" if codec.row_local else "fp8-tile")
