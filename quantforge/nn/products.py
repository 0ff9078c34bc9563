"""Products of planes with many activations on a GPU: which way, from how many activations on, and the ways themselves.

matvec   kernels/cuda: up to 16 activations at once
fused    triton_kernels: weights become numbers inside the product
slabs    rows of the matrix become numbers a slab at a time, which the L2 keeps until cuBLAS has read it
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch

from .. import codecs
from ..codecs.fp8 import Fp8Codec
from . import ops
from .planes import family
from .tiles import TILE

_log = logging.getLogger(__name__)

WAYS = ("matvec", "fused", "slabs")

HALVES = (torch.bfloat16, torch.float16)

UP_TO = {"": (16, 512)}
"""Kind of planes (or "" for all others) -> the most activations for matvec, and for fused. Not measured yet."""

REPEATED = 32
"""The most activations for which matvec is repeated where there is no fused kernel: to read a matrix twice takes less
than to write its numbers once (16 bits a weight) and to read them. Computed, not measured."""

SLAB = 30 << 20
"""Bytes of a slab: half the L2 of an H100 or H200."""

_forced: ContextVar[str | None] = ContextVar("quantforge_way", default=None)


@contextmanager
def way(name: str) -> Iterator[None]:
    """Every product within takes this way where it can: for tests and benchmarks. QUANTFORGE_GPU_WAY does so for a process."""
    if name not in WAYS:
        raise ValueError(f"way {name!r} is not one of {', '.join(WAYS)}")
    before = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(before)


@cache
def kernels() -> ModuleType | None:
    """The Triton kernels, or None without Triton."""
    try:
        from . import triton_kernels
    except ImportError as e:
        _log.warning("products of quantized weights with many activations: %s; they are decoded first", e)
        return None
    return triton_kernels


def choose(kind: str, m: int, n_in: int, dtype: torch.dtype) -> str:
    """The way of a product with m activations: the forced one if it can, or by `UP_TO`."""
    forced = _forced.get() or os.environ.get("QUANTFORGE_GPU_WAY")
    if forced in WAYS:
        return "slabs" if forced == "fused" and not fusible(kind, n_in, dtype) else forced
    few, some = UP_TO.get(kind) or UP_TO[""]
    if few < m <= some and fusible(kind, n_in, dtype):
        return "fused"
    return "matvec" if m <= few or (m <= REPEATED and dtype in HALVES) else "slabs"


def fusible(kind: str, n_in: int, dtype: torch.dtype) -> bool:
    """True if Triton has the product: of that kind of planes, with activations of that length and dtype, however many."""
    triton = kernels() if dtype in HALVES and n_in % 8 == 0 else None
    return triton is not None and kind in triton.FAMILIES


def fused(x: torch.Tensor, planes: list[torch.Tensor], kind: str, out_features: int) -> torch.Tensor:
    """x wᵀ by Triton: x bf16 or f16 [m, in] -> [m, out_features] of that dtype."""
    triton = kernels()
    assert triton is not None
    y: torch.Tensor = triton.gemm(x, planes, kind, out_features)
    return y


def _rows_of(planes: list[torch.Tensor], codec: str, shape: tuple[int, int]) -> list[int]:
    """Rows of the matrix to an index of each plane's first axis, or 0 where a plane is of the whole matrix.

    A slice of planes is a matrix of its own, unless rows know their number: then, as without anything to cut, none.
    """
    if family(codec) is not None:
        rows = [TILE if p.dim() == 3 else 0 for p in planes]
        return rows if rows[0] and rows.count(0) <= 1 else []
    kind = codecs.get(codec)
    if isinstance(kind, Fp8Codec) and kind.side:
        return [1, kind.side]
    return [0 if name in kind.shared else 1 for name in kind.layout(shape)] if kind.sliceable else []


def numbers(
    planes: list[torch.Tensor], codec: str, shape: tuple[int, int], dtype: torch.dtype, slab: int | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """A matrix as numbers, some rows at a time: which, and [rows, in] of `dtype`. slab: bytes of numbers at a time."""
    (out, k), rows_of = shape, _rows_of(planes, codec, shape)
    tile = max(rows_of, default=1)
    rows = max(1, (slab or SLAB) // (tile * max(1, k) * dtype.itemsize)) * tile
    if rows >= out or not rows_of:
        yield slice(0, out), ops.dequantize(planes, codec, out, k, dtype)
        return
    rows = -(-out // (-(-out // rows) * tile)) * tile  # of one size, but for the last
    for at in range(0, out, rows):
        n = min(rows, out - at)
        some = [p[at // of : -(-(at + n) // of)] if of else p for p, of in zip(planes, rows_of, strict=True)]
        yield slice(at, at + n), ops.dequantize(some, codec, n, k, dtype)


def slabs(x: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, slab: int | None = None) -> torch.Tensor:
    """x wᵀ by cuBLAS: x [m, in] of any float dtype -> [m, out_features] of that dtype. slab: bytes of numbers at a time."""
    (m, k), dtype = x.shape, torch.float32 if x.dtype == torch.float64 else x.dtype
    x, whole = x.to(dtype), x.dtype
    y = torch.empty((m, out_features), dtype=dtype, device=x.device)
    for rows, w in numbers(planes, codec, (out_features, k), dtype, slab):
        torch.mm(x, w.T, out=y[:, rows])
    return y.to(whole)


def backward(grad: torch.Tensor, planes: list[torch.Tensor], codec: str, in_features: int) -> torch.Tensor:
    """grad w by cuBLAS: grad [m, out] of any float dtype -> [m, in_features] of that dtype, summed in f32."""
    (m, out), dtype = grad.shape, torch.float32 if grad.dtype == torch.float64 else grad.dtype
    total = torch.zeros((m, in_features), dtype=torch.float32, device=grad.device)
    for rows, w in numbers(planes, codec, (out, in_features), dtype):
        total += torch.mm(grad[:, rows].to(dtype), w)
    return total.to(grad.dtype)
