"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge import codecs
from quantforge.nn import planes, products

triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux on x86-64)")
kernels = pytest.importorskip("quantforge.nn.triton_kernels")
ROOT = Path(__file__).parents[2]
INTEGERS = [
    "int4-g128-sym",
    "int4-g128-asym-bf16",
    "int4-g32-asym-bf16",
    "int8-g64-asym",
    "int8-g32-sym",
    "int4-channel-asym-f32",
    "int8-row",
]
CODECS = [name for name in (*planes.FAMILIES, *INTEGERS) if planes.kind(name) in kernels.FAMILIES]
FEW = [(1, torch.bfloat16), (33, torch.float16)]
"""Activations, for which Triton compiles one kernel each: it takes ten seconds."""
MANY = [(8, torch.float16), *((m, torch.bfloat16) for m in (9, 100, 256, 300))]
BOUND = (2e-3, 4e-4, 2e-3, 2e-3, 6e-4)
"""Of interpreted.CASES. The result's rounding alone makes 1.65e-3 in bf16, 2.1e-4 in f16."""


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.interpreted", *CODECS],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("codec", CODECS)
def test_the_product_is_right(codec, errors):
    found = {case: e for case, e in errors.items() if case.rpartition("-")[0] == codec}
    assert len(found) >= 3 and all(e <= BOUND[int(case[-1])] for case, e in found.items())


@pytest.mark.parametrize(
    ("kind", "m"),
    [
        *((k, 32) for k in sorted({planes.kind(c) for c in CODECS if c not in INTEGERS[2:]})),
        ("q4_0", 256),
        ("q5_k", 128),
        ("q4_k", 64),
    ],
)
def test_compiles_for_hopper_without_spills(kind, m, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quantforge.nn.triton_kernels.gemm import gemm_kernel

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set")
    config = replace(kernels.choose(kind, m, 4096, 4096), stages=2)  # more of them only take Triton longer
    constants = kernels.constants(kernels.FAMILIES[kind], config, torch.float16 if m > 64 else torch.bfloat16)
    assert constants["SCALED"] == (m > 64)
    types = {
        "x": "*fp16" if m > 64 else "*bf16",
        "factor": "*fp32",
        "y": "*bf16",
        "partial": "*fp32",
        **dict.fromkeys(("M", "N", "K", "groups", "x_stride"), "i32"),
    }
    names = gemm_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in ("M", "groups")}
    compiled = triton.compile(
        ASTSource(gemm_kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": config.warps, "num_stages": config.stages},
    )  # fmt: skip
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= kernels.launch.SHARED
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(compiled.asm["ptx"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    said = subprocess.run(
        [tool, "-v", "--gpu-name=sm_90a", source, "-o", cubin], capture_output=True, text=True, check=True
    ).stderr
    assert "0 bytes stack frame, 0 bytes spill stores" in said
    assert "serialized" not in said  # tensor cores' instructions that wait for each other


def test_candidates_fit_the_chip_and_are_few():
    for kind in kernels.FAMILIES:
        for m in (9, 16, 33, 128, 256):
            for n, k in ((4096, 4096), (28672, 8192), (17, 64)):
                found = kernels.candidates(kind, m, n, k)
                assert 0 < len(found) <= 12
                assert kernels.choose(kind, m, n, k) in found
                assert all(c.tokens >= 16 and c.rows % 64 == 0 for c in found)


def test_ways():
    half = torch.bfloat16
    assert products.choose("q4_0", 16, 4096, half) == "matvec"
    assert products.choose("q4_0", 17, 4096, half) == "fused"
    assert products.choose("q4_0", 513, 4096, half) == "slabs"
    assert products.choose("q4_0", 17, 4096, torch.float32) == "slabs"
    assert products.choose("no such kind", 32, 4096, half) == "matvec"  # twice
    assert products.choose("no such kind", 33, 4096, half) == "slabs"
    with products.way("slabs"):
        assert products.choose("q4_0", 1, 4096, half) == "slabs"
    with pytest.raises(ValueError, match="matvec"), products.way("fast"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slab", [None, 1, 40 * 64 * 4])
def test_slabs_are_the_product(dtype, slab, monkeypatch):
    """Slices of planes are matrices of their own: cut, decoded and multiplied one after the other."""
    rows, n = 83, 64
    e = codecs.quantize(np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32), "Q4_0")
    seen = []

    def dequantize(tensors, codec, out, k, kind):
        seen.append(out)
        return torch.from_numpy(planes.unpack(planes.restore(tensors, codec, (out, k))).decode()).to(kind)

    monkeypatch.setattr(products.ops, "dequantize", dequantize)
    x = torch.randn(5, n).to(dtype)
    y = products.slabs(x, list(planes.pack(e).tensors.values()), "Q4_0", rows, slab)
    exact = x.double() @ torch.from_numpy(e.decode()).double().T
    assert y.dtype == dtype and (y.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * exact.norm()
    assert sum(seen) == rows and (len(seen) > 1) == (slab is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cases", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("codec", CODECS)
def test_on_a_gpu(codec, cases):
    """Every way against float64, in eager mode and in a graph, with poisoned memory for results."""
    from quantforge.nn import ops
    from tests.nn.interpreted import random_matrix

    rng, found, bf16 = np.random.default_rng(1), codecs.get(codec), torch.bfloat16
    for m, dtype in cases:
        rows, n = (165, 1536) if cases is FEW else (int(rng.integers(1, 700)), found.block_size * int(rng.integers(1, 40)))
        e = random_matrix(found, rows, n)
        w = torch.from_numpy(e.decode()).double().cuda()
        tensors = [t.cuda() for t in planes.pack(e).tensors.values()]
        x = torch.randn(m, n + 8, device="cuda").to(dtype)[:, :n]  # rows that do not follow each other
        exact = x.double() @ w.T
        for name in products.WAYS:
            with products.way(name):
                poison = torch.full((m, rows), float("nan"), dtype=dtype, device="cuda")
                del poison
                y = ops.linear(x, tensors, codec, rows, n)
                bound = (2.6e-3 if name == "slabs" else 2e-3) if dtype == bf16 else 1e-3
                assert (y.double() - exact).norm() <= bound * exact.norm(), (codec, name, m, rows, n, dtype)
                again = ops.linear(x, tensors, codec, rows, n)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured = ops.linear(x, tensors, codec, rows, n)
                for _ in range(3):
                    captured.fill_(float("nan"))
                    graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(captured, again)
        assert ops.linear(x[:0], tensors, codec, rows, n).shape == (0, rows)


@pytest.mark.parametrize(("m", "expected"), [(8, "matvec"), (20, "fused"), (600, "slabs")])
def test_the_operator_takes_the_chosen_way(m, expected, monkeypatch):
    """On a GPU; here its kernels are stand-ins that compute on the CPU."""
    from quantforge.nn import cuda

    rows, n, taken = 40, 256, []
    e = codecs.quantize(np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32), "Q4_K")
    w = torch.from_numpy(e.decode())

    def stand_in(name):
        def product(x, *_):
            taken.append((name, x.shape[0]))
            return (x.float() @ w.T).to(x.dtype)

        return product

    monkeypatch.setattr(cuda.native, "cuda_has", lambda *_: True)
    monkeypatch.setattr(cuda, "_launch", stand_in("matvec"))
    monkeypatch.setattr(products, "fused", stand_in("fused"))
    monkeypatch.setattr(products, "slabs", stand_in("slabs"))
    x = torch.randn(2, m // 2, n).bfloat16()
    tensors = list(planes.pack(e).tensors.values())
    y = cuda.linear(x, tensors, "Q4_K", rows, n)
    assert y.shape == (2, m // 2, rows) and y.dtype == x.dtype
    assert taken == [(expected, m)]
    taken.clear()
    with products.way("matvec"):
        cuda.linear(x, tensors, "Q4_K", rows, n)
    assert {name for name, _ in taken} == {"matvec"} and sum(some for _, some in taken) == m
    assert max(some for _, some in taken) <= cuda.COLUMNS
