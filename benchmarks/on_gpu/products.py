"""Our products, by codec, shape and way."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from multiprocessing import get_context

import numpy as np
import torch

from quantforge import codecs
from quantforge.nn import ops, planes, products
from quantforge.nn.base import tensor

from . import harness
from .harness import BLOCK
from .run import Row

SLABS = (15, 30, 60, 120, 1000)
"""MiB, for tuning."""

MOST = {"matvec": 64, "fused": 1024, "slabs": 1 << 30}
"""Way -> the largest M that it is worth timing with."""


def matrices(codec: str, n: int, k: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Copies of one matrix as the operators take it, together COLD bytes."""
    if not harness.gpu(device):
        e = codecs.quantize(np.tile(harness.noise(BLOCK, k), (n // BLOCK, 1)), codec)
        return [[tensor(p) for p in e.parts.values()]] * 2
    packed = list(planes.pack(harness.block(codec, k)).tensors.values())
    whole = [p.to(device) if p.dim() < 3 else p.to(device).repeat(n // BLOCK, 1, 1) for p in packed]
    size = sum(p.nbytes for p in whole if p.dim() == 3)
    return [[p.clone() if p.dim() == 3 else p for p in whole] for _ in range(harness.copies_of(size, device))]


def rows(codec: str, n: int, k: int, ms: list[int], device: str, ways: bool = False, tune: bool = False) -> Iterator[Row]:
    """Times of one codec and shape: the way that is taken; `ways`: every other; `tune`: every configuration."""
    here = harness.of(device)
    copies = matrices(codec, n, k, here)
    kernels = products.kernels()
    kind, nbytes = planes.kind(codec), math.ceil(codecs.get(codec).nbytes((n, k)))
    for m in ms:
        x = harness.activations(m, k, here)

        def timed(way: str, call: Callable[[list[torch.Tensor]], torch.Tensor], config: str = "", m: int = m) -> Row:
            if kernels is not None:
                kernels.forget()  # the last graph is gone
            error = harness.relative_error(call(copies[-1]), codec, k)
            us = harness.microseconds([lambda p=p: call(p) for p in copies], here)
            return Row(codec, n, k, m, us, nbytes, error, way, config)

        def linear(p: list[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
            return ops.linear(x, p, codec, n, k)

        chosen = products.choose(kind, m, k, x.dtype) if harness.gpu(here) else "cpu"
        yield timed(chosen, linear)
        if not harness.gpu(here):
            continue
        for way in products.WAYS if ways else ():
            if way != chosen and m <= MOST[way]:
                with products.way(way):
                    if products.choose(kind, m, k, x.dtype) == way:
                        yield timed(way, linear)
        if tune:
            if kernels is not None and kind in kernels.FAMILIES and 8 < m <= MOST["fused"]:
                for config in kernels.candidates(kind, m, n, k):
                    yield timed("fused", lambda p, c=config, x=x, gemm=kernels.gemm: gemm(x, p, kind, n, c), str(config))
            if m > 128:
                for slab in SLABS:
                    yield timed("slabs", lambda p, s=slab, x=x: products.slabs(x, p, codec, n, s << 20), f"{slab} MiB")


def _compile(codec: str, kind: str, k: int, config: tuple[int, ...]) -> str:
    """Compile one Triton kernel into Triton's cache, in a process of its own. Returns what went wrong."""
    try:
        kernels = products.kernels()
        assert kernels is not None
        p = [t.cuda() for t in planes.pack(codecs.quantize(harness.noise(16, k), codec)).tensors.values()]
        c = kernels.Config(*config)
        w = [t.repeat(16, 1, 1) if t.dim() == 3 else t for t in p]
        kernels.gemm(torch.zeros((c.tokens, k), device="cuda", dtype=torch.bfloat16), w, kind, 256, c)
        torch.cuda.synchronize()
    except Exception as e:  # told, and met again where it matters
        return f"{codec} {config}: {str(e)[:200]}"
    return ""


def triton_jobs(
    names: list[str], shapes: list[tuple[int, int]], ms: list[int], device: torch.device, ways: bool, tune: bool
) -> set[tuple[str, str, int, tuple[int, ...]]]:
    """(codec, kind, columns, configuration) of every Triton kernel of a plan."""
    kernels, jobs = products.kernels(), set()
    for codec in names if kernels is not None else ():
        kind = planes.kind(codec)
        for m in ms:
            if kind in kernels.FAMILIES and (ways or tune or products.choose(kind, m, 4096, torch.bfloat16) == "fused"):
                for n, k in shapes if 8 < m <= MOST["fused"] else ():
                    chunk = kernels.FAMILIES[kind].chunk
                    few = chunk * (8 if k // chunk % 16 else 16)  # Triton's code depends on what 16 divides
                    found = {kernels.default(device, kind, m, n, k), *(kernels.candidates(kind, m, n, k) if tune else ())}
                    jobs |= {(codec, kind, few, astuple(c)) for c in found}
    return jobs


def compile_all(
    names: list[str], shapes: list[tuple[int, int]], ms: list[int], device: str, ways: bool, tune: bool
) -> Iterator[str]:
    """Compile them on all cores: one at a time they take seconds each. Yields how many there are, and complaints."""
    jobs = triton_jobs(names, shapes, ms, harness.of(device), ways, tune)
    yield f"{len(jobs)} Triton kernels"
    if jobs:
        with ProcessPoolExecutor(min(len(jobs), max(1, (os.cpu_count() or 2) - 1)), get_context("spawn")) as pool:
            yield from pool.map(_compile, *zip(*sorted(jobs), strict=True))
