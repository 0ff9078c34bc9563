"""GPTQ on a device: a decoder block's matrices, in the widths of models of 1 and 8 B; and a whole model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import quantforge as qf
from quantforge import codecs
from quantforge.conversion.moments import Moments
from quantforge.methods import GPTQ, gptq

from . import harness

Found = dict[str, Any]

CODECS = ("int4-g128-sym", "Q4_K", "Q4_0")

WIDTHS = {"1 B": (2048, 512, 5632, 24), "8 B": (4096, 1024, 14336, 32)}
"""Model -> hidden size, rows of keys and values, feed-forward size, blocks."""

TOKENS = 128 * 512
"""Of calibration: what `convert --method gptq` takes by default."""


def matrices(hidden: int, kv: int, wide: int) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of what is quantized together, because it shares an input."""
    return [("q k v", hidden + 2 * kv, hidden), ("o", hidden, hidden), ("gate up", 2 * wide, hidden), ("down", hidden, wide)]


def inputs(tokens: int, n: int, device: torch.device) -> torch.Tensor:
    """f32[tokens, n], of columns that are alike in places: a Hessian that is not diagonal."""
    g = torch.Generator(device).manual_seed(n)
    few = torch.randn((tokens, n // 8), device=device, generator=g)
    return torch.randn((tokens, n), device=device, generator=g) + few.repeat(1, 8)


def blocks(device: str, smoke: bool) -> Iterator[Found]:
    """Seconds of a block: its Hessians' sums, and of each codec the factors, the loops over columns and the fits in them."""
    here = harness.of(device)
    tokens, batch = (64, 64) if smoke else (TOKENS, 8192)
    for model, (hidden, kv, wide, layers) in {"tiny": (256, 256, 256, 1)}.items() if smoke else WIDTHS.items():
        sums, stats = 0.0, {}
        for name, _, n in matrices(hidden, kv, wide):
            x, moments = inputs(batch, n, here), Moments(GPTQ().needs)
            stray = x + 0.01 * torch.randn_like(x)
            nobody = torch.zeros(batch, dtype=torch.bool)
            moments.add(x, stray, nobody)  # libraries load what they need
            harness.synchronize(here)
            began = time.perf_counter()
            for _ in range(tokens // batch):
                moments.add(x, stray, nobody)
            harness.synchronize(here)
            sums += time.perf_counter() - began
            found = moments.choosing.stats()
            assert found is not None
            stats[name] = (found.hessian, found.shift)
        yield {"what": "hessians", "model": model, "tokens": tokens, "seconds": sums}
        for codec in CODECS:
            grid, seconds = codecs.get(codec), {}
            assert isinstance(grid, codecs.GridCodec)
            for name, rows, n in matrices(hidden, kv, wide):
                w = torch.randn((rows, n), device=here) * 0.02
                if not seconds:
                    gptq(w[:64, : min(n, 512)], grid, stats[name][0][:512, :512])
                harness.synchronize(here)
                began = time.perf_counter()
                gptq(w, grid, *stats[name])
                harness.synchronize(here)
                seconds[name] = time.perf_counter() - began
            block = sum(seconds.values())
            yield {
                "what": "gptq",
                "model": model,
                "codec": codec,
                "seconds": block,
                "of": seconds,
                "model_s": layers * (block + sums),
            }


def whole(work: str, device: str, smoke: bool) -> Iterator[Found]:
    """`convert --method gptq` of the random model, text and all."""
    out, chunks = Path(work) / "gptq", 4 if smoke else 32
    began = time.perf_counter()
    qf.convert(
        Path(work) / "bf16", out, format="gptq", bits=4, group_size=128, method="gptq", device=device, force=True,
        calibration_chunks=chunks, calibration_ctx=64 if smoke else 512,
    )  # fmt: skip
    yield {"what": "convert", "model": "gptq", "seconds": time.perf_counter() - began, "windows": chunks}
