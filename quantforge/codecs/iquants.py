"""ggml's IQ types: groups of 8, 4 or 1 weights are entries of a codebook (grid) times a scale.

The codebooks are the `gguf` package's tables; the compiled kernels get them as extra inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import gguf
import gguf.quants
import numpy as np

from ..arrays import F32, Array, Parts, to_numpy
from ..errors import ShapeError
from .base import (
    Codes,
    GgmlCodec,
    GridCodec,
    Params,
    check_importance,
    check_matrix,
    check_parts,
    importance_by_rows,
    register,
)
from .grid import Bits, Field, planes

if TYPE_CHECKING:
    import torch

KSIGNS: Array = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
"""Seven stored sign bits -> eight with an even number of ones."""

_AT_ONCE = 1 << 22
"""Costs (group x entry) that `round` holds at once."""


_F16 = Field(2, 0, 255, 0, (Bits(slice(0, 2), slice(0, 2), 0, 8),))


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a block's integers lie in its bytes.

    value = d · step · (2·sc + 1) · entry, entry with the signs of the code or moved by ±1/8;
    in IQ4_XS d · (sc − 32) · entry, in IQ4_NL d · entry.
    """

    vector: int
    """Weights per code."""
    code: tuple[tuple[Field, int], ...]
    """What a code is made of, and the bit where it begins."""
    sc: Field | None = None
    shift: Field | None = None
    """IQ1_S: 1 where a sub-block's levels are moved down by 1/8, not up."""
    step: float = 1.0
    d: Field = _F16
    """The two bytes of the f16."""
    signs: tuple[int, int] = (0, 0)
    """First bit and number of a code's sign bits; 7: the eighth makes the number of minuses even."""
    moved: int = 0
    """IQ1_M: the bit of a code that moves its levels down."""


class IQCodec(GgmlCodec, GridCodec):
    """A codebook type of ggml; see `GgmlCodec`.

    Encoding minimises Σ importance · (w − decoded)²; without importance all weights count alike
    (of the data-free weightings that need no other rows, the nearest to a calibrated one).

    Params: d: f16[out, blocks]; sc: u8[out, sub-blocks] (not in IQ4_NL); shift: u8[out, sub-blocks]
    (IQ1_S). Codes: i32[out, in / vector]: the index of the codebook entry; above its bits come the
    second entry's (IQ3_XXS), the stored sign bits, or the shift (IQ1_M).
    `vector` is 8 in IQ3_XXS, whose entries are of 4 weights, because signs have parity over 8.
    """

    ggml_bytes = False

    def __init__(self, name: str, fields: Fields, *, needs_importance: bool = False) -> None:
        halves = (0,) if fields.d is _F16 else ()
        super().__init__(name, takes_importance=True, needs_importance=needs_importance, halves=halves)
        self.fields = fields
        self.vector = fields.vector

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """The blocks' f16s; IQ1_M's are the high nibbles of its last odd bytes."""
        if self.halves:
            return super().scales(parts, shape)
        data = np.ascontiguousarray(parts["data"])
        nibbles = data.reshape(*data.shape[:-1], -1, self.type_size)[..., 49::2] >> 4
        return [(nibbles.astype("<u2") << np.arange(0, 16, 4, dtype="<u2")).sum(-1, dtype="<u2").view("<f2")]

    @cached_property
    def entries(self) -> Array:
        """The codebook: i8[entries, 8, 4 or 1]; without signs where the type stores them apart."""
        if self.name.startswith("IQ4"):
            return np.array(gguf.quants.IQ4_NL.kvalues, np.int8).reshape(16, 1)
        table = getattr(gguf.quants, self.name)
        table.init_grid()
        return np.ascontiguousarray(table.grid.reshape(table.grid_shape), np.int8)

    def _encode_inputs(self, importance: F32 | None, shape: tuple[int, ...]) -> Iterator[tuple[slice, list[Array], list[Array]]]:
        """As the base class has it, with the codebook; importance may also have one value per weight."""
        if importance is None:
            yield slice(None), [], [np.empty(0, np.float32), self.entries]
        elif (q := to_numpy(importance)).shape == shape:
            every = check_importance(q.reshape(1, -1), (1, q.size), self)
            yield slice(None), [every.reshape(-1, shape[-1])], [self.entries]
        else:
            for span, of_rows in importance_by_rows(importance, shape, self):
                yield span, [], [of_rows, self.entries]

    @property
    def tables(self) -> tuple[Array, ...]:
        """The codebook and the signs' parity."""
        return self.entries, KSIGNS

    # ---- GridCodec

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """The stored scales of `encode`'s result; see `GridCodec.fit`."""
        import torch

        check_matrix(w, importance, self)
        host = np.asarray(to_numpy(w.float()), np.float32)
        parts = self.encode(host, None if importance is None else to_numpy(importance.float()), threads=torch.get_num_threads())
        _, params = self.unpack(parts, host.shape)
        return {k: p.to(w.device) for k, p in params.items()}

    def round(self, w: torch.Tensor, params: Params, at: int = 0) -> Codes:
        """Nearest codes of columns at:at+n, the whole codebook searched: i32[out, n / vector].

        Raises ShapeError where columns do not begin and end between vectors.
        """
        return self.round_weighted(w, params, at, None)

    def round_weighted(self, w: torch.Tensor, params: Params, at: int, importance: torch.Tensor | None) -> Codes:
        """`round`, minimising Σ importance · (w − ŵ)² of each vector; importance: f32[n]."""
        import torch

        scale, shift = self._scales(params, at, w.shape[1])
        x = w.float().reshape(-1, self.vector)
        # beyond 1e4 steps every entry is clipped alike; a scale of 0 gets the entry nearest 0
        y = (x / scale.reshape(-1, 1).masked_fill(scale.reshape(-1, 1) == 0, torch.inf)).clamp(-1e4, 1e4)
        moved = None if shift is None else shift.expand(scale.shape).reshape(-1)
        entries = torch.from_numpy(self.entries).to(w.device)
        rows = max(1, _AT_ONCE // len(entries))
        c = None if importance is None else importance.float().reshape(-1, self.vector).repeat(len(w), 1)
        codes = [
            _nearest(
                y[i : i + rows],
                None if moved is None else moved[i : i + rows],
                entries,
                self.fields,
                None if c is None else c[i : i + rows],
            )
            for i in range(0, len(y), rows)
        ]
        return torch.cat(codes).reshape(scale.shape)

    def expand(self, codes: Codes, params: Params, at: int = 0) -> torch.Tensor:
        """f32[out, n], bit-equal to `decode`."""
        import torch

        f, v = self.fields, self.vector
        scale, shift = self._scales(params, at, codes.shape[1] * v)
        entries = torch.from_numpy(self.entries).to(codes.device).float()
        bits = (len(entries) - 1).bit_length()
        per = v // entries.shape[1]
        index = torch.stack([(codes >> bits * i) & (len(entries) - 1) for i in range(per)], -1)
        values = entries[index.long()].reshape(*codes.shape, v)
        first, n = f.signs
        if n:
            signs = (codes >> first) & ((1 << n) - 1)
            if n == 7:
                signs = torch.from_numpy(KSIGNS.astype(np.int32)).to(codes.device)[signs.long()]
            values = values * (1 - 2 * ((signs.unsqueeze(-1) >> torch.arange(v, device=codes.device)) & 1))
        if f.moved:
            shift = 0.125 - 0.25 * ((codes >> f.moved) & 1)
        if shift is not None:
            values = values + shift.unsqueeze(-1)
        return (scale.unsqueeze(-1) * values).reshape(len(codes), -1)

    def pack(self, codes: Codes, params: Params) -> Parts:
        """One part, `data`: u8[out, row_bytes]."""
        import torch

        f, (out, blocks) = self.fields, params["d"].shape
        data = torch.zeros((out, blocks, self.type_size), dtype=torch.uint8, device=codes.device)
        f.d.write(params["d"].contiguous().unsqueeze(-1).view(torch.uint8), data)
        for k in ("sc", "shift"):
            if field := getattr(f, k):
                field.write(params[k].reshape(out, blocks, field.n), data)
        for field, place in f.code:
            field.write(((codes >> place) & 255).to(torch.uint8).reshape(out, blocks, field.n), data)
        return {"data": to_numpy(data.reshape(out, -1))}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> tuple[Codes, Params]:
        """(codes, params) of `data`: u8[out, row_bytes]. Raises ShapeError if it holds another tensor."""
        import torch

        f = self.fields
        (data,) = check_parts(parts, shape, self)
        # torch warns of read-only memory (a map of a file)
        bytes_ = torch.from_numpy(np.require(data.reshape(-1, data.shape[-1]), requirements=["W"]))
        out = bytes_.shape[0]
        bytes_ = bytes_.reshape(out, -1, self.type_size)
        params = {"d": f.d.read(bytes_).view(torch.float16).squeeze(-1)}
        params |= {k: field.read(bytes_).reshape(out, -1) for k in ("sc", "shift") if (field := getattr(f, k))}
        codes = sum(field.read(bytes_).int() << place for field, place in f.code)
        assert isinstance(codes, torch.Tensor)
        return codes.reshape(out, -1), params

    def _scales(self, params: Params, at: int, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale of each code of columns at:at+n, and IQ1_S's ±1/8: f32[out, n / vector]."""
        import torch

        f, v = self.fields, self.vector
        if at % v or n % v:
            raise ShapeError(f"{self.name}: columns {at}:{at + n} do not begin and end at multiples of its vector of {v} columns")
        code = torch.arange(at // v, (at + n) // v, device=params["d"].device)
        scale = params["d"].float()[:, code // (self.block_size // v)]
        if f.sc is None:
            return scale, None
        sub = code // (self.block_size // v // f.sc.n)
        sc = params["sc"].float()[:, sub]
        scale = scale * (sc - 32 if self.name == "IQ4_XS" else f.step * (2 * sc + 1))
        return scale, 0.125 - 0.25 * params["shift"].float()[:, sub] if f.shift else None


def _nearest(
    y: torch.Tensor, shift: torch.Tensor | None, entries: torch.Tensor, f: Fields, c: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes of groups y: f32[groups, vector], in steps: i32[groups]. c: the weights' importance, if not alike.

    As in kernels/cpu/iquants_search.inc: an entry's cost is that of its two halves, which are few.
    No sums but of a group's own squares: the same codes on every device.
    """
    import torch

    if f.vector == 1:
        values = entries[:, 0].float()
        return torch.bucketize(y[:, 0], (values[1:] + values[:-1]) / 2).int()
    if f.moved and shift is None:
        trials = [_costs(y - s, entries, c=c)[0].min(1) for s in (0.125, -0.125)]
        up, down = trials
        lower = down.values < up.values
        return (down.indices.where(lower, up.indices) | lower.long() << f.moved).int()
    first, n = f.signs
    if shift is not None:
        y = y - shift.unsqueeze(-1)
    if not n:
        return _costs(y, entries, c=c)[0].argmin(1).int()
    minus = y < 0
    y = y.abs()
    width = entries.shape[1]
    cs = [None] * (f.vector // width) if c is None else torch.split(c, width, 1)
    costs = [_costs(part, entries, n == 7, own) for part, own in zip(torch.split(y, width, 1), cs, strict=True)]
    plain = [c.min(1) for c, _ in costs]
    index = [p.indices for p in plain]
    if n == 7:
        odd = minus.sum(1) & 1 == 1
        flipped = [c.min(1) for _, c in costs if c is not None]
        # the entry in which a sign is flipped
        where = flipped[0].values * 0 > 0
        if len(costs) == 2:
            where = flipped[1].values + plain[0].values < flipped[0].values + plain[1].values
        flip = [odd & ~where, odd & where][: len(costs)]
        index = [b.indices.where(m, p) for b, p, m in zip(flipped, index, flip, strict=True)]
        cost = [
            (part * entries.float()[i] * (1 if own is None else own)).masked_fill(~m.unsqueeze(-1), torch.inf)
            for part, i, m, own in zip(torch.split(y, width, 1), index, flip, cs, strict=True)
        ]
        cheapest = torch.cat(cost, 1).argmin(1)
        minus = minus ^ (torch.nn.functional.one_hot(cheapest, f.vector).bool() & odd.unsqueeze(-1))
    signs = (minus.int() << torch.arange(f.vector, device=y.device)).sum(1) & ((1 << n) - 1)
    bits = (len(entries) - 1).bit_length()
    codes = signs << first
    for i, k in enumerate(index):
        codes = codes | k << bits * i
    return codes.int()


def _costs(
    y: torch.Tensor, entries: torch.Tensor, flips: bool = False, c: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Squared distance of each y[group] to each entry, and with the best one sign flipped: f32[groups, entries]."""
    import torch

    half = entries.shape[1] // 2
    plain, flipped = [], []
    for h in (slice(0, half), slice(half, 2 * half)):
        patterns, which = torch.unique(entries[:, h], dim=0, return_inverse=True)
        v, x, importance = patterns.float(), y[:, h], None if c is None else c[:, h, None]
        cost, least = x.new_zeros((len(x), len(v))), None
        for j in range(half):
            square = (x[:, j, None] - v[:, j]).square()
            cost += square if importance is None else square * importance[:, j]
            if flips:  # (x + v)² = (x − v)² + 4xv
                more = 4 * x[:, j, None] * v[:, j]
                more = more if importance is None else more * importance[:, j]
                least = more if least is None else least.minimum(more)
        plain.append(cost[:, which])
        if least is not None:
            flipped.append((cost + least)[:, which])
    return plain[0] + plain[1], (flipped[0] + plain[1]).minimum(plain[0] + flipped[1]) if flips else None


def _bytes(at: int, n: int, stride: int = 1) -> Field:
    """n whole bytes."""
    return Field(n, 0, 255, 0, (Bits(slice(0, n), slice(at, at + n * stride, stride), 0, 8),))


def _packed(n: int, per: int, at: int, stride: int, width: int, first: int = 0, step: int = 0) -> Field:
    """n numbers of `width` bits, `per` of them in each word of `stride` bytes from byte `at`; the i-th
    of a word begins at bit first + i·(step or width)."""
    bits = []
    for i in range(per):
        bit, to = first + i * (step or width), slice(i, n, per)
        byte, low = bit // 8, min(width, 8 - bit % 8)
        span = slice(at + byte, at + byte + (n // per - 1) * stride + 1, stride)
        bits.append(Bits(to, span, bit % 8, low))
        if low < width:
            bits.append(Bits(to, slice(span.start + 1, span.stop + 1, stride), 0, width - low, low))
    return Field(n, 0, (1 << width) - 1, 0, tuple(bits))


_FIELDS = {
    # d; index u8[32]; per 32: u16 (shift 1 | sc 3 | index 4x3)
    "IQ1_S": Fields(
        8, ((_bytes(2, 32), 0), (_packed(32, 4, 34, 2, 3), 8)), _packed(8, 1, 34, 2, 3, 12), _packed(8, 1, 34, 2, 1, 15)
    ),
    # index u8[32]; u4 (shift 1 | index 3)[32]; u16 (d 4 | sc 4x3)[4]
    "IQ1_M": Fields(
        8,
        ((_bytes(0, 32), 0), (_packed(32, 2, 32, 1, 4), 8)),
        _packed(16, 4, 48, 2, 3),
        d=Field(
            2, 0, 255, 0, tuple(Bits(slice(i // 2, i // 2 + 1), slice(49 + 2 * i, 50 + 2 * i), 4, 4, i % 2 * 4) for i in range(4))
        ),
        moved=11,
    ),
    # d; per 32: index u8[4], u32 (sc 4 | signs 4x7)
    "IQ2_XXS": Fields(
        8,
        (
            (Field(32, 0, 255, 0, tuple(Bits(slice(i, 32, 4), slice(2 + i, 66, 8), 0, 8) for i in range(4))), 0),
            (_packed(32, 4, 6, 8, 7), 8),
        ),
        _packed(8, 1, 6, 8, 4, 28),
        step=0.125,
        signs=(8, 7),
    ),
    # d; u16 (signs 7 | index 9)[32]; u4 sc[16]
    "IQ2_XS": Fields(8, ((_bytes(2, 32, 2), 0), (_bytes(3, 32, 2), 8)), _packed(16, 2, 66, 1, 4), step=0.125, signs=(9, 7)),
    # d; index u8[32]; signs u8[32]; index u2[32]; u4 sc[16]
    "IQ2_S": Fields(
        8,
        ((_bytes(2, 32), 0), (_packed(32, 4, 66, 1, 2), 8), (_bytes(34, 32), 10)),
        _packed(16, 2, 74, 1, 4),
        step=0.125,
        signs=(10, 8),
    ),
    # d; index u8[64]; per 32: u32 (sc 4 | signs 4x7)
    "IQ3_XXS": Fields(
        8,
        ((_bytes(2, 32, 2), 0), (_bytes(3, 32, 2), 8), (_packed(32, 4, 66, 4, 7), 16)),
        _packed(8, 1, 66, 4, 4, 28),
        step=0.25,
        signs=(16, 7),
    ),
    # d; index u8[64]; index u1[64]; signs u4[64]; sc u4[8]
    "IQ3_S": Fields(
        4,
        ((_bytes(2, 64), 0), (_packed(64, 8, 66, 1, 1), 8), (_packed(64, 2, 74, 1, 4), 9)),
        _packed(8, 2, 106, 1, 4),
        signs=(9, 4),
    ),
    # d; index u4[32]
    "IQ4_NL": Fields(1, ((Field(32, 0, 15, 0, planes(2, 32, 16, 4)), 0),)),
    # d; sc u2[8], their high bits; sc u4[8]; index u4[256]
    "IQ4_XS": Fields(
        1,
        ((Field(256, 0, 15, 0, planes(8, 256, 16, 4)), 0),),
        Field(
            8,
            0,
            63,
            32,
            _packed(8, 2, 4, 1, 4).bits + tuple(Bits(slice(i, 8, 4), slice(2, 4), 2 * i, 2, 4) for i in range(4)),
        ),
    ),
}

# llama-quantize refuses these without importance
_NEEDS_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")

for _name, _fields in _FIELDS.items():
    register(IQCodec(_name, _fields, needs_importance=_name in _NEEDS_IMPORTANCE))
