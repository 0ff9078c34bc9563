"""y = x wᵀ for 8 < M <= 256: weights become numbers in registers, tensor cores multiply them with x from shared memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import INTERPRETED, decode, fixed_points, rounded


@triton.jit(do_not_specialize=["M", "groups", "magic"])
def gemm_kernel(
    x, p0, p1, p2, p3, table, y, partial, arrived, M, N, K, groups, x_stride, magic,
    CHUNK: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, SCALES: tl.constexpr, SUB: tl.constexpr,
    ZERO: tl.constexpr, PER: tl.constexpr, TABLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A program computes BN rows of w by BM rows of x over every SPLIT-th chunk of columns.

    The last of SPLIT programs to arrive adds their results, in their order: the same bits in every run.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    at_n, at_m, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = at_n * BN + tl.arange(0, BN)
    m = at_m * BM + tl.arange(0, BM)
    chunks = (K + CHUNK - 1) // CHUNK
    k = tl.arange(0, CHUNK)
    inside = m[None, :] < M
    x_at = x + m[None, :].to(tl.int64) * x_stride + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    floats = fixed_points(table, TABLE)
    for c in range(part, chunks, SPLIT):
        w = decode(
            p0,
            p1,
            p2,
            p3,
            table,
            floats,
            at_n * (BN // 16),
            c,
            N,
            K,
            groups,
            magic,
            CHUNK,
            W0,
            W1,
            SCALES,
            SUB,
            ZERO,
            PER,
            TABLE,
            BN,
            DTYPE,
        )
        xs = tl.load(x_at + c * CHUNK, mask=inside & (k[:, None] < K - c * CHUNK), other=0.0)
        if INTERPRETED:  # noqa: SIM108
            acc = tl.dot(w.to(tl.float32), xs.to(tl.float32), acc)
        else:
            acc = tl.dot(w, xs, acc)
    stored = inside & (n[:, None] < N)
    out = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT == 1:
        tl.store(y + out, rounded(acc, DTYPE), mask=stored)
    else:
        tile = at_m * tl.num_programs(0) + at_n
        block = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        mine = partial + tile.to(tl.int64) * (SPLIT * BN * BM) + block
        tl.store(mine + part * (BN * BM), acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1:
            acc = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLIT):
                acc += tl.load(mine + i * (BN * BM), cache_modifier=".cg")
            tl.store(y + out, rounded(acc, DTYPE), mask=stored)
            tl.store(arrived + tile, 0)
