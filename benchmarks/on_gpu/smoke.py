"""Whether the GPU part works at all, in seconds: what is loaded, a product, an encoding, a CUDA graph, a Triton kernel.

    python -m benchmarks.on_gpu.smoke [--device cpu] [--json FILE] [--only product] [--codecs Q4_0,IQ2_XXS]

A line for each check; the first that fails ends it with exit status 1 and says why. Small enough for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import quantforge as qf
from benchmarks.on_gpu import harness
from quantforge import codecs, native
from quantforge.nn import QuantLinear, cuda, products

ROWS, COLUMNS = 100, 1280  # neither whole tiles nor, of every family, an even number of chunks
FEW = (1, 8, 16)
BOUND = 2e-3


def load(device: torch.device, names: list[str]) -> str:
    """The libraries, of this version's ABI, and the device."""
    if device.type != "cuda":
        return f"CPU ({native.isa()})"
    if missing := native.cuda_missing():
        raise RuntimeError(missing)
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, sm_{p.major}{p.minor}, torch {torch.__version__}"


def matrix(name: str) -> codecs.Encoded:
    w = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return codecs.quantize(w, name, importance=np.ones(COLUMNS, np.float32))


def layer(name: str, device: torch.device) -> tuple[QuantLinear, torch.Tensor]:
    """A layer on the device, and its numbers: f64[ROWS, COLUMNS] on the CPU."""
    e = matrix(name)
    return QuantLinear.from_encoded(e).to(device), torch.from_numpy(e.decode()).double()


def inputs(m: int, device: torch.device) -> torch.Tensor:
    return torch.randn((m, COLUMNS), generator=torch.Generator().manual_seed(m)).bfloat16().to(device)


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    exact = x.cpu().double() @ w.T
    found = float((y.cpu().double() - exact).norm() / exact.norm())
    if not found <= BOUND:
        raise RuntimeError(f"error {found:.2g} of the norm, {BOUND} allowed")
    return found


def product(device: torch.device, names: list[str]) -> str:
    """Products with 1, 8 and 16 activations against float64."""
    worst = 0.0
    for name in names:
        there, w = layer(name, device)
        worst = max(worst, *(error(there(x), x, w) for x in (inputs(m, device) for m in FEW)))
    return f"{', '.join(names)}: error {worst:.2g}"


def encode(device: torch.device, names: list[str]) -> str:
    """Bytes against the CPU's."""
    w = torch.randn((64, 1024), generator=torch.Generator().manual_seed(0))
    for name in names:
        q = np.ones(1024, np.float32)
        if qf.quantize(w.to(device), name, importance=q).tobytes() != codecs.quantize(w.numpy(), name, importance=q).tobytes():
            raise RuntimeError(f"{name}: not the CPU's bytes")
    return f"{', '.join(names)}: the CPU's bytes"


def graph(device: torch.device, names: list[str]) -> str:
    """A captured product, replayed with another input."""
    there, w = layer(names[0], device)
    x = inputs(1, device)
    there(x)
    if device.type != "cuda":
        return "no graphs"
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = there(x)
    x.copy_(-2 * inputs(1, device))
    y.fill_(float("nan"))
    captured.replay()
    torch.cuda.synchronize()
    return f"error {error(y, x, w):.2g}"


def fused(device: torch.device, names: list[str]) -> str:
    """Triton: compiles a kernel, and 64 activations."""
    if products.kernels() is None:
        raise RuntimeError("Triton cannot be imported")
    there, w = layer(names[0], device)
    x = inputs(4 * cuda.COLUMNS, device)
    with products.way("fused"):
        return f"error {error(there(x), x, w):.2g}"


CHECKS: dict[str, Callable[[torch.device, list[str]], str]] = {
    "load": load, "product": product, "encode": encode, "graph": graph, "fused": fused,
}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--json", type=Path, help="lines are added to this file")
    p.add_argument("--only", default=",".join(CHECKS), help="checks, with commas")
    p.add_argument("--codecs", default="Q4_K")
    a = p.parse_args()
    for name in a.only.split(","):
        began, why = time.perf_counter(), ""
        try:
            said = CHECKS[name](harness.of(a.device), a.codecs.split(","))
        except Exception as e:
            said = why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        row = {"check": name, "ok": not why, "said": said, "seconds": round(time.perf_counter() - began, 2)}
        print(f"{name}: {'failed: ' if why else ''}{said} ({row['seconds']} s)", flush=True)
        if a.json:
            with a.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if why:
            sys.exit(1)


if __name__ == "__main__":
    main()
