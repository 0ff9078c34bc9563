"""How a product is cut into programs, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np
import torch
import triton

from .decode import FAMILIES, UNIT, Decoding
from .gemm import gemm_kernel, prepare_kernel


@dataclass(frozen=True, slots=True)
class Config:
    """How a product is cut into programs."""

    tokens: int
    """Rows of x to a program: a power of two from 16 on."""
    rows: int
    """Rows of w to a program: a multiple of 64, for the tensor cores' 64-row operand."""
    split: int
    """Programs that share a tile's columns."""
    warps: int
    stages: int
    """Chunks under way."""


SHARED = 220 * 1024
"""Bytes of shared memory that a program may take on an H100 or H200."""


def _fits(f: Decoding, tokens: int, rows: int, stages: int, shared: int) -> bool:
    codes = rows * f.chunk * (sum(f.widths) + 1) // 8
    # activations wait one stage longer than codes
    return stages * (tokens * f.chunk * 2 + codes) + 8 * 1024 <= shared


@cache
def candidates(kind: str, m: int, n: int, k: int, shared: int = SHARED) -> tuple[Config, ...]:
    """Configurations worth timing: at most a dozen."""
    return tuple(_candidates(FAMILIES[kind], m, -(-k // FAMILIES[kind].chunk), shared))


def _candidates(f: Decoding, m: int, chunks: int, shared: int) -> Iterator[Config]:
    tokens = min(max(16, 1 << (m - 1).bit_length()), 128)
    for rows, warps in ((64, 4), (128, 8)):
        stages = next((s for s in (4, 3, 2) if _fits(f, tokens, rows, s, shared)), 1)
        for split in (1, 2, 4, 8):
            if split == 1 or chunks >= 4 * split:
                yield Config(tokens, rows, split, warps, stages)


@cache
def choose(kind: str, m: int, n: int, k: int, multiprocessors: int = 132, shared: int = SHARED) -> Config:
    """The candidate that should fill the multiprocessors best. Not measured yet."""

    def cost(c: Config) -> float:
        programs = -(-n // c.rows) * -(-m // c.tokens) * c.split
        at_once = multiprocessors * (2 if c.tokens <= 32 and c.warps == 4 else 1)
        # rounds of programs, each a share of the columns; every share is written, and read again
        work = -(-programs // at_once) * at_once * c.rows / (n * c.split)
        return work * (1 + 0.04 * (c.split - 1) * c.tokens / 64) + 0.2 * m * c.tokens / (c.rows * 128)

    return min(candidates(kind, m, n, k, shared), key=cost)


def _lasting(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """A tensor that outlives the call. Made by a thread of its own: what this one allocates may be a CUDA graph's memory
    (in the first run of a step that torch.compile is going to capture), which may not be kept.
    """

    def made() -> torch.Tensor:
        with torch.cuda.device(device):
            tensor = make()
            torch.cuda.current_stream().synchronize()
            return tensor

    if device.type != "cuda":
        return make()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


_counters: dict[tuple[int | None, int], torch.Tensor] = {}
_reserves: dict[int | None, list[torch.Tensor]] = {}
RESERVE = 1 << 20


def _arrived(n: int, device: torch.device) -> torch.Tensor:
    """n zeros that nobody else counts with. A kernel leaves them as it found them.

    One array serves all products on a stream, where they follow each other. Captured ones may be replayed side by side:
    each keeps some of a reserve.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    reserve = _reserves.get(device.index)
    if torch.cuda.is_current_stream_capturing():
        if reserve and reserve[0].numel() >= n:
            taken, reserve[0] = reserve[0][:n], reserve[0][n:]
            return taken
        return torch.zeros(n, dtype=torch.int32, device=device)
    if not reserve:
        _reserves[device.index] = [_lasting(lambda: torch.zeros(RESERVE, dtype=torch.int32, device=device), device)]
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters or _counters[key].numel() < n:
        _counters[key] = _lasting(lambda: torch.zeros(max(n, 4096), dtype=torch.int32, device=device), device)
        _counters[key].record_stream(torch.cuda.current_stream(device))  # it was made on another
    return _counters[key]


_CODEBOOKS = {"iq2": (gguf.quants.IQ2_XXS, (8, 25, 43)), "iq3": (gguf.quants.IQ3_XXS, (4, 12, 20, 28, 36, 44, 52, 62))}
"""Entries, and the few values that they are made of."""


@cache
def _selectors(name: str, device: torch.device) -> torch.Tensor:
    """i32[256] for `grid_bytes`: a nibble for each number of an entry, which of the values it is."""
    kind, values = _CODEBOOKS[name]
    kind.init_grid()  # type: ignore[no-untyped-call]
    numbers = torch.from_numpy(np.asarray(kind.grid, np.float32).reshape(256, -1))
    which = (numbers.unsqueeze(-1) == torch.tensor(values)).int().argmax(-1)
    words = (which << 4 * torch.arange(which.shape[1])).sum(1).to(torch.int32)
    return _lasting(lambda: words.to(device), device)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory for a program)."""
    if device.type != "cuda":
        return 132, SHARED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, int(getattr(properties, "shared_memory_per_block_optin", SHARED)) - 7 * 1024


def forget() -> None:
    """Take back the counters of captured products: their graphs are gone."""
    _reserves.clear()


def default(device: torch.device, kind: str, m: int, n: int, k: int) -> Config:
    """`choose` for a device."""
    return choose(kind, m, n, k, *_device(device))


def is_scaled(f: Decoding, c: Config) -> bool:
    """Whether a product's weights are scaled, as f16, before they are multiplied, and not the sums."""
    return c.tokens > f.exact


def constants(f: Decoding, c: Config, dtype: torch.dtype, even: bool = True) -> dict[str, int | float | str]:
    """The kernel's constants. dtype: of the x that it gets; even: columns fill the last chunk."""
    unit = UNIT[dtype] if f.table in ("", *_CODEBOOKS) else 1.0
    zero = f.zero if not f.mins or is_scaled(f, c) else 0
    less = torch.tensor([-zero * unit] * 2).to(dtype).view(torch.int32).item()
    low, high = (*f.widths, 0)[:2]
    return {
        "CHUNK": f.chunk, "W0": low, "W1": high, "SCALES": f.scales, "SUB": f.sub, "SPAN": f.span, "UNIT": unit, "ZERO": zero,
        "LESS": less, "ZEROS": f.scales.endswith("-z"), "MINS": f.mins, "PER": f.per, "TABLE": f.table, "EVEN": even,
        "SCALED": is_scaled(f, c), "BM": c.tokens, "BN": c.rows, "SPLIT": c.split, "STAGES": c.stages,
    }  # fmt: skip


def _prepared(x: torch.Tensor, f: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, in] as products of scaled weights want it: f16 [m, whole chunks], and f32[m]."""
    m, k = x.shape
    halves = torch.empty((m, -(-k // f.chunk) * f.chunk), dtype=torch.float16, device=x.device)
    factor = torch.empty(m, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        prepare_kernel[(m,)](x, halves, factor, k, x.stride(0), halves.stride(0), SUB=f.sub, BLOCK=4096, num_warps=8)
    return halves, factor


def gemm(
    x: torch.Tensor, planes: Sequence[torch.Tensor], kind: str, out_features: int, config: Config | None = None
) -> torch.Tensor:
    """x wᵀ for a matrix in planes of `kind`: x bf16 or f16 [m, in], in a multiple of 8 -> [m, out_features] of x's dtype.

    Up to `Decoding.exact` activations weights are exact codes (NF4's levels rounded), beyond that f16; sums are f32. On the
    current stream; deterministic.
    """
    family, (m, k) = FAMILIES[kind], x.shape
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous() if not x.is_contiguous() else x.clone()
    c = config or default(x.device, kind, m, out_features, k)
    y = torch.empty((m, out_features), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_features, c.rows), triton.cdiv(m, c.tokens), c.split)
    if not m or not out_features:
        return y
    factor, even = y, k % family.chunk == 0
    if is_scaled(family, c):
        x, factor = _prepared(x, family)
        even = True
    words = [p.view(torch.int32) for p in planes]
    table = words.pop() if family.table else words[0]
    if family.table in _CODEBOOKS:
        table = _selectors(family.table, x.device)
    words += [words[0]] * (4 - len(words))
    tiles = grid[0] * grid[1]
    if c.split > 1:
        partial = torch.empty(tiles * c.split * c.rows * c.tokens, dtype=torch.float32, device=x.device)
        arrived = _arrived(tiles, x.device)
    else:
        partial = arrived = words[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        gemm_kernel[grid](
            x, factor, *words, table, y, partial, arrived, m, out_features, k, planes[1].shape[1], x.stride(0) // 8,
            **constants(family, c, x.dtype, even), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return y
