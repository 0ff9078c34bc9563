"""How a product is timed, and what it is compared with.

A time is the median of replays of a CUDA graph that multiplies one input with copies of a matrix in turn, 512 MB or more
of them: no weight is in the L2. Activations are bf16. Errors are against float64.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

import quantforge as qf
from quantforge import codecs, native
from quantforge.nn import products

from .run import Limits

BLOCK = 256
"""Rows that are quantized; a matrix is many copies of them."""

COLD = 512 << 20
"""Bytes of copies of a matrix."""

Call = Callable[[torch.Tensor], torch.Tensor]
"""A product with activations: bf16[m, k] -> [m, n]."""


def of(device: str) -> torch.device:
    """The device, or SystemExit's reason why there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device here; --device cpu --smoke runs the same code")
    return torch.device("cuda", 0) if device == "cuda" else torch.device(device)


def gpu(device: torch.device) -> bool:
    """Whether products are the GPU's; a test says so of the CPU."""
    return device.type == "cuda"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def microseconds(calls: list[Callable[[], Any]], device: torch.device, budget: float = 0.15) -> float:
    """Median time of one call, in microseconds: all calls in turn, as a CUDA graph where there is one."""
    for call in (calls[0], calls[-1]):
        call()
    synchronize(device)
    if device.type != "cuda":
        return 1e6 * statistics.median(clocked(calls) for _ in range(3)) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    synchronize(device)
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    found: list[float] = []
    spent = 0.0
    while len(found) < 5 or (spent < 1e3 * budget and len(found) < 50):
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended))
        spent += found[-1]
    return 1e3 * statistics.median(found) / len(calls)


def clocked(calls: list[Callable[[], Any]]) -> float:
    """Seconds that the calls take, one after another."""
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


# ---- numbers


@cache
def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """f32[rows, columns] that bf16 holds exactly: every library gets the same numbers."""
    w = torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32))
    return w.bfloat16().float().numpy()


@cache
def block(codec: str, columns: int) -> codecs.Encoded:
    """BLOCK rows, quantized."""
    return codecs.quantize(noise(BLOCK, columns), codec, threads=os.cpu_count() or 1)


@cache
def activations(m: int, columns: int, device: torch.device) -> torch.Tensor:
    """bf16[m, columns]."""
    return torch.randn((m, columns), generator=torch.Generator().manual_seed(m)).to(device, torch.bfloat16)


@cache
def exact(codec: str, m: int, columns: int, device: torch.device) -> torch.Tensor:
    """The product with BLOCK rows, in float64; codec "": with the numbers themselves."""
    w = torch.from_numpy(np.ascontiguousarray(block(codec, columns).decode() if codec else noise(BLOCK, columns)))
    return activations(m, columns, device).double() @ w.to(device).double().T


def relative_error(y: torch.Tensor, codec: str, columns: int) -> float:
    """Of a product whose rows of weights are the BLOCK ones again and again; the last ones count, too."""
    reference = exact(codec, y.shape[0], columns, y.device)
    found = [float((part.double() - reference).norm() / reference.norm()) for part in (y[:, :BLOCK], y[:, -BLOCK:])]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many copies of a matrix make COLD bytes."""
    return max(2, math.ceil(COLD / nbytes)) if gpu(device) else 2


# ---- the machine


def machine(device: str) -> Iterator[dict[str, Any]]:
    """What it is."""
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "quantforge": qf.__version__}
    if of(device).type == "cuda":
        p = torch.cuda.get_device_properties(0)
        kernels = products.kernels()
        found |= {"device": p.name, "multiprocessors": p.multi_processor_count, "l2": getattr(p, "L2_cache_size", 0)}
        found |= {"cuda": torch.version.cuda, "triton": sys.modules["triton"].__version__ if kernels else None}
        found |= {"kernels": native.cuda_missing() or "built"}
    else:
        found |= {"device": "CPU", "isa": native.isa()}
    yield found


def limits(device: str, smoke: bool) -> Iterator[Limits]:
    """What it can do at most."""
    here = of(device)
    size, side = (1 << 20, 128) if smoke else (2 << 30, 8192)
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=here)
    b = torch.empty_like(a)
    copy = 2 * size / microseconds([lambda: b.copy_(a)] * 2, here) / 1e3
    x, y = (torch.randn(side, side, device=here).bfloat16() for _ in range(2))
    gemm = 2 * side**3 / microseconds([lambda: torch.mm(x, y)] * 2, here) / 1e6
    least = torch.zeros(1, device=here)
    launch = microseconds([lambda: least.add_(1)] * 200, here)
    issue = 0.0
    if here.type == "cuda":
        p = torch.cuda.get_device_properties(here)
        clock = getattr(p, "clock_rate", 1_980_000) * 1e3  # kHz; an H200's highest, where torch does not say
        issue = p.multi_processor_count * 4 * 32 * clock / 1e12
    yield Limits(copy, gemm, launch, issue)
