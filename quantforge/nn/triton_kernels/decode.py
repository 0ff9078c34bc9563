# mypy: ignore-errors
"""Weights out of planes, in registers: what each family of codecs stores, and how a tile of it becomes exact numbers.

Planes are those of quantforge/nn/planes.py: tiles of 16 rows by `chunk` columns; each of four lanes owns `sub`/4
neighbouring columns of every `sub`. What the tensor cores multiply are codes (without their scale), which bf16 and f16
hold exactly: pairs of neighbours in a word, as the planes have them, are pairs of tiny numbers, which one instruction makes
larger (`numbers`); for many activations another one multiplies them with their scale (`scaled`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter runs the kernels on the CPU: it knows neither libdevice and assembly nor products of bf16."""

UNIT = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""What stands for 1 in products of integer codes, by the activations' type: see `numbers`."""
BF16_UNIT, F16_UNIT = tl.constexpr(UNIT[torch.bfloat16]), tl.constexpr(UNIT[torch.float16])
LOWERED = tl.constexpr(1 / 1.43670654296875)
"""NF4's and FP4's tables are raised by this much (quantforge/nn/lookups.py)."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """What `decode` needs to know of a family of codecs: w = scale·(code − zero), or scale·code − min."""

    chunk: int
    """Columns of a chunk: 128 or 256."""
    widths: tuple[int, ...]
    """Bits of a code in each plane of codes, the lowest first; of an index, and of a sign, where there is a table."""
    scales: str
    """How scales are stored: a case of `scales`."""
    sub: int = 32
    """A lane has sub/4 neighbouring columns of every `sub`."""
    span: int = 32
    """Columns under one scale, which are one product of matrices."""
    zero: int = 0
    per: int = 0
    """Groups of parameters in a chunk where groups are what `scales` counts (1: of one chunk or more); else 0."""
    mins: bool = False
    """Whether w = scale·code − min; `zero` is then the middle, which keeps scaled weights precise in f16."""
    exact: int = 64
    """The most activations of a program that multiplies codes: its scales take an instruction for each of them."""
    table: str = ""
    """What codes stand for where they are no numbers: a case of `levels`."""


FAMILIES = {
    "q4_0": Decoding(128, (4,), "half", zero=8),
    "q4_1": Decoding(128, (4,), "half_min", zero=8, mins=True),
    "q5_0": Decoding(128, (4, 1), "half", zero=16),
    "q5_1": Decoding(128, (4, 1), "half_min", zero=16, mins=True),
    "q8_0": Decoding(128, (8,), "half", zero=128),
    "q2_k": Decoding(256, (2,), "k2", sub=16, span=16, zero=2, mins=True),
    "q3_k": Decoding(256, (2, 1), "k3", sub=16, span=16, zero=4),
    "q4_k": Decoding(256, (4,), "k45", zero=8, mins=True),
    "q5_k": Decoding(256, (4, 1), "k45", zero=16, mins=True),
    "q6_k": Decoding(256, (4, 2), "k6", sub=16, span=16, zero=32),
    "iq4_nl": Decoding(128, (4,), "half", table="levels"),
    "iq4_xs": Decoding(256, (4,), "iq4_xs", table="levels"),
    "mxfp4": Decoding(128, (4,), "e8m0", table="levels"),
    "nf4": Decoding(128, (4,), "float64", span=64, table="levels"),
    "nf4-dq": Decoding(128, (4,), "nested", span=64, table="levels"),
    "iq3_xxs": Decoding(256, (2, 1), "eighths4", table="iq3"),
    "iq2_xxs": Decoding(256, (1, 1), "eighths2", table="iq2"),
    **{
        f"int{bits}-p{per}-{scale}{z}": Decoding(
            128, (bits,), f"{scale}{z}", zero=1 << (bits - 1), per=per, span=128 // per, exact=128 if per == 1 else 64
        )
        for bits in (4, 8)
        for per in (1, 2, 4)
        for scale in ("f16", "bf16", "f32")
        for z in ("", "-z")
        if scale != "f32" or per == 1
    },
    "int8-p1-row": Decoding(128, (8,), "row", zero=128, per=1, span=128, exact=128),
}
"""By kind of planes."""


@triton.jit
def pick(a, b, s):
    """Bytes of {b, a}, a the low word, that the nibbles of s name: PRMT without its sign bit."""
    if INTERPRETED:
        both = (b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | a.to(tl.uint32, bitcast=True).to(tl.uint64)
        s = s.to(tl.uint32, bitcast=True)
        r = ((both >> ((s & 7) * 8).to(tl.uint64)) & 255).to(tl.uint32)
        r |= ((both >> (((s >> 4) & 7) * 8).to(tl.uint64)) & 255).to(tl.uint32) << 8
        r |= ((both >> (((s >> 8) & 7) * 8).to(tl.uint64)) & 255).to(tl.uint32) << 16
        r |= ((both >> (((s >> 12) & 7) * 8).to(tl.uint64)) & 255).to(tl.uint32) << 24
        return r.to(tl.int32, bitcast=True)
    else:
        return libdevice.byte_perm(a, b, s)


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """f32 -> DTYPE, to the nearest (the interpreter cuts bf16 off)."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return v.to(DTYPE)


@triton.jit
def apart(pairs, DTYPE: tl.constexpr):
    """Words of two numbers [...] -> DTYPE[..., 2], the low half first."""
    first = (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    second = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.join(first, second)


@triton.jit
def together(numbers):
    """Inverse of `apart`."""
    first, second = tl.split(numbers.to(tl.uint16, bitcast=True).to(tl.int32))
    return first | (second << 16)


@triton.jit
def numbers(codes, less, DTYPE: tl.constexpr):
    """UNIT·code + less for pairs of codes below 256 and of DTYPE, in words: one instruction.

    A small integer's bits are a tiny number, c·2⁻¹³³ in bf16, c·2⁻²⁴ in f16 (PTX: fma supports subnormal ones).
    """
    if INTERPRETED:
        code = tl.join(codes & 0xFFFF, (codes >> 16) & 0xFFFF)
        sign = tl.where(code > 0x7FFF, -1.0, 1.0)
        tiny = (code & 0x7FFF).to(tl.float32) * sign
        value = rounded(tiny * (BF16_UNIT if tl.bfloat16 == DTYPE else F16_UNIT) + apart(less, DTYPE).to(tl.float32), DTYPE)
        return together(value)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 k; mov.b32 k, 0x7F007F00; fma.rn.bf16x2 $0, $1, k, $2; }", "=r,r,r", [codes, less], tl.int32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 k; mov.b32 k, 0x78007800; fma.rn.f16x2 $0, $1, k, $2; }", "=r,r,r", [codes, less], tl.int32, True, 1
        )


@triton.jit
def twice(v):
    """f32 -> words of two equal numbers of f16."""
    if INTERPRETED:
        return v.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) * 0x10001
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [v], tl.int32, True, 1)


@triton.jit
def scaled(pairs, scale, offset, MINS: tl.constexpr):
    """scale·pairs, + offset if MINS: pairs of f16 in words [BN, 4, N], f32[BN]; one instruction."""
    s, o = constant(pairs, 0) + twice(scale)[:, None, None], constant(pairs, 0)
    if MINS:
        o += twice(offset)[:, None, None]
    if INTERPRETED:
        product = apart(pairs, tl.float16).to(tl.float32) * apart(s, tl.float16).to(tl.float32)
        return together((product + apart(o, tl.float16).to(tl.float32)).to(tl.float16))
    elif MINS:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [pairs, s, o], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pairs, s], tl.int32, True, 1)


@triton.jit
def constant(like, value: tl.constexpr):
    """An i32 tensor of `value`, of like's shape."""
    return tl.full(like.shape, (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1), tl.int32)


@triton.jit
def words(plane, tile, tiles, chunk, chunks, N: tl.constexpr, BN: tl.constexpr):
    """A lane's N words of codes in BN rows from tile `tile` on: i32[BN, 4, N]; beyond the last tile, that one again.

    A warp takes whole tiles, as the tensor cores' operand does, so that no code crosses warps on its way there:
    halves of tiles (of eight rows, one word or vector to a lane) are loaded in an order that leaves both to one warp.
    """
    V: tl.constexpr = N if N < 4 else 4  # vectors of at most four words, a step's first ones first
    TILES: tl.constexpr = BN // 16
    half = tl.arange(0, 2 * TILES)
    step = tl.minimum(tile + half % TILES, tiles - 1) * chunks + chunk
    at = plane + (step * (64 * N) + half // TILES * (32 * V))[:, None] + tl.arange(0, 32 * V)[None, :]
    at = tl.max_contiguous(at, (1, V))  # no vectors of several lanes
    loaded = tl.reshape(tl.load(at), (2, TILES, 8, 4, V))
    if N > V:
        loaded = tl.join(loaded, tl.reshape(tl.load(at + 64 * V), (2, TILES, 8, 4, V)))
        loaded = tl.reshape(tl.permute(loaded, (0, 1, 2, 3, 5, 4)), (2, TILES, 8, 4, N))
    return tl.reshape(tl.permute(loaded, (1, 0, 2, 3, 4)), (BN, 4, N))


@triton.jit
def column(t, AT: tl.constexpr, N: tl.constexpr):
    """t[:, AT] of t[BN, N], N a power of two."""
    for bit in tl.static_range(5):
        if (N >> bit) > 1:
            even, odd = tl.split(tl.reshape(t, (t.shape[0], N >> (bit + 1), 2)))
            t = odd if (AT >> bit) & 1 else even
    return tl.reshape(t, (t.shape[0],))


@triton.jit
def block(t, AT: tl.constexpr, N: tl.constexpr):
    """The AT-th of N equal shares of each lane's words [BN, 4, N·R], N a power of two: [BN, 4, R]."""
    R: tl.constexpr = t.shape[2] // N
    t = tl.permute(tl.reshape(t, (t.shape[0], 4, N, R)), (0, 1, 3, 2))
    for bit in tl.static_range(5):
        if (N >> bit) > 1:
            even, odd = tl.split(tl.reshape(t, (t.shape[0], 4, R, N >> (bit + 1), 2)))
            t = odd if (AT >> bit) & 1 else even
    return tl.reshape(t, (t.shape[0], 4, R))


@triton.jit
def field(w, WIDTH: tl.constexpr, AT: tl.constexpr, UP: tl.constexpr):
    """Pair AT of words of fields, times 2^UP."""
    DOWN: tl.constexpr = AT * WIDTH - UP
    return (w >> DOWN if DOWN >= 0 else w << -DOWN) & constant(w, ((1 << WIDTH) - 1) * (0x10001 << UP))


@triton.jit
def fields(w, WIDTH: tl.constexpr, G: tl.constexpr, PAIRS: tl.constexpr, UP: tl.constexpr):
    """The G-th PAIRS pairs of a lane's words of fields [BN, 4, N], times 2^UP: i32[BN, 4, PAIRS]."""
    PER: tl.constexpr = 16 // WIDTH
    N: tl.constexpr = w.shape[2]
    EACH: tl.constexpr = PAIRS if PAIRS < PER else PER
    mine = block(w, G, N * PER // PAIRS) if PAIRS >= PER else block(w, G * PAIRS // PER, N)
    AT: tl.constexpr = G * PAIRS % PER
    if EACH == 2:
        joined = tl.join(field(mine, WIDTH, AT, UP), field(mine, WIDTH, AT + 1, UP))
    else:
        even = tl.join(field(mine, WIDTH, AT, UP), field(mine, WIDTH, AT + 2, UP))
        joined = tl.join(even, tl.join(field(mine, WIDTH, AT + 1, UP), field(mine, WIDTH, AT + 3, UP)))
    return tl.reshape(joined, (w.shape[0], 4, PAIRS))


@triton.jit
def integers(
    w, high, zero, W0: tl.constexpr, W1: tl.constexpr, G: tl.constexpr, PAIRS: tl.constexpr, LESS: tl.constexpr,
    ZEROS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The G-th PAIRS pairs of codes, plus LESS or less a row's zero i32[BN]: pairs of DTYPE, i32[BN, 4, PAIRS]."""
    code = fields(w, W0, G, PAIRS, 0)
    if W1:
        code |= fields(high, W1, G, PAIRS, W0)
    if ZEROS:
        less = (
            rounded(zero.to(tl.float32) * -(BF16_UNIT if tl.bfloat16 == DTYPE else F16_UNIT), DTYPE)
            .to(tl.uint16, bitcast=True)
            .to(tl.int32)
        )
        return numbers(code, constant(code, 0) + (less * 0x10001)[:, None, None], DTYPE)
    else:
        return numbers(code, constant(code, LESS), DTYPE)


@triton.jit
def look_up(w, t0, t1, t2, t3):
    """Words of eight nibbles, the first lowest [BN, 4, N] -> the bytes t[nibble], four to a word: [BN, 4, 2·N].

    t0..t3: the table's sixteen bytes, four to a word.
    """
    blank = constant(w, 0)
    high = w >> 16
    low_half = pick(blank + t0, blank + t1, w & 0x7777)
    high_half = pick(blank + t2, blank + t3, w & 0x7777)
    first = pick(low_half, high_half, ((w >> 1) & 0x4444) | 0x3210)
    low_half = pick(blank + t0, blank + t1, high & 0x7777)
    high_half = pick(blank + t2, blank + t3, high & 0x7777)
    second = pick(low_half, high_half, ((high >> 1) & 0x4444) | 0x3210)
    return tl.reshape(tl.join(first, second), (w.shape[0], 4, w.shape[2] * 2))


@triton.jit
def pattern(table, FIRST: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """A byte of four of a table's levels from FIRST on, as DTYPE. A word."""
    AT: tl.constexpr = FIRST + (0 if tl.bfloat16 == DTYPE else 256)
    word = 0
    for i in tl.static_range(4):
        # pairs of levels, of bf16 and then of f16: a word's low half is the level of its number's lowest four bits
        word |= ((tl.load(table + AT + i) >> SHIFT) & 255) << (8 * i)
    return word


@triton.jit
def patterns(table, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """The low bytes of a table's sixteen levels, then the high ones, four to a word."""
    if TABLE == "levels":
        return (
            pattern(table, 0, 0, DTYPE), pattern(table, 4, 0, DTYPE), pattern(table, 8, 0, DTYPE), pattern(table, 12, 0, DTYPE),
            pattern(table, 0, 8, DTYPE), pattern(table, 4, 8, DTYPE), pattern(table, 8, 8, DTYPE), pattern(table, 12, 8, DTYPE),
        )  # fmt: skip
    else:
        return 0


@triton.jit
def two(low, high, A: tl.constexpr, B: tl.constexpr):
    """Words {low, high} permuted by A, and by B, neighbours: [BN, 4, N] -> [BN, 4, 2·N]."""
    joined = tl.join(pick(low, high, constant(low, A)), pick(low, high, constant(low, B)))
    return tl.reshape(joined, (low.shape[0], 4, low.shape[2] * 2))


@triton.jit
def codebook(w, negative, table, TABLE: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """The G-th eight columns of a lane from its words of four indices [BN, 4, N], with their signs: i32[BN, 4, 4].

    table: i32[256] of selectors, a nibble for each number of an entry: which of the few values it is.
    """
    if TABLE == "iq2":
        index = (block(w, G // 4, w.shape[2]) >> (G % 4 * 8)) & 255
        entries = tl.load(table + index)
        values = constant(entries, 0x2B1908)  # 8 25 43
        entries = tl.join(pick(values, values, entries & 0x3333), pick(values, values, (entries >> 16) & 0x3333))
    else:
        index = block(w, G // 2, w.shape[2]) >> (G % 2 * 16)
        first, second = tl.load(table + (index & 255)), tl.load(table + ((index >> 8) & 255))
        low, high = constant(first, 0x1C140C04), constant(first, 0x3E342C24)  # 4 12 20 28 36 44 52 62
        entries = tl.join(pick(low, high, first), pick(low, high, second))
    entries = tl.reshape(entries, (w.shape[0], 4, 2))
    entries = two(entries, constant(entries, 0), 0x4140, 0x4342)
    s = block(negative, G // 4, negative.shape[2])
    AT: tl.constexpr = 15 - G % 4 * 4
    s = tl.join(tl.join(s << AT, s << (AT - 2)), tl.join(s << (AT - 1), s << (AT - 3)))
    entries ^= tl.reshape(s, entries.shape) & constant(entries, 0x80008000)
    return numbers(entries, constant(entries, 0), DTYPE)


@triton.jit
def codes(
    w, high, zero, table, levels, G: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SUB: tl.constexpr, SPAN: tl.constexpr,
    LESS: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The G-th SPAN columns of BN rows without their scale, exact: pairs of DTYPE, i32[BN, 4, SPAN / 8]."""
    PAIRS: tl.constexpr = SPAN // 8
    if TABLE == "iq2" or TABLE == "iq3":
        return codebook(w, high, table, TABLE, G, DTYPE)
    elif TABLE != "":
        w = block(w, G, w.shape[2] * 4 // PAIRS)
        low = look_up(w, levels[0], levels[1], levels[2], levels[3])
        return two(low, look_up(w, levels[4], levels[5], levels[6], levels[7]), 0x5140, 0x7362)
    else:
        return integers(w, high, zero, W0, W1, G, PAIRS, LESS, ZEROS, DTYPE)


@triton.jit
def operand(pairs, DTYPE: tl.constexpr):
    """The tensor cores' first operand, as it is in registers: DTYPE[BN, SPAN], columns in the order of `order`."""
    return tl.reshape(tl.permute(apart(pairs, DTYPE), (0, 2, 1, 3)), (pairs.shape[0], pairs.shape[2] * 8))


@triton.jit
def order(SUB: tl.constexpr, SPAN: tl.constexpr):
    """Where an operand's columns are: lanes' pairs in turns, as the tensor cores want them from registers."""
    k = tl.arange(0, SPAN)
    at = k // SUB * SUB + k // 2 % 4 * (SUB // 4) + k % SUB // 8 * 2 + k % 2
    return tl.max_contiguous(tl.multiple_of(at, 2), 2)


@triton.jit
def small(i):
    """i32 below 2²² -> f32: what converts bytes is slow."""
    return (i + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def byte(w, AT: tl.constexpr):
    """Byte AT of words, as f32."""
    return small((w >> (AT * 8)) & 255)


@triton.jit
def k45(q1, q2, q3, MINS: tl.constexpr):
    """The eight 6-bit scales (or mins) of a Q4_K or Q5_K block's twelve bytes, three words [BN]: f32[BN, 8]."""
    if MINS:
        first = q2 & 0x3F3F3F3F
        last = ((q3 >> 4) & 0x0F0F0F0F) | ((q2 >> 2) & 0x30303030)
    else:
        first = q1 & 0x3F3F3F3F
        last = (q3 & 0x0F0F0F0F) | ((q1 >> 2) & 0x30303030)
    even = tl.join(tl.join(byte(first, 0), byte(last, 0)), tl.join(byte(first, 2), byte(last, 2)))
    odd = tl.join(tl.join(byte(first, 1), byte(last, 1)), tl.join(byte(first, 3), byte(last, 3)))
    return tl.reshape(tl.join(even, odd), (q1.shape[0], 8))


@triton.jit
def scales(p0, p1, p2, step, row, n, chunk, N, K, KIND: tl.constexpr, S: tl.constexpr, BN: tl.constexpr):
    """(scale, offset) of a chunk's S groups of columns: f32[BN, S] each; w = scale·code + offset, if there are offsets."""
    s = tl.arange(0, S)
    if KIND == "half":
        d = tl.load(p0.to(tl.pointer_type(tl.float16)) + (step * (16 * S) + row * S)[:, None] + s[None, :]).to(tl.float32)
        return d, d
    elif KIND == "half_min":
        both = tl.load(p0 + (step * (16 * S) + row * S)[:, None] + s[None, :])
        d = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return d, ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "k45":
        at = p0 + step * 64 + row * 4
        both, q1, q2, q3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        d = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        dmin = ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return d[:, None] * k45(q1, q2, q3, 0), -dmin[:, None] * k45(q1, q2, q3, 1)
    elif KIND == "k2":
        sc = tl.load(p0.to(tl.pointer_type(tl.uint8)) + (step * 256 + row * 16)[:, None] + s[None, :]).to(tl.int32)
        both = tl.load(p1 + step * 16 + row)
        d = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        dmin = ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return d[:, None] * small(sc & 15), -dmin[:, None] * small(sc >> 4)
    elif KIND == "k3":
        at = p0 + step * 48 + row * 3
        q1, q2, q3 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        # the lowest four bits of scales 0 to 3, 4 to 7, 8 to 11, 12 to 15, and two more
        first = tl.join(q1, q1 >> 4) & 0x0F0F0F0F | (tl.join(q3 << 4, q3) & 0x30303030)
        second = tl.join(q2, q2 >> 4) & 0x0F0F0F0F | (tl.join(q3 << 2, q3 >> 2) & 0x30303030)
        four = tl.reshape(tl.join(first, second), (BN, 4))
        sc = tl.join(tl.join(byte(four, 0), byte(four, 2)), tl.join(byte(four, 1), byte(four, 3)))
        d = tl.load(p1.to(tl.pointer_type(tl.float16)) + step * 16 + row).to(tl.float32)
        d = d[:, None] * (tl.reshape(sc, (BN, 16)) - 32.0)
        return d, d
    elif KIND == "k6":
        sc = tl.load(p0.to(tl.pointer_type(tl.int8)) + (step * 256 + row * 16)[:, None] + s[None, :])
        d = tl.load(p1.to(tl.pointer_type(tl.float16)) + step * 16 + row).to(tl.float32)
        d = d[:, None] * small(sc.to(tl.int32))
        return d, d
    elif KIND == "iq4_xs":
        at = p0 + step * 32 + row * 2
        w0, w1 = tl.load(at), tl.load(at + 1)
        # d, then six bits each: l5, l6 and four of l7 above d; l0 to l4 and two of l7 in the second word
        sc = tl.where(
            (s < 5)[None, :], w1[:, None] >> (6 * tl.minimum(s, 4))[None, :], w0[:, None] >> (tl.maximum(6 * s, 30) - 14)[None, :]
        )
        last = ((w0 >> 26) & 0x3C) | ((w1 >> 30) & 3)
        sc = tl.where((s == 7)[None, :], last[:, None], sc & 63)
        d = (w0 & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        d = d[:, None] * small(sc - 32)
        return d, d
    elif KIND == "eighths2" or KIND == "eighths4":
        sc = (tl.load(p0 + step * 16 + row)[:, None] >> (4 * s)[None, :]) & 15
        d = tl.load(p1.to(tl.pointer_type(tl.float16)) + step * 16 + row).to(tl.float32)
        d = d[:, None] * ((0.5 + small(sc)) * (0.25 if KIND == "eighths2" else 0.5))
        return d, d
    elif KIND == "float64":
        absmax = tl.load(p0.to(tl.pointer_type(tl.float32)) + (step * 32 + row * 2)[:, None] + s[None, :])
        d = absmax * LOWERED
        return d, d
    elif KIND == "nested":
        code = tl.load(p0.to(tl.pointer_type(tl.uint8)) + (step * 32 + row * 2)[:, None] + s[None, :]).to(tl.int32)
        block = tl.minimum(n.to(tl.int64)[:, None] * (K // 64) + chunk * 2 + s[None, :], N.to(tl.int64) * (K // 64) - 1)
        nested = tl.load(p1.to(tl.pointer_type(tl.float32)) + block // 256)
        map = p2.to(tl.pointer_type(tl.float32))
        absmax = tl.load(map + code) * nested + tl.load(map + 256)
        d = tl.minimum(tl.maximum(absmax, -3.4028234e38), 3.4028234e38) * LOWERED
        return d, d
    else:  # e8m0: the exponent of an f32 that is twice the scale; below 2 it is a subnormal
        e = tl.load(p0.to(tl.pointer_type(tl.uint8)) + (step * (16 * S) + row * S)[:, None] + s[None, :]).to(tl.int32)
        d = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
        return d, d


@triton.jit
def grouped(p0, p1, at, s, KIND: tl.constexpr, PER: tl.constexpr):
    """(scale, zero) of integers in groups, PER to a chunk: f32 and i32[BN, PER]; at: i32[BN], a row's first group there."""
    at = at[:, None] * PER + s[None, :]
    if KIND == "f16" or KIND == "f16-z":
        d = tl.load(p0.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
    elif KIND == "bf16" or KIND == "bf16-z":
        d = (tl.load(p0.to(tl.pointer_type(tl.uint16)) + at).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        d = tl.load(p0.to(tl.pointer_type(tl.float32)) + at)
        if KIND == "row":  # an absmax
            d = d * (1.0 / 127)
    if KIND == "f16-z" or KIND == "bf16-z" or KIND == "f32-z":
        return d, tl.load(p1.to(tl.pointer_type(tl.uint8)) + at).to(tl.int32)
    else:
        return d, d
