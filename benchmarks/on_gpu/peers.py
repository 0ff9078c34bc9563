"""Other libraries' products, in the same harness. What is not installed is named in the report.

Whatever packs weights is the library's own; it gets the integers, scales and numbers of our codecs, so that errors are
against float64 of the same weights.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from quantforge import codecs
from quantforge.nn import ops

from . import ggml, harness, products
from .harness import BLOCK, Call
from .run import Row

Made = tuple[str, int, list[Call]]
"""(codec whose numbers these are, or "" for the weights themselves; bytes; a product for every copy of the matrix)"""


def whole(codec: str, n: int, k: int) -> codecs.Encoded:
    """A matrix small enough to be on the CPU, or BLOCK rows of it."""
    return (
        codecs.quantize(np.tile(harness.noise(BLOCK, k), (n // BLOCK, 1)), codec) if n * k < 1 << 20 else harness.block(codec, k)
    )


def clones(w: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """COLD bytes of copies."""
    return [w.clone() for _ in range(harness.copies_of(w.nbytes, device))]


def integers(codec: str, n: int, k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes i32[n, k], steps f32[n, groups], zeros f32[n, groups]) of a matrix."""
    e = whole(codec, n, k)
    stored = e.codec.to_integers(e.parts, e.shape)
    arrays = stored.codes.astype(np.int32), np.array(stored.step), stored.zero.astype(np.float32)
    codes, step, zero = (torch.from_numpy(a).to(device).repeat(n // len(a), 1) for a in arrays)
    return codes, step, zero


def numbers(n: int, k: int, device: torch.device) -> torch.Tensor:
    """The matrix itself: bf16[n, k]."""
    return torch.from_numpy(harness.noise(BLOCK, k)).to(device, torch.bfloat16).repeat(n // BLOCK, 1)


# ---- torch


def bf16(n: int, k: int, device: torch.device) -> Made:
    w = numbers(n, k, device)
    return "", w.nbytes, [lambda x, w=c: torch.mm(x, w.T) for c in clones(w, device)]


def dequantize_matmul(n: int, k: int, device: torch.device, codec: str = "Q4_0") -> Made:
    """What a library without fused kernels does: decode the matrix to memory, multiply."""
    copies, size = products.matrices(codec, n, k, device), math.ceil(codecs.get(codec).nbytes((n, k)))
    return codec, size, [lambda x, p=p: torch.mm(x, ops.dequantize(p, codec, n, k, torch.bfloat16).T) for p in copies]


def torch_int4(n: int, k: int, device: torch.device) -> Made:
    """tinygemm: 4-bit integers in groups of 128, w = (q − 8) · scale + zero in bf16."""
    codec = "int4-g128-asym"
    q, scale, zero = integers(codec, n, k, device)
    table = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()
    if device.type == "cuda":
        w = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
        multiply = torch.ops.aten._weight_int4pack_mm
    else:
        w = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return codec, w.nbytes + table.nbytes, [lambda x, w=w: multiply(x, w, 128, table) for w in clones(w, device)]


# ---- bitsandbytes


def bitsandbytes_nf4(n: int, k: int, device: torch.device) -> Made:
    """From 0.50 on: one kernel for few activations, decode + matmul for many, as it chooses."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(numbers(n, k, device), quant_type="nf4", blocksize=64)
    copies = clones(data, device)
    return "nf4", data.nbytes + state.absmax.nbytes, [lambda x, d=d: matmul_4bit(x, d.t(), quant_state=state) for d in copies]


# ---- Marlin: GPTQ's symmetric integers of 4 bits in groups of 128


def gptq_words(codes: torch.Tensor) -> torch.Tensor:
    """GPTQ's qweight of codes i32[n, k]: i32[k / 8, n], the first of eight neighbours in the lowest bits."""
    q = codes.T.reshape(codes.shape[1] // 8, 8, -1).long()
    words = (q << (4 * torch.arange(8, device=codes.device))[:, None]).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().contiguous()


def marlin(library: SimpleNamespace, n: int, k: int, device: torch.device) -> Made:
    """Today's Marlin: repacked from GPTQ's layout, bf16 activations. library: its functions."""
    codec = "int4-g128-sym"
    codes, step, _ = integers(codec, n, k, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    w = library.repack(gptq_words(codes), none, k, n, 4)
    scales = library.permute(step.T.contiguous().bfloat16(), size_k=k, size_n=n, group_size=128)
    space = library.workspace(device)
    given = inspect.signature(library.gemm).parameters
    more = {"a_scales": None} if "a_scales" in given else {}

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return library.gemm(
            a=x, c=None, b_q_weight=w, b_bias=None, b_scales=scales, global_scale=None, b_zeros=none, g_idx=none, perm=none,
            workspace=space, b_q_type=library.kind, size_m=x.shape[0], size_n=n, size_k=k, is_k_full=True,
            use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False, **more,
        )  # fmt: skip

    # scales are f16 with us, bf16 here: the numbers are not quite our codec's
    return codec, w.nbytes + scales.nbytes, [lambda x, w=w: multiply(x, w) for w in clones(w, device)]


def marlin_vllm(n: int, k: int, device: torch.device) -> Made:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    gemm = getattr(_custom_ops, "marlin_gemm", None) or _custom_ops.gptq_marlin_gemm  # its name until 0.12
    return marlin(
        SimpleNamespace(
            repack=_custom_ops.gptq_marlin_repack, gemm=gemm, permute=marlin_utils.marlin_permute_scales,
            workspace=marlin_utils.marlin_make_workspace_new, kind=scalar_types.uint4b8,
        ), n, k, device,
    )  # fmt: skip


def marlin_gptqmodel(n: int, k: int, device: torch.device) -> Made:
    from gptqmodel.utils import marlin as theirs
    from gptqmodel.utils.marlin_scalar_type import scalar_types

    if reason := theirs.marlin_runtime_error(torch.bfloat16):
        raise RuntimeError(reason)
    return marlin(
        SimpleNamespace(
            repack=lambda *a: theirs.gptq_marlin_repack(*a, dtype=torch.bfloat16), gemm=theirs.gptq_marlin_gemm,
            permute=theirs.marlin_permute_scales, workspace=theirs.marlin_make_workspace_new, kind=scalar_types.uint4b8,
        ), n, k, device,
    )  # fmt: skip


def compile_marlin(kernel: Path, library: Path) -> None:
    """Its kernel without torch's headers, by nvcc, for the GPU that is here or, without one, sm_90. Raises RuntimeError."""
    arch = "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "90"
    flags = ["-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-diag-suppress=177,179,39"]
    command = ["nvcc", *flags, f"-arch=sm_{arch}", "-o", str(library), str(kernel)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip().splitlines()[-1]}")


@cache
def first_marlin() -> Any:
    """The `marlin` module of a checkout of IST-DASLab/marlin; its kernel is compiled by nvcc, without torch's headers."""
    if "MARLIN" not in os.environ:
        raise RuntimeError("MARLIN is not set: a checkout of github.com/IST-DASLab/marlin")
    source = Path(os.environ["MARLIN"])
    kernel = source / "marlin" / "marlin_cuda_kernel.cu"
    library = Path(os.environ.get("MARLIN_BUILD", source)) / "libmarlin.so"
    if not library.exists() or (kernel.exists() and library.stat().st_mtime < kernel.stat().st_mtime):
        compile_marlin(kernel, library)
    loaded = ctypes.CDLL(str(library))
    name = re.search(rb"_Z11marlin_cuda\w+", library.read_bytes())  # a C++ function
    assert name is not None
    run = getattr(loaded, name[0].decode())
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    run.argtypes = [*[pointer] * 4, *[integer] * 3, pointer, integer, integer, pointer, *[integer] * 4]

    def mul(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, s: torch.Tensor, space: torch.Tensor, *cut: int) -> None:
        group = -1 if len(s) == 1 else a.shape[1] // len(s)
        where = [t.data_ptr() for t in (a, b, c, s)]
        stream = torch.cuda.current_stream().cuda_stream
        found = run(*where, a.shape[0], c.shape[1], a.shape[1], space.data_ptr(), group, a.device.index, stream, *cut)
        if found:
            raise RuntimeError(f"Marlin refuses {list(a.shape)} times {list(c.shape)}: error {found}")

    sys.modules["marlin_cuda"] = SimpleNamespace(mul=mul)  # type: ignore[assignment]  # what its extension would be
    spec = importlib.util.spec_from_file_location("marlin", source / "marlin" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marlin_first(n: int, k: int, device: torch.device) -> Made:
    """The published kernel, with f16 activations: MARLIN is a checkout of it, MARLIN_BUILD where its library goes."""
    module = first_marlin()
    codec = "int4-g128-sym"
    codes, step, zero = integers(codec, BLOCK, k, device)
    weights = torch.nn.Linear(k, BLOCK, bias=False, dtype=torch.float16, device=device)
    weights.weight.data = ((codes - zero.repeat_interleave(128, 1)) * step.repeat_interleave(128, 1)).half()
    layer = module.Layer(k, BLOCK, 128).to(device)
    layer.pack(weights, step.half())
    # 64 columns are packed together: more of them lie side by side
    w, scales = (t.repeat(1, n // BLOCK) for t in (layer.B, layer.s))
    space = torch.zeros(n // 128 * 16, dtype=torch.int32, device=device)

    def multiply(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = torch.empty((x.shape[0], n), dtype=torch.float16, device=device)
        module.mul(x, b, y, scales, space)
        return y

    return codec, w.nbytes + scales.nbytes, [lambda x, b=b: multiply(x, b) for b in clones(w, device)]


# ---- all


def rows(name: str, n: int, k: int, ms: list[int], device: str) -> Iterator[Row]:
    """Times of one library and shape."""
    if name.startswith(ggml.PREFIX):
        yield from ggml.rows(name, n, k, ms, device)
        return
    make, most, x_as = PEERS[name]
    here = harness.of(device)
    with torch.inference_mode():
        codec, size, calls = make(n, k, here)
        for m in ms:
            if m <= most:
                x = harness.activations(m, k, here)
                given = x.half() if x_as else x
                error = harness.relative_error(calls[-1](given), codec, k)
                us = harness.microseconds([lambda c=c, x=given: c(x) for c in calls], here)
                yield Row(name, n, k, m, us, size, error, x_as)


PEERS: dict[str, tuple[Callable[..., Made], int, str]] = {
    "torch bf16": (bf16, 1 << 30, ""),
    "torch int4 (tinygemm)": (torch_int4, 256, ""),
    "bitsandbytes NF4": (bitsandbytes_nf4, 1 << 30, ""),
    "Marlin (IST-DASLab)": (marlin_first, 1 << 30, "f16 activations"),
    "Marlin (vLLM)": (marlin_vllm, 1 << 30, ""),
    "Marlin (GPTQModel)": (marlin_gptqmodel, 1 << 30, ""),
    "decode + torch (Q4_0)": (dequantize_matmul, 1 << 30, ""),
}
"""Name -> how it is made, its largest M, what activations are where they are not bf16."""

NAMES = [*PEERS, *(ggml.PREFIX + codec for codec in ggml.CODECS)]
