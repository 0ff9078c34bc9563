"""The kernels' layout of a stored matrix on a GPU: the same bits, rearranged so that every lane of a
warp gets its codes in loads of 16 bytes. docs/gpu.md has pictures.

A matrix is cut into tiles of 16 rows and chunks of `chunk` columns; both are padded with zeros. Every
plane's first two axes are tiles and chunks (or groups), so that a slice of tiles is a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from .. import codecs
from ..arrays import to_numpy
from ..codecs.base import AffineCodec, Codec, Encoded, GgmlCodec
from ..codecs.grid import Field
from ..codecs.grid import planes as fields
from ..errors import ShapeError
from . import fp8, integers, lookups
from .base import tensor
from .tiles import TILE as TILE
from .tiles import gather, pack_fields, pack_rows, spread, unpack_fields, unpack_rows


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """A matrix as kernels want it: what `kind` of kernel, and its tensors by name, in the kernel's order."""

    kind: str
    """The kernels' name for the codec."""
    codec: Codec
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Planes:
        """The same on another device."""
        return Planes(self.kind, self.codec, self.shape, {k: t.to(device) for k, t in self.tensors.items()})


# ---- families


class Family(Protocol):
    """How codecs of one kernel family become planes and come back."""

    @property
    def kind(self) -> str:
        """The kernels' name for it."""

    @property
    def chunk(self) -> int:
        """Columns that a warp takes at a time."""

    def pack(self, e: Encoded) -> dict[str, torch.Tensor]:
        """The planes of a matrix by name, in the kernel's order."""

    def unpack(self, codec: Codec, shape: tuple[int, ...], planes: Sequence[torch.Tensor]) -> Encoded:
        """Inverse of `pack`; planes on the CPU."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Codecs with a table of bits (`grid.Field`): codes in planes of a few bits each, parameters as they are stored."""

    kind: str
    chunk: int
    widths: tuple[int, ...]
    """Bits of a code in each plane of codes, the lowest first."""
    params: tuple[slice, ...]
    """Bytes of a stored block in each plane of parameters."""
    sub: int = 32
    """Columns that share a scale in the kernel."""
    field: Field | None = None
    """The codes in a stored block, where the codec has no grid."""

    def _codes(self, codec: Codec) -> Field:
        if self.field:
            return self.field
        assert isinstance(codec, AffineCodec)
        return codec.grid.q

    def pack(self, e: Encoded) -> dict[str, torch.Tensor]:
        """The planes of a matrix by name."""
        codec = e.codec
        assert isinstance(codec, GgmlCodec)
        data = tensor(e.parts["data"]).reshape(e.shape[0], -1, codec.type_size)
        lanes = spread(self._codes(codec).read(data).reshape(e.shape), self.chunk, self.sub)
        planes, place = {}, 0
        for i, width in enumerate(self.widths):
            planes[f"codes{i or ''}"] = pack_fields(lanes >> place, width)
            place += width
        for i, at in enumerate(self.params):
            planes[f"params{i or ''}"] = pack_rows(data[..., at], self.chunk // codec.block_size)
        return planes

    def unpack(self, codec: Codec, shape: tuple[int, ...], planes: Sequence[torch.Tensor]) -> Encoded:
        """Inverse of `pack`."""
        assert isinstance(codec, GgmlCodec)
        out, n = shape
        blocks = n // codec.block_size
        data = torch.zeros((out, blocks, codec.type_size), dtype=torch.uint8)
        lanes, place = torch.zeros((), dtype=torch.uint8), 0
        for width, plane in zip(self.widths, planes, strict=False):
            lanes = lanes | unpack_fields(plane, width) << place
            place += width
        for at, plane in zip(self.params, planes[len(self.widths) :], strict=True):
            data[..., at] = unpack_rows(plane, at.stop - at.start, out, blocks)
        self._codes(codec).write(gather(lanes, self.sub, out, n).reshape(out, blocks, -1), data)
        return Encoded(codec, shape, {"data": to_numpy(data.reshape(out, -1))})


def _affine(kind: str, chunk: int, widths: tuple[int, ...], *params: slice, sub: int = 32) -> Affine:
    return Affine(kind, chunk, widths, params, sub)


FAMILIES: dict[str, Family] = {
    "Q4_0": _affine("q4_0", 128, (4,), slice(0, 2)),
    "Q4_1": _affine("q4_1", 128, (4,), slice(0, 4)),
    "Q5_0": _affine("q5_0", 128, (4, 1), slice(0, 2)),
    "Q5_1": _affine("q5_1", 128, (4, 1), slice(0, 4)),
    "Q8_0": _affine("q8_0", 128, (8,), slice(0, 2)),
    "Q2_K": _affine("q2_k", 256, (2,), slice(0, 16), slice(80, 84), sub=16),
    "Q3_K": _affine("q3_k", 256, (2, 1), slice(96, 108), slice(108, 110), sub=16),
    "Q4_K": _affine("q4_k", 256, (4,), slice(0, 16)),
    "Q5_K": _affine("q5_k", 256, (4, 1), slice(0, 16)),
    "Q6_K": _affine("q6_k", 256, (4, 2), slice(192, 208), slice(208, 210), sub=16),
    "TQ2_0": Affine("tq2_0", 256, (2,), (slice(64, 66),), field=Field(256, 0, 2, 1, fields(0, 256, 32, 2))),
    "Q2_0": Affine("q2_0", 256, (2,), (slice(0, 2),), field=Field(64, 0, 3, 1, fields(2, 64, 1, 2))),
    "Q1_0": Affine("q1_0", 256, (1,), (slice(0, 2),), field=Field(128, 0, 1, 0, fields(2, 128, 1, 1))),
    **lookups.FAMILIES,
}
"""By codec name; integers and fp8 aside, whose names are many."""


@cache
def kind(codec: str) -> str:
    """The kernels' name for a codec: its family's, or its own where the planes are the stored parts."""
    mine = family(codec)
    return mine.kind if mine else codecs.get(codec).name


@cache
def family(codec: str) -> Family | None:
    """The kernel family of a codec, or None: its planes are the stored parts."""
    known = codecs.get(codec)
    return integers.family(known) or fp8.family(known) or FAMILIES.get(known.name)


def pack(e: Encoded) -> Planes:
    """The planes of a matrix, on the CPU; the same bytes but for padding. Raises ShapeError if it is no matrix."""
    if len(e.shape) != 2:
        raise ShapeError(f"{e.codec.name}: weights {list(e.shape)} are not a matrix [out, in]; take them apart first")
    mine = family(e.codec.name)
    if mine is None:
        return Planes(e.codec.name, e.codec, e.shape, {k: tensor(e.parts[k]) for k in e.codec.layout(e.shape)})
    return Planes(mine.kind, e.codec, e.shape, mine.pack(e))


def restore(tensors: Sequence[torch.Tensor], codec: str, shape: tuple[int, ...]) -> Planes:
    """Planes of tensors that `pack` made, in its order."""
    known = codecs.get(codec)
    names = list(known.layout(shape)) if family(codec) is None else [str(i) for i in range(len(tensors))]
    return Planes(kind(codec), known, shape, dict(zip(names, tensors, strict=True)))


def unpack(p: Planes) -> Encoded:
    """Inverse of `pack`, bit by bit."""
    mine = family(p.codec.name)
    if mine is None:
        layout = p.codec.layout(p.shape)
        bytes_ = {k: to_numpy(t.cpu().contiguous().reshape(-1).view(torch.uint8)) for k, t in p.tensors.items()}
        return Encoded(p.codec, p.shape, {k: bytes_[k].view(i.dtype).reshape(i.shape) for k, i in layout.items()})
    return mine.unpack(p.codec, p.shape, [t.cpu() for t in p.tensors.values()])
