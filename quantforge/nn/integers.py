"""Planes of integer codecs (GPTQ, AWQ, compressed-tensors, LLM.int8()): codes, scales and zero points of tiles.

Groups of 128 columns or multiples lie as they are, of 64 or 32 two or four to a chunk; other multiples of 32 repeat their
parameters. Columns whose groups are in any order (act-order) are sorted by group: plane `group`, i32[in], says which
column comes where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..arrays import Parts, to_numpy
from ..codecs.base import Codec, Encoded
from ..codecs.integers import ActOrderCodec, IntegerCodec, RowInt8, pack_bits, unpack_bits
from ..errors import UnsupportedError
from .base import tensor
from .tiles import gather, pack_fields, pack_rows, spread, unpack_fields, unpack_rows

CHUNK = 128
_SCALES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}


def _order(group: torch.Tensor, size: int, codec: Codec) -> torch.Tensor:
    """Columns sorted by group. Raises UnsupportedError unless all groups have `size` columns."""
    counts = torch.bincount(group.long(), minlength=len(group) // size)
    if bool((group < 0).any()) or len(counts) * size != len(group) or bool((counts != size).any()):
        raise UnsupportedError(f"{codec.name}: columns per group differ ({int(counts.min())} to {int(counts.max())}, not {size})")
    return torch.argsort(group, stable=True).to(torch.int32)


@dataclass(frozen=True, slots=True)
class Integers:
    """How matrices of one codec lie."""

    bits: int
    group: int
    """Columns of the codec's groups; 0: whole rows."""
    per: int
    """Groups of parameters in a chunk; 1: of one chunk or more."""
    kind: str
    chunk: int = CHUNK

    @property
    def repeats(self) -> int:
        """How often a group's parameters lie there."""
        return self.group // (CHUNK // self.per) if self.per > 1 else 1

    def _groups(self, n: int) -> int:
        """Parameters of a row of n columns; a last group that is short has as many as it needs."""
        return -(-n // (self.group // self.repeats)) if self.group else 1

    def pack(self, e: Encoded) -> dict[str, torch.Tensor]:
        """Planes codes; scales and, where asymmetric, zeros; with act-order, group."""
        out, n = e.shape
        parts = e.parts
        if isinstance(e.codec, RowInt8):
            codes, scales = tensor(parts["codes"]).view(torch.uint8) ^ 0x80, [tensor(parts["absmax"])]
        else:
            codes = tensor(unpack_bits(parts["codes"], self.bits, n))
            scales = [tensor(parts[k]) for k in ("scale", "zero") if k in parts]
        planes, last = {}, {}
        if isinstance(e.codec, ActOrderCodec):
            last["group"] = _order(tensor(parts["group"]), self.group, e.codec)
            codes = codes[:, last["group"]]
        planes["codes"] = pack_fields(spread(codes, CHUNK, 32), self.bits)
        for name, s in zip(("scales", "zeros"), scales, strict=False):
            rows = (
                s.reshape(-1, s.shape[-1]).expand(out, -1).repeat_interleave(self.repeats, 1)[:, : self._groups(n)].contiguous()
            )
            planes[name] = pack_rows(rows.view(torch.uint8).reshape(*rows.shape, -1), self.per).view(s.dtype)
        return planes | last

    def unpack(self, codec: Codec, shape: tuple[int, ...], planes: Sequence[torch.Tensor]) -> Encoded:
        """Inverse of `pack`."""
        out, n = shape
        codes = gather(unpack_fields(planes[0], self.bits), 32, out, n)
        plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
        extra: Parts = {}
        if isinstance(codec, ActOrderCodec):
            order = planes[-1].long()
            group = torch.empty_like(order)
            group[order] = torch.arange(n) // self.group
            codes = codes.new_empty(codes.shape).index_copy_(1, order, codes)
            extra["group"] = to_numpy(group.to(torch.int32))

        def rows(plane: torch.Tensor) -> torch.Tensor:
            grouped = unpack_rows(plane.contiguous().view(torch.uint8), plane.element_size(), out, self._groups(n))
            return grouped[:, :: self.repeats].contiguous().view(plane.dtype).squeeze(-1)

        if isinstance(codec, RowInt8):
            return Encoded(codec, shape, {"codes": to_numpy(codes ^ 0x80).view(np.int8), "absmax": to_numpy(rows(planes[1]))})
        assert isinstance(plain, IntegerCodec)
        parts: Parts = {"codes": pack_bits(to_numpy(codes.contiguous()), self.bits)}
        for name, plane in zip(("scale", "zero"), planes[1 : 2 + (not plain.symmetric)], strict=False):
            array = to_numpy(rows(plane))
            parts[name] = array if plain.row_local else array[:1, 0]
        return Encoded(codec, shape, parts | extra)


def family(codec: Codec) -> Integers | None:
    """None where there is no kernel: of 2, 3, 5, 6 or 7 bits, or groups that are no multiples of 32 columns."""
    if isinstance(codec, RowInt8):
        return Integers(8, 0, 1, "int8-p1-row")
    plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
    if not isinstance(plain, IntegerCodec) or plain.bits not in (4, 8) or plain.group % 32:
        return None
    per = 1 if plain.group % CHUNK == 0 else 2 if plain.group == 64 else 4
    scale = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[plain.scale_dtype.name]
    if scale == "f32" and per > 1:
        return None
    return Integers(plain.bits, plain.group, per, f"int{plain.bits}-p{per}-{scale}{'' if plain.symmetric else '-z'}")
