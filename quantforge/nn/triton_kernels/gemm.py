# mypy: ignore-errors
"""y = x wᵀ for 8 < M <= 256: weights become exact numbers in registers, tensor cores multiply them with x from shared memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import INTERPRETED, codes, column, grouped, operand, order, patterns, rounded, scaled, scales, words

RANGE = tl.constexpr(8.0)
"""Weights times this are f16: from 10⁻⁶ to 8000, with 11 bits."""


@triton.jit
def product(a, b, acc):
    """acc + a b, in f32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def prepare_kernel(x, y, factor, K, x_stride, y_stride, SUB: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x in f16, scaled by a power of two that brings its largest number to 2¹⁴ and more: a number of bf16 that is
    not 2³¹ times smaller stays as it is. Columns in the order of `order`, zeros beyond K. factor: f32[M], takes it back.
    """
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    x += row.to(tl.int64) * x_stride
    y += row.to(tl.int64) * y_stride
    most = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, K, BLOCK):
        most = tl.maximum(most, tl.abs(tl.load(x + at + k, mask=k < K - at, other=0.0).to(tl.float32)))
    exponent = tl.maximum(tl.max(most, 0).to(tl.int32, bitcast=True) >> 23, 16)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(factor + row, ((exponent - 14) << 23).to(tl.float32, bitcast=True))
    where = order(SUB, BLOCK)
    for at in range(0, y_stride, BLOCK):
        v = tl.load(x + at + where, mask=where < K - at, other=0.0).to(tl.float32) * up
        tl.store(y + at + k, v.to(tl.float16), mask=k < y_stride - at)


@triton.jit(do_not_specialize=["M", "groups"])
def gemm_kernel(
    x, factor, p0, p1, p2, p3, table, y, partial, arrived, M, N, K, groups, x_stride,
    CHUNK: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SCALES: tl.constexpr, SUB: tl.constexpr, SPAN: tl.constexpr,
    UNIT: tl.constexpr, ZERO: tl.constexpr, LESS: tl.constexpr, ZEROS: tl.constexpr, MINS: tl.constexpr, PER: tl.constexpr,
    TABLE: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program computes BN rows of w by BM rows of x over every SPLIT-th chunk of columns.

    Columns under one scale are a product of their own, of exact codes with x; scales enter the sums in f32. Mins are 16
    columns more, or 32: each group's as two bf16, for x's sum over the group. x_stride: in eights.
    SCALED: scales and mins enter the codes, in f16; x is what `prepare_kernel` makes of it, and factor takes it back.
    The last of SPLIT programs to arrive adds their results, in their order: the same bits in every run.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    GROUPS: tl.constexpr = CHUNK // SPAN
    MINS_COLUMNS: tl.constexpr = 32 if GROUPS == 16 else 16
    at_n, at_m, parted = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, BN)
    m = at_m * BM + tl.arange(0, BM)
    tile, tiles, chunks = at_n * (BN // 16), (N + 15) // 16, (K + CHUNK - 1) // CHUNK
    k = tl.arange(0, SPAN) if SCALED else order(SUB, SPAN)
    inside = m[None, :] < M
    # rows beyond the last are computed like it, and not stored
    x_at = x + tl.minimum(m, M - 1)[None, :].to(tl.int64) * (x_stride * 8) + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    levels = patterns(table, TABLE, DTYPE)
    tile_of, row = tl.minimum(tile + n // 16, tiles - 1), n % 16
    n += at_n * BN
    s = tl.arange(0, GROUPS)
    for c in tl.range(parted, chunks, SPLIT, num_stages=STAGES):
        w = words(p0, tile, tiles, c, chunks, CHUNK * W0 // 128, BN)
        high = w
        step = tile_of * chunks + c
        if PER:
            # groups of one chunk or more: `groups` of a row
            scale, offset = grouped(
                p1, p2, (tile_of * groups + c // ((chunks + groups - 1) // groups)) * 16 + row, s, SCALES, PER
            )
        elif W1:
            high = words(p1, tile, tiles, c, chunks, CHUNK * W1 // 128, BN)
            scale, offset = scales(p2, p3, p3, step, row, n, c, N, K, SCALES, GROUPS, BN)
        else:
            scale, offset = scales(p1, p2, p3, step, row, n, c, N, K, SCALES, GROUPS, BN)
        if MINS and SCALED:
            offset += scale * ZERO
        sums = tl.zeros((MINS_COLUMNS, BM), tl.float32)
        for g in tl.static_range(GROUPS):
            at = c * CHUNK + g * SPAN
            xs = tl.load(x_at + at) if EVEN else tl.load(x_at + at, mask=k[:, None] < K - at, other=0.0)
            zero = column(offset, g, GROUPS) if ZEROS else row
            pairs = codes(w, high, zero, table, levels, g, W0, W1, SUB, SPAN, LESS, ZEROS, TABLE, DTYPE)
            if SCALED:
                pairs = scaled(pairs, column(scale, g, GROUPS) * (RANGE / UNIT), column(offset, g, GROUPS) * RANGE, MINS)
                acc = product(operand(pairs, DTYPE), xs, acc)
            else:
                t = product(operand(pairs, DTYPE), xs, tl.zeros((BN, BM), tl.float32))
                acc += column(scale, g, GROUPS)[:, None] * t
            if MINS and not SCALED:
                ones = (tl.arange(0, MINS_COLUMNS) % GROUPS == g)[:, None] & (k >= 0)[None, :]
                sums = product((ones.to(tl.float32) * UNIT).to(DTYPE), xs, sums)
        if MINS and not SCALED:
            first = rounded(offset, tl.bfloat16)
            second = rounded(offset - first.to(tl.float32), tl.bfloat16)
            both = tl.permute(tl.join(first, second), (0, 2, 1))
            if GROUPS == 4:
                both = tl.permute(tl.join(both, tl.zeros_like(both)), (0, 3, 1, 2))
            mins = tl.reshape(both, (BN, MINS_COLUMNS))
            first = rounded(sums, tl.bfloat16)
            acc = product(mins, first, acc)
            acc = product(mins, rounded(sums - first.to(tl.float32), tl.bfloat16), acc)
    if SCALED:
        acc *= tl.load(factor + tl.minimum(m, M - 1))[None, :] * (1.0 / RANGE)
    else:
        acc *= 1.0 / UNIT
    stored = inside & (n[:, None] < N)
    out = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT == 1:
        tl.store(y + out, rounded(acc, y.dtype.element_ty), mask=stored)
    else:
        tile = at_m * tl.num_programs(0) + at_n
        block = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        mine = partial + tile.to(tl.int64) * (SPLIT * BN * BM) + block
        tl.store(mine + parted * (BN * BM), acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLIT):
                acc += tl.load(mine + i * (BN * BM), cache_modifier=".cg")
            tl.store(y + out, rounded(acc, y.dtype.element_ty), mask=stored)
            tl.store(arrived + tile, 0)
