"""Weights out of planes, in registers: what each family of codecs stores, and how a tile of it becomes numbers.

Planes are those of quantforge/nn/planes.py: tiles of 16 rows by `chunk` columns; each of four lanes owns `sub`/4
neighbouring columns of every `sub`. Codes pass through one form on their way: words of four codes, a byte each, in
the order of the columns. From there on a weight costs a byte permutation, a multiply-add and half a conversion:
the permutation puts the byte into the mantissa of 2¹⁵ (0x47000000), the multiply-add takes it out again.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter runs the kernels on the CPU: it knows neither libdevice nor products of bf16."""

RAISED = tl.constexpr(32768.0)
MAGIC = 0x47000000  # an argument of the kernel: ptxas would make a constant the permutation's immediate, and load its selector


@dataclass(frozen=True, slots=True)
class Family:
    """What `decode` needs to know of a family of codecs: w = scale·(code − zero), or scale·code − min."""

    chunk: int
    """Columns of a chunk: 128 or 256."""
    widths: tuple[int, ...]
    """Bits of a code in each plane of codes, the lowest first; of an index, and of a sign, where there is a table."""
    scales: str
    """How scales are stored: a case of `scales`."""
    sub: int = 32
    """Columns under one scale."""
    zero: int = 0
    per: int = 0
    """Groups of parameters in a chunk where groups are what `scales` counts (1: of one chunk or more); else 0."""
    tokens: int = 256
    """The most activations of a program: registers end there."""
    table: str = ""
    """What codes stand for where they are no numbers: a case of `levels`."""


FAMILIES = {
    "q4_0": Family(128, (4,), "half", zero=8),
    "q4_1": Family(128, (4,), "half_min"),
    "q5_0": Family(128, (4, 1), "half", zero=16),
    "q5_1": Family(128, (4, 1), "half_min"),
    "q8_0": Family(128, (8,), "half", zero=128),
    "q4_k": Family(256, (4,), "k45", tokens=128),
    "q5_k": Family(256, (4, 1), "k45", tokens=128),
    "q6_k": Family(256, (4, 2), "k6", sub=16, zero=32, tokens=64),
    "iq4_nl": Family(128, (4,), "half", zero=128, table="iq4"),
    "iq4_xs": Family(256, (4,), "iq4_xs", zero=128, tokens=128, table="iq4"),
    "mxfp4": Family(128, (4,), "e8m0", zero=128, table="mxfp4"),
    "nf4": Family(128, (4,), "float64", table="floats"),
    "nf4-dq": Family(128, (4,), "nested", table="floats"),
    "iq3_xxs": Family(256, (2, 1), "eighths4", zero=128, tokens=64, table="iq3"),
    "iq2_xxs": Family(256, (1, 1), "eighths2", zero=128, tokens=64, table="iq2"),
    **{
        f"int{bits}-p{per}-{scale}{z}": Family(128, (bits,), f"{scale}{z}", zero=1 << (bits - 1), per=per)
        for bits in (4, 8)
        for per in (1, 2, 4)
        for scale in ("f16", "bf16", "f32")
        for z in ("", "-z")
        if scale != "f32" or per == 1
    },
    "int8-p1-row": Family(128, (8,), "row", zero=128, per=1),
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
def constant(like, value: tl.constexpr):
    """An i32 tensor of `value`, of like's shape."""
    return tl.full(like.shape, value, tl.int32)


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
    found = tl.reshape(tl.load(at), (2, TILES, 8, 4, V))
    if N > V:
        found = tl.join(found, tl.reshape(tl.load(at + 64 * V), (2, TILES, 8, 4, V)))
        found = tl.reshape(tl.permute(found, (0, 1, 2, 3, 5, 4)), (2, TILES, 8, 4, N))
    return tl.reshape(tl.permute(found, (1, 0, 2, 3, 4)), (BN, 4, N))


@triton.jit
def quad(w, WIDTH: tl.constexpr, M: tl.constexpr):
    """Codes 4M to 4M + 3 of words of fields as bytes."""
    if WIDTH == 8:
        return pick(w, w, constant(w, 0x3120))
    else:
        PER: tl.constexpr = 8 // WIDTH
        MASK: tl.constexpr = 0x01010101 * ((1 << WIDTH) - 1)
        AT: tl.constexpr = 2 * M % PER * WIDTH
        return pick((w >> AT) & MASK, (w >> (AT + WIDTH)) & MASK, constant(w, 0x6420 + 0x1111 * (2 * M // PER)))


@triton.jit
def quads(w, WIDTH: tl.constexpr):
    """Words of fields [BN, 4, N] -> words of four codes, a byte each: [BN, 4, N·8/WIDTH]."""
    if WIDTH == 8:
        found = quad(w, 8, 0)
    elif WIDTH == 4:
        found = tl.join(quad(w, 4, 0), quad(w, 4, 1))
    elif WIDTH == 2:
        found = tl.join(tl.join(quad(w, 2, 0), quad(w, 2, 2)), tl.join(quad(w, 2, 1), quad(w, 2, 3)))
    else:
        even = tl.join(tl.join(quad(w, 1, 0), quad(w, 1, 4)), tl.join(quad(w, 1, 2), quad(w, 1, 6)))
        odd = tl.join(tl.join(quad(w, 1, 1), quad(w, 1, 5)), tl.join(quad(w, 1, 3), quad(w, 1, 7)))
        found = tl.join(even, odd)
    return tl.reshape(found, (w.shape[0], 4, w.shape[2] * (8 // WIDTH)))


@triton.jit
def look_up(w, t0, t1, t2, t3):
    """Words of eight nibbles, the first lowest [BN, 4, N] -> the bytes t[nibble], four to a word: [BN, 4, 2·N].

    t0..t3: the table's sixteen bytes, four to a word.
    """
    high = w >> 16
    low_half = pick(t0, t1, w & 0x7777)
    high_half = pick(t2, t3, w & 0x7777)
    first = pick(low_half, high_half, ((w >> 1) & 0x4444) | 0x3210)
    low_half = pick(t0, t1, high & 0x7777)
    high_half = pick(t2, t3, high & 0x7777)
    second = pick(low_half, high_half, ((high >> 1) & 0x4444) | 0x3210)
    return tl.reshape(tl.join(first, second), (w.shape[0], 4, w.shape[2] * 2))


@triton.jit
def levels(w, TABLE: tl.constexpr):
    """`look_up` in a table of integers by name, raised by 128."""
    if TABLE == "iq4":  # −127 −104 −83 −65 −49 −35 −22 −10 1 13 25 38 53 69 89 113
        found = look_up(
            w, constant(w, 0x3F2D1801), constant(w, 0x766A5D4F), constant(w, 0xA6998D81 - (1 << 32)),
            constant(w, 0xF1D9C5B5 - (1 << 32)),
        )  # fmt: skip
    else:  # mxfp4: 0 1 2 3 4 6 8 12 and their negatives
        found = look_up(
            w, constant(w, 0x83828180 - (1 << 32)), constant(w, 0x8C888684 - (1 << 32)), constant(w, 0x7D7E7F80),
            constant(w, 0x74787A7C),
        )  # fmt: skip
    return found


@triton.jit
def fixed_point(table, FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """A byte of four levels from FIRST on, as 16-bit integers: 32768 + 32767·level. A word."""
    word = 0
    for i in tl.static_range(4):
        # the table's f32 pairs follow those of bf16 and f16, a word each; codes below 16 are pairs of a code and 0
        level = tl.load(table.to(tl.pointer_type(tl.float32)) + 512 + 2 * (FIRST + i))
        word |= (((level * 32767.0 + 32768.5).to(tl.int32) >> SHIFT) & 255) << (8 * i)
    return word


@triton.jit
def fixed_points(table, TABLE: tl.constexpr):
    """What `decode` needs of a table of floats: the low bytes of its sixteen levels, then the high ones, four to a word."""
    if TABLE == "floats":
        low = (fixed_point(table, 0, 0), fixed_point(table, 4, 0), fixed_point(table, 8, 0), fixed_point(table, 12, 0))
        high = (fixed_point(table, 0, 8), fixed_point(table, 4, 8), fixed_point(table, 8, 8), fixed_point(table, 12, 8))
    else:
        low = (0, 0, 0, 0)
        high = (0, 0, 0, 0)
    return low, high


@triton.jit
def grid_bytes(w, table, TABLE: tl.constexpr):
    """Words of four indices [BN, 4, N] -> magnitudes of a codebook's entries, four to a word: [BN, 4, 8·N] or [BN, 4, 4·N].

    table: i32[256] of selectors, a nibble for each number of an entry: which of the few values it is.
    """
    index = tl.join(tl.join(w & 255, (w >> 16) & 255), tl.join((w >> 8) & 255, (w >> 24) & 255))
    index = tl.reshape(index, (w.shape[0], 4, w.shape[2] * 4))
    found = tl.load(table + index)
    if TABLE == "iq2":
        values = constant(found, 0x2B1908)  # 8 25 43
        both = tl.join(pick(values, values, found & 0x3333), pick(values, values, (found >> 16) & 0x3333))
        return tl.reshape(both, (w.shape[0], 4, w.shape[2] * 8))
    else:  # 4 12 20 28 36 44 52 62
        return pick(constant(found, 0x1C140C04), constant(found, 0x3E342C24), found)


@triton.jit
def signed(magnitudes, negative):
    """Bytes 128 ± magnitude; negative: bytes 0 or 1."""
    return ((magnitudes ^ ((negative << 8) - negative)) ^ (0x80808080 - (1 << 32))) + negative


@triton.jit
def byte(w, magic, AT: tl.constexpr):
    """Byte AT of words, as f32 raised by RAISED."""
    return pick(w, tl.full(w.shape, 0, tl.int32) + magic, constant(w, 0x7404 + AT * 16)).to(tl.float32, bitcast=True)


@triton.jit
def number(codes, upper, magic, AT: tl.constexpr, WIDE: tl.constexpr):
    """Code AT of words of bytes as f32, raised: by 2¹⁵, or where a code has an upper byte, by 2²³."""
    if WIDE:
        both = pick(codes, upper, constant(codes, AT + (4 + AT) * 16))
        return ((both & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        return byte(codes, magic, AT)


@triton.jit
def k45(q1, q2, q3, magic, MINS: tl.constexpr):
    """The eight 6-bit scales (or mins) of a Q4_K or Q5_K block's twelve bytes, three words [BN]: f32[BN, 8]."""
    if MINS:
        first = q2 & 0x3F3F3F3F
        last = ((q3 >> 4) & 0x0F0F0F0F) | ((q2 >> 2) & 0x30303030)
    else:
        first = q1 & 0x3F3F3F3F
        last = (q3 & 0x0F0F0F0F) | ((q1 >> 2) & 0x30303030)
    even = tl.join(tl.join(byte(first, magic, 0), byte(last, magic, 0)), tl.join(byte(first, magic, 2), byte(last, magic, 2)))
    odd = tl.join(tl.join(byte(first, magic, 1), byte(last, magic, 1)), tl.join(byte(first, magic, 3), byte(last, magic, 3)))
    return tl.reshape(tl.join(even, odd), (q1.shape[0], 8)) - RAISED


@triton.jit
def scales(
    p0, p1, p2, step, row, n, chunk, N, K, magic, KIND: tl.constexpr, ZERO: tl.constexpr, S: tl.constexpr, BN: tl.constexpr
):
    """(scale, offset) of a chunk's S sub-blocks: f32[BN, S] each; w = scale·code + offset."""
    s = tl.arange(0, S)
    if KIND == "half":
        d = tl.load(p0.to(tl.pointer_type(tl.float16)) + (step * (16 * S) + row * S)[:, None] + s[None, :]).to(tl.float32)
        return d, d * -ZERO
    elif KIND == "half_min":
        both = tl.load(p0 + (step * (16 * S) + row * S)[:, None] + s[None, :])
        d = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return d, ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == "k45":
        at = p0 + step * 64 + row * 4
        both, q1, q2, q3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        d = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        dmin = ((both >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return d[:, None] * k45(q1, q2, q3, magic, 0), -dmin[:, None] * k45(q1, q2, q3, magic, 1)
    elif KIND == "k6":
        sc = tl.load(p0.to(tl.pointer_type(tl.int8)) + (step * 256 + row * 16)[:, None] + s[None, :])
        d = tl.load(p1.to(tl.pointer_type(tl.float16)) + step * 16 + row).to(tl.float32)
        d = d[:, None] * sc.to(tl.float32)
        return d, d * -ZERO
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
        d = d[:, None] * (sc - 32).to(tl.float32)
        return d, d * -ZERO
    elif KIND == "eighths2" or KIND == "eighths4":
        sc = (tl.load(p0 + step * 16 + row)[:, None] >> (4 * s)[None, :]) & 15
        d = tl.load(p1.to(tl.pointer_type(tl.float16)) + step * 16 + row).to(tl.float32)
        d = d[:, None] * ((0.5 + sc.to(tl.float32)) * (0.25 if KIND == "eighths2" else 0.5))
        return d, d * -ZERO
    elif KIND == "float64":
        absmax = tl.load(p0.to(tl.pointer_type(tl.float32)) + (step * 32 + row * 2)[:, None] + (s // 2)[None, :])
        d = absmax * (1.0 / 32767)
        return d, d * -32768.0
    elif KIND == "nested":
        code = tl.load(p0.to(tl.pointer_type(tl.uint8)) + (step * 32 + row * 2)[:, None] + (s // 2)[None, :]).to(tl.int32)
        block = tl.minimum(n.to(tl.int64)[:, None] * (K // 64) + chunk * 2 + (s // 2)[None, :], N.to(tl.int64) * (K // 64) - 1)
        nested = tl.load(p1.to(tl.pointer_type(tl.float32)) + block // 256)
        map = p2.to(tl.pointer_type(tl.float32))
        absmax = tl.load(map + code) * nested + tl.load(map + 256)
        d = tl.minimum(tl.maximum(absmax, -3.4028234e38), 3.4028234e38) * (1.0 / 32767)
        return d, d * -32768.0
    else:  # e8m0: the exponent of an f32 that is twice the scale; below 2 it is a subnormal
        e = tl.load(p0.to(tl.pointer_type(tl.uint8)) + (step * (16 * S) + row * S)[:, None] + s[None, :]).to(tl.int32)
        d = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
        return d, d * -ZERO


@triton.jit
def grouped(p0, p1, at, s, KIND: tl.constexpr, ZERO: tl.constexpr, PER: tl.constexpr):
    """`scales` of integers in groups, PER to a chunk; at: i32[BN], a row's first group there."""
    at = at[:, None] * PER + (s * PER // 4)[None, :]
    if KIND == "f16" or KIND == "f16-z":
        d = tl.load(p0.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
    elif KIND == "bf16" or KIND == "bf16-z":
        d = (tl.load(p0.to(tl.pointer_type(tl.uint16)) + at).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        d = tl.load(p0.to(tl.pointer_type(tl.float32)) + at)
        if KIND == "row":  # an absmax
            d = d * (1.0 / 127)
    if KIND == "f16-z" or KIND == "bf16-z" or KIND == "f32-z":
        return d, d * -tl.load(p1.to(tl.pointer_type(tl.uint8)) + at).to(tl.float32)
    else:
        return d, d * -ZERO


@triton.jit
def decode(
    p0, p1, p2, p3, table, floats, tile, chunk, N, K, groups, magic,
    CHUNK: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SCALES: tl.constexpr, SUB: tl.constexpr,
    ZERO: tl.constexpr, PER: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A chunk of the BN rows from tile `tile` on: DTYPE[BN, CHUNK]."""
    S: tl.constexpr = CHUNK // SUB
    R: tl.constexpr = SUB // 16  # words of four codes that a lane has under a scale
    n = tl.arange(0, BN)
    tiles, chunks = (N + 15) // 16, (K + CHUNK - 1) // CHUNK
    step, row = tl.minimum(tile + n // 16, tiles - 1) * chunks + chunk, n % 16
    n += tile * 16
    w = words(p0, tile, tiles, chunk, chunks, CHUNK * W0 // 128, BN)
    if PER:
        # groups of one chunk or more: `groups` of a row
        group = chunk // ((chunks + groups - 1) // groups)
        at = (tl.minimum(tile + tl.arange(0, BN) // 16, tiles - 1) * groups + group) * 16 + row
        scale, offset = grouped(p1, p2, at, tl.arange(0, S), SCALES, ZERO, PER)
    elif W1:
        high = quads(words(p1, tile, tiles, chunk, chunks, CHUNK * W1 // 128, BN), W1)
        scale, offset = scales(p2, p3, p3, step, row, n, chunk, N, K, magic, SCALES, ZERO, S, BN)
    else:
        scale, offset = scales(p1, p2, p3, step, row, n, chunk, N, K, magic, SCALES, ZERO, S, BN)
    WIDE: tl.constexpr = TABLE == "floats"
    upper = w
    if WIDE:
        low_bytes, high_bytes = floats
        blank = constant(w, 0)
        codes = look_up(w, blank + low_bytes[0], blank + low_bytes[1], blank + low_bytes[2], blank + low_bytes[3])
        upper = look_up(w, blank + high_bytes[0], blank + high_bytes[1], blank + high_bytes[2], blank + high_bytes[3])
        upper = tl.reshape(upper, (BN, 4, S, R))
    elif TABLE == "iq2" or TABLE == "iq3":
        codes = signed(grid_bytes(w, table, TABLE), high)
    elif TABLE != "":
        codes = levels(w, TABLE)
    elif W1:
        codes = quads(w, W0) | (high << W0)
    else:
        codes = quads(w, W0)
    offset -= scale * (8388608.0 if WIDE else RAISED)
    scale, offset = scale[:, None, :, None], offset[:, None, :, None]
    codes = tl.reshape(codes, (BN, 4, S, R))
    first = rounded(number(codes, upper, magic, 0, WIDE) * scale + offset, DTYPE)
    second = rounded(number(codes, upper, magic, 1, WIDE) * scale + offset, DTYPE)
    third = rounded(number(codes, upper, magic, 2, WIDE) * scale + offset, DTYPE)
    fourth = rounded(number(codes, upper, magic, 3, WIDE) * scale + offset, DTYPE)
    w = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(w, (0, 2, 1, 3, 4, 5)), (BN, CHUNK))
