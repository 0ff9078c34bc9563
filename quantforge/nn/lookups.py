"""Planes of codecs whose codes are entries of a table (kernels/cuda/lookup.cuh): 16 numbers, two codes to an
index byte, or a codebook of 4 or 8 neighbours with signs apart. An index stands for 1, 2 or 4 pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import gguf
import numpy as np
import torch

from ..arrays import F32, Array, to_numpy
from ..codecs.base import Codec, Encoded
from ..codecs.iquants import KSIGNS, IQCodec
from ..codecs.lookup import DYNAMIC, LookupCodec
from .base import tensor
from .tiles import TILE, gather, pack_fields, pack_rows, spread, unpack_fields, unpack_rows

Numbers = list[torch.Tensor]
"""Of one codec: integers [out, in / (2 pairs)], the indices; u8[out, in / 8], the signs if it has them; and
u8[out, blocks, bytes] for each plane of parameters that is cut by rows."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """How one codec's bits become indices, signs and parameters, and come back."""

    kind: str
    chunk: int
    pairs: int
    read: Callable[[Encoded], Numbers]
    write: Callable[[Codec, Numbers, list[torch.Tensor], tuple[int, ...]], Encoded]
    levels: Callable[[Codec], F32]
    """f32[16] or f32[entries, 4 or 8]."""
    blocks: tuple[int, ...]
    """Weights of a block of each plane of parameters."""
    sub: int = 32
    """Columns that share a scale in the kernels; a lane has a quarter of them."""
    high: int = 0
    """Bits of an index above its byte; in IQ1 the highest says that the levels are moved down."""
    signs: bool = False
    whole: Callable[[Encoded], list[torch.Tensor]] = field(default=lambda e: [])
    """Planes of the whole matrix."""
    raised: float = 1
    """What the numbers of the table's pairs are multiplied by."""

    @property
    def cut(self) -> tuple[int, int, int]:
        """Of a chunk's indices: sub-blocks, lanes with indices of their own, indices of a lane."""
        indices = self.sub // (2 * self.pairs)
        return self.chunk // self.sub, min(4, indices), max(1, indices // 4)

    def pack(self, e: Encoded) -> dict[str, torch.Tensor]:
        """The planes of a matrix by name."""
        indices, *rest = self.read(e)
        lanes = _lanes(indices, *self.cut)
        packed = {"codes": _vectors((lanes & 255).to(torch.uint8))}
        if self.high:
            # from the lowest bit of a lane's bytes on
            fields = (lanes.long() >> 8) << torch.arange(0, lanes.shape[-1] * self.high, self.high)
            packed["high"] = _vectors(fields.sum(-1, keepdim=True).view(torch.uint8)[..., : lanes.shape[-1] * self.high // 8])
        if self.signs:
            bits = rest.pop(0).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
            packed["signs"] = pack_fields(spread(bits.flatten(1), self.chunk, self.sub), 1)
        for i, (params, block) in enumerate(zip(rest, self.blocks, strict=True)):
            packed[f"params{i or ''}"] = pack_rows(params, self.chunk // block)
        packed |= {f"whole{i or ''}": t for i, t in enumerate(self.whole(e))}
        levels = np.ascontiguousarray(self.levels(e.codec), np.float32)
        return packed | {"table": table(levels.tobytes(), self.pairs, self.raised)}

    def unpack(self, codec: Codec, shape: tuple[int, ...], planes: Sequence[torch.Tensor]) -> Encoded:
        """Inverse of `pack`."""
        out, n = shape
        rest = list(planes)
        lanes = _from_vectors(rest.pop(0), self.cut[1])
        if self.high:
            bytes_ = _from_vectors(rest.pop(0), self.cut[1])
            fields = torch.nn.functional.pad(bytes_, (0, 8 - bytes_.shape[-1])).view(torch.int64)
            shifts = torch.arange(0, lanes.shape[-1] * self.high, self.high)
            lanes = lanes | ((fields >> shifts & ((1 << self.high) - 1)) << 8).int()
        numbers = [_from_lanes(lanes, *self.cut, out, n // (2 * self.pairs))]
        if self.signs:
            bits = gather(unpack_fields(rest.pop(0), 1), self.sub, out, n).reshape(out, -1, 8)
            numbers.append((bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
        for block in self.blocks:
            plane = rest.pop(0)
            numbers.append(unpack_rows(plane, plane.shape[2] // TILE * block // self.chunk, out, n // block))
        return self.write(codec, numbers, rest[:-1], shape)


@cache
def table(levels: bytes, pairs: int, raised: float = 1) -> torch.Tensor:
    """What the kernels look up: i32[words]. One tensor for all matrices of a codec."""
    numbers = torch.frombuffer(bytearray(levels), dtype=torch.float32)
    if pairs == 1:
        byte = torch.arange(256)
        entries = torch.stack([numbers[byte & 15], numbers[byte >> 4]], -1)
    else:
        entries = numbers.reshape(-1, 2 * pairs)
    words = [(entries * raised).to(t).contiguous().view(torch.int32) for t in (torch.bfloat16, torch.float16)]
    if pairs == 1:
        words.append(entries.contiguous().view(torch.int32))
    return torch.cat([w.reshape(-1) for w in words])


def _lanes(indices: torch.Tensor, subs: int, lanes: int, per: int) -> torch.Tensor:
    """Indices [out, n] to lanes, `per` to a lane and sub-block -> [tiles, chunks, 16 rows, lanes, subs·per]."""
    out, n = indices.shape
    indices = torch.nn.functional.pad(indices, (0, -n % (subs * lanes * per), 0, -out % TILE))
    tiles = indices.reshape(-1, TILE, indices.shape[1] // (subs * lanes * per), subs, lanes, per)
    return tiles.permute(0, 2, 1, 4, 3, 5).flatten(4)


def _from_lanes(values: torch.Tensor, subs: int, lanes: int, per: int, out: int, n: int) -> torch.Tensor:
    """Inverse of `_lanes`."""
    tiles = values.reshape(*values.shape[:4], subs, per).permute(0, 2, 1, 4, 3, 5)
    return tiles.reshape(tiles.shape[0] * TILE, -1)[:out, :n]


def _vectors(lanes: torch.Tensor) -> torch.Tensor:
    """u8[tiles, chunks, 16, lanes, bytes] -> u8[tiles, chunks, bytes] in vectors of 16 bytes; see `tiles.pack_fields`."""
    vectors = lanes.reshape(*lanes.shape[:4], -1, min(16, lanes.shape[4]))
    return vectors.permute(0, 1, 4, 2, 3, 5).contiguous().flatten(2)


def _from_vectors(plane: torch.Tensor, lanes: int) -> torch.Tensor:
    """Inverse of `_vectors`."""
    lane = plane.shape[2] // (TILE * lanes)
    return plane.reshape(*plane.shape[:2], -1, TILE, lanes, min(16, lane)).permute(0, 1, 3, 4, 2, 5).flatten(4).contiguous()


# ---- codecs


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """[out, blocks] of any dtype -> u8[out, blocks, itemsize]."""
    return t.contiguous().unsqueeze(-1).view(torch.uint8)


def _pair(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _unpair(indices: torch.Tensor) -> torch.Tensor:
    return torch.stack([indices & 15, indices >> 4], -1).flatten(1)


def _read_iq(e: Encoded, pairs: int) -> Numbers:
    assert isinstance(e.codec, IQCodec)
    codes, params = e.codec.unpack(e.parts, e.shape)
    d = _bytes(params["d"])
    if pairs == 1:
        return [_pair(codes), _join_scales(d, params["sc"]) if "sc" in params else d]
    bits, per = _index_bits(e.codec), e.codec.vector // (2 * pairs)
    indices = torch.stack([codes >> bits * i & ((1 << bits) - 1) for i in range(per)], -1).flatten(1)
    rest = [_nibbles(params["sc"], d.shape[1]), d]
    if "shift" in params:  # IQ1_S: of four indices
        indices = indices | params["shift"].int().repeat_interleave(4, 1) << bits
    elif e.codec.fields.moved:
        indices = codes
    first, n = e.codec.fields.signs
    if not n:
        return [indices, *rest]
    signs = codes >> first & ((1 << n) - 1)
    if n == 7:
        signs = torch.from_numpy(KSIGNS.copy())[signs]
    return [indices, _pair(signs) if n == 4 else signs.to(torch.uint8), *rest]


def _write_iq(codec: Codec, numbers: Numbers, _: list[torch.Tensor], shape: tuple[int, ...], pairs: int) -> Encoded:
    assert isinstance(codec, IQCodec)
    indices, *rest = numbers
    params = {}
    if pairs == 1:
        codes, d = _unpair(indices).int(), rest[0]
        if codec.fields.sc:
            d, params["sc"] = _split_scales(d)
    else:
        *signs, sc, d = rest
        first, n = codec.fields.signs
        codes = torch.zeros((), dtype=torch.int32)
        if n:
            codes = ((_unpair(signs[0]) if n == 4 else signs[0]).int() & ((1 << n) - 1)) << first
        bits, per = _index_bits(codec), codec.vector // (2 * pairs)
        for i, part in enumerate(indices.int().reshape(shape[0], -1, per).unbind(-1)):
            codes = codes | part << bits * i
        if codec.fields.shift:
            params["shift"] = (codes[:, ::4] >> bits).to(torch.uint8)
            codes = codes & ((1 << bits) - 1)
        params["sc"] = torch.stack([sc & 15, sc >> 4], -1).reshape(shape[0], -1)
    params["d"] = d.contiguous().view(torch.float16).squeeze(-1)
    return Encoded(codec, shape, codec.pack(codes, params))


def _index_bits(codec: IQCodec) -> int:
    return (len(codec.entries) - 1).bit_length()


def _nibbles(sc: torch.Tensor, blocks: int) -> torch.Tensor:
    return _pair(sc).reshape(len(sc), blocks, -1)


_PLACES = (32, 38, 44, 50, 56, 16, 22)
"""Where IQ4_XS's first seven scales begin in 64 bits, which begin with d: each lies in one word. The eighth is divided."""


def _join_scales(d: torch.Tensor, sc: torch.Tensor) -> torch.Tensor:
    """d: u8[out, blocks, 2], sc of 6 bits: u8[out, 8 blocks] -> u8[out, blocks, 8]."""
    s = sc.reshape(*d.shape[:2], 8).long()
    word = d[..., 0].long() | d[..., 1].long() << 8 | s[..., 7] >> 2 << 28 | (s[..., 7] & 3) << 62
    for i, at in enumerate(_PLACES):
        word = word | s[..., i] << at
    return _bytes(word)


def _split_scales(params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `_join_scales`."""
    word = params.contiguous().view(torch.int64).squeeze(-1)
    scales = [word >> at & 63 for at in _PLACES] + [(word >> 26 & 60) | (word >> 62 & 3)]
    return params[..., :2], torch.stack(scales, -1).to(torch.uint8).reshape(len(params), -1)


def _read_mxfp4(e: Encoded) -> Numbers:
    data = tensor(e.parts["data"]).reshape(e.shape[0], -1, 17)
    codes = torch.cat([data[..., 1:] & 15, data[..., 1:] >> 4], -1).flatten(1)
    return [_pair(codes), data[..., :1]]


def _write_mxfp4(codec: Codec, numbers: Numbers, _: list[torch.Tensor], shape: tuple[int, ...]) -> Encoded:
    codes = _unpair(numbers[0]).reshape(shape[0], -1, 32)
    data = torch.cat([numbers[1], codes[..., :16] | codes[..., 16:] << 4], -1)
    return Encoded(codec, shape, {"data": to_numpy(data.reshape(shape[0], -1))})


def _read_nvfp4(e: Encoded) -> Numbers:
    data = tensor(e.parts["data"]).reshape(e.shape[0], -1, 36)
    packed = data[..., 4:].reshape(*data.shape[:2], 4, 8)
    return [_pair(torch.cat([packed & 15, packed >> 4], -1).flatten(1)), data[..., :4]]


def _whole_nvfp4(e: Encoded) -> list[torch.Tensor]:
    tiles = -(-e.shape[0] // TILE)
    return [tensor(e.parts["scale"]).expand(max(tiles, 1), 1, 1).contiguous()]


def _write_nvfp4(codec: Codec, numbers: Numbers, whole: list[torch.Tensor], shape: tuple[int, ...]) -> Encoded:
    codes = _unpair(numbers[0]).reshape(shape[0], -1, 4, 16)
    data = torch.cat([numbers[1], (codes[..., :8] | codes[..., 8:] << 4).flatten(2)], -1)
    return Encoded(codec, shape, {"data": to_numpy(data.reshape(shape[0], -1)), "scale": to_numpy(whole[0][0, 0])})


def _swap(a: torch.Tensor) -> torch.Tensor:
    return a >> 4 | a << 4  # bitsandbytes has the even weight in the high nibble


def _read_table(e: Encoded) -> Numbers:
    return [_swap(tensor(e.parts["codes"])), _bytes(tensor(e.parts["absmax"]))]


def _whole_table(e: Encoded) -> list[torch.Tensor]:
    nested, offset = e.parts["nested_absmax"], e.parts["nested_offset"]
    return [torch.from_numpy(nested.copy()), torch.from_numpy(np.concatenate([DYNAMIC, offset]))]


def _write_table(codec: Codec, numbers: Numbers, whole: list[torch.Tensor], shape: tuple[int, ...]) -> Encoded:
    absmax: Array = (
        to_numpy(numbers[1]).squeeze(-1) if whole else to_numpy(numbers[1].contiguous().view(torch.float32).squeeze(-1))
    )
    parts = {"codes": to_numpy(_swap(numbers[0])), "absmax": absmax}
    if whole:
        parts |= {"nested_absmax": to_numpy(whole[0]), "nested_offset": to_numpy(whole[1][-1:])}
    return Encoded(codec, shape, parts)


def _iq_levels(codec: Codec) -> F32:
    assert isinstance(codec, IQCodec)
    eighths = codec.fields.shift or codec.fields.moved
    return codec.entries.astype(np.float32) * np.float32(8 if eighths else 1)


def _table_levels(codec: Codec) -> F32:
    assert isinstance(codec, LookupCodec)
    return codec.table


def _iq(name: str, chunk: int, pairs: int, *blocks: int, sub: int = 32, high: int = 0, signs: bool = True) -> Lookup:
    read, write = partial(_read_iq, pairs=pairs), partial(_write_iq, pairs=pairs)
    return Lookup(name, chunk, pairs, read, write, _iq_levels, blocks, sub, high, signs)


_FP4 = np.array(gguf.quants.MXFP4.kvalues, np.float32)

RAISED = 1.43670654296875
"""NF4's numbers times this, rounded to bf16, deviate by 0.8e-3 of their size and FP4's by 0.7e-3: of all factors the least
for both. As they are it would be 1.4e-3 and 1.3e-3, which beside the result's own rounding makes more than 2e-3."""

FAMILIES = {
    "IQ4_NL": _iq("iq4_nl", 128, 1, 32, signs=False),
    "IQ4_XS": _iq("iq4_xs", 256, 1, 256, signs=False),
    "IQ3_XXS": _iq("iq3_xxs", 256, 2, 256, 256),
    "IQ3_S": _iq("iq3_s", 256, 2, 256, 256, high=1),
    "IQ2_XXS": _iq("iq2_xxs", 256, 4, 256, 256),
    "IQ2_XS": _iq("iq2_xs", 256, 4, 256, 256, sub=16, high=1),
    "IQ2_S": _iq("iq2_s", 256, 4, 256, 256, sub=16, high=2),
    "IQ1_S": _iq("iq1_s", 256, 4, 256, 256, high=4, signs=False),
    "IQ1_M": _iq("iq1_m", 256, 4, 256, 256, sub=16, high=4, signs=False),
    "MXFP4": Lookup("mxfp4", 128, 1, _read_mxfp4, _write_mxfp4, lambda c: _FP4, (32,)),
    "NVFP4": Lookup("nvfp4", 128, 1, _read_nvfp4, _write_nvfp4, lambda c: _FP4, (64,), sub=16, whole=_whole_nvfp4),
    "nf4": Lookup("nf4", 128, 1, _read_table, _write_table, _table_levels, (64,), raised=RAISED),
    "nf4-dq": Lookup("nf4-dq", 128, 1, _read_table, _write_table, _table_levels, (64,), whole=_whole_table, raised=RAISED),
    "fp4": Lookup("nf4", 128, 1, _read_table, _write_table, _table_levels, (64,), raised=RAISED),
    "fp4-dq": Lookup("nf4-dq", 128, 1, _read_table, _write_table, _table_levels, (64,), whole=_whole_table, raised=RAISED),
}
"""By codec name. NF4 and FP4 are one kernel: their numbers come with the """
