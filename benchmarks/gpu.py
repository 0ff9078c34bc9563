"""Products of quantized weights on a GPU against bf16 and other libraries; generation, evaluation and encoding.

    python benchmarks/gpu.py [--quick] [--json FILE] [--parts products,encode,model] [--codecs ...] [--ways]
    python benchmarks/gpu.py --readme FILE        the README's table of a run
    python benchmarks/gpu.py --device cpu --smoke a dry run of the same code, tiny and without graphs

A time is the median of replays of a CUDA graph that multiplies one input with copies of a matrix in turn, 512 MB or more
of them: no weight is in the L2. Activations stay bf16; nothing is rounded to 8 bits. Every error is against float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import quantforge as qf
from quantforge import codecs, native
from quantforge.importance import Importance
from quantforge.nn import ops, planes, products
from quantforge.nn.base import tensor

SHAPES = [(4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096), (28672, 8192)]  # rows, columns
MS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
CODECS = [
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q4_0",
    "Q4_1",
    "IQ4_XS",
    "IQ4_NL",
    "MXFP4",
    "nf4",
    "int4-g128-sym",
    "int4-g128-asym",
    "IQ3_XXS",
    "IQ2_XXS",
]
QUICK = ["Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_XS", "nf4", "int4-g128-sym", "IQ2_XXS"]
BLOCK = 256  # rows that are quantized; a matrix is many copies of them
COLD = 512 << 20


@dataclass
class Row:
    """One time."""

    name: str
    """A codec's name, or a library's."""
    n: int
    k: int
    m: int
    us: float
    nbytes: int
    """Of the weights."""
    error: float
    """‖y − exact‖ / ‖exact‖, exact in float64 from the stored weights."""
    way: str = ""
    config: str = ""

    @property
    def gbs(self) -> float:
        return self.nbytes / self.us / 1e3


@dataclass
class Run:
    """Everything that one run found."""

    machine: dict[str, Any]
    copy_gbs: float
    """A device-to-device copy, bytes read and written."""
    gemm_tflops: float
    """bf16, 8192³, random numbers."""
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Library -> why it did not run."""
    encode: list[dict[str, Any]] = field(default_factory=list)
    model: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False


# ---- time


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
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


# ---- matrices


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    w = torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32))
    return w.bfloat16().float().numpy()  # numbers that every library gets exactly


@cache
def block(codec: str, columns: int) -> codecs.Encoded:
    """BLOCK rows, quantized."""
    return codecs.quantize(noise(BLOCK, columns), codec)


@cache
def activations(m: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn((m, columns), generator=torch.Generator().manual_seed(m)).to(device, torch.bfloat16)


@cache
def exact(codec: str, m: int, columns: int, device: torch.device) -> torch.Tensor:
    """The product with BLOCK rows, in float64."""
    w = block(codec, columns).decode() if codec else noise(BLOCK, columns)
    w = torch.from_numpy(np.ascontiguousarray(w)).to(device)
    return activations(m, columns, device).double() @ (w.double() if codec else w.bfloat16().double()).T


def relative_error(y: torch.Tensor, codec: str, columns: int) -> float:
    """Of any product whose rows are BLOCK ones again and again; the last ones count, too."""
    reference = exact(codec, y.shape[0], columns, y.device)
    found = [float((part.double() - reference).norm() / reference.norm()) for part in (y[:, :BLOCK], y[:, -BLOCK:])]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def copies_of(nbytes: int, device: torch.device) -> int:
    return max(2, math.ceil(COLD / nbytes)) if device.type == "cuda" else 2


def matrices(codec: str, n: int, k: int, device: torch.device) -> list[list[torch.Tensor]]:
    """Copies of one matrix as the operators take it, together COLD bytes."""
    e = block(codec, k)
    if device.type != "cuda":
        e = codecs.quantize(np.tile(noise(BLOCK, k), (n // BLOCK, 1)), codec)
        return [[tensor(p) for p in e.parts.values()]] * 2
    packed = list(planes.pack(e).tensors.values())
    whole = [p.to(device) if p.dim() < 3 else p.to(device).repeat(n // BLOCK, 1, 1) for p in packed]
    size = sum(p.nbytes for p in whole if p.dim() == 3)
    return [[p.clone() if p.dim() == 3 else p for p in whole] for _ in range(copies_of(size, device))]


# ---- products


def product_rows(codec: str, n: int, k: int, ms: list[int], device: torch.device, ways: bool, tune: bool) -> Iterator[Row]:
    """Times of one codec and shape."""
    copies = matrices(codec, n, k, device)
    kind, nbytes = planes.kind(codec), math.ceil(codecs.get(codec).nbytes((n, k)))
    for m in ms:
        x = activations(m, k, device)
        if (kernels := products.kernels()) is not None:
            kernels.forget()  # the last graphs are gone

        def timed(way: str, call: Callable[[list[torch.Tensor]], torch.Tensor], config: str = "", m: int = m) -> Row:
            error = relative_error(call(copies[-1]), codec, k)
            us = microseconds([lambda p=p: call(p) for p in copies], device)
            return Row(codec, n, k, m, us, nbytes, error, way, config)

        def linear(p: list[torch.Tensor], x: torch.Tensor = x) -> torch.Tensor:
            return ops.linear(x, p, codec, n, k)

        chosen = products.choose(kind, m, k, x.dtype) if device.type == "cuda" else "cpu"
        yield timed(chosen, linear)
        if device.type != "cuda":
            continue
        for way in products.WAYS if ways else ():
            if way != chosen and m <= {"matvec": 64, "fused": 1024, "slabs": 1 << 30}[way]:
                with products.way(way):
                    if products.choose(kind, m, k, x.dtype) == way:
                        yield timed(way, linear)
        if tune:
            kernels = products.kernels()
            if kernels and kind in kernels.FAMILIES and 8 < m <= 1024:
                for config in kernels.candidates(kind, m, n, k):
                    yield timed("fused", lambda p, c=config, x=x, gemm=kernels.gemm: gemm(x, p, kind, n, c), str(config))
            if m > 128:
                for slab in (15, 30, 60, 120, 1000):
                    yield timed("slabs", lambda p, s=slab, x=x: products.slabs(x, p, codec, n, s << 20), f"{slab} MiB")


def compile_one(kind_codec: tuple[str, str], config: tuple[int, ...]) -> str:
    """Compile one Triton kernel into Triton's cache, in a process of its own. Returns what went wrong."""
    try:
        kernels = products.kernels()
        codec, kind = kind_codec
        k = kernels.FAMILIES[kind].chunk * 16
        p = [t.cuda() for t in planes.pack(codecs.quantize(noise(16, k), codec)).tensors.values()]
        c = kernels.Config(*config)
        w = [t.repeat(16, 1, 1) if t.dim() == 3 else t for t in p]
        kernels.gemm(torch.zeros((c.tokens, k), device="cuda", dtype=torch.bfloat16), w, kind, 256, c)
        torch.cuda.synchronize()
    except Exception as e:  # told, and met again where it matters
        return f"{kind_codec} {config}: {e}"
    return ""


def compile_all(names: list[str], shapes: list[tuple[int, int]], ms: list[int], tune: bool) -> list[str]:
    """Compile every Triton kernel of the plan on all cores: one at a time they take seconds each."""
    kernels = products.kernels()
    jobs = set()
    for codec in names:
        kind = planes.kind(codec)
        if kernels is None or kind not in kernels.FAMILIES:
            continue
        for m in ms:
            if 8 < m <= (1024 if tune else 256):
                for n, k in shapes:
                    found = (
                        kernels.candidates(kind, m, n, k) if tune else [kernels.default(torch.device("cuda", 0), kind, m, n, k)]
                    )
                    jobs |= {((codec, kind), tuple(asdict(c).values())) for c in found}
    if not jobs:
        return []
    with ProcessPoolExecutor(min(len(jobs), max(1, (os.cpu_count() or 2) - 1)), get_context("spawn")) as pool:
        return [wrong for wrong in pool.map(compile_one, *zip(*sorted(jobs), strict=True)) if wrong]


# ---- others


def bf16(n: int, k: int, device: torch.device) -> tuple[str, int, list[Callable[[torch.Tensor], torch.Tensor]]]:
    w = torch.from_numpy(noise(BLOCK, k)).to(device, torch.bfloat16).repeat(n // BLOCK, 1)
    return "", w.nbytes, [lambda x, w=c: torch.mm(x, w.T) for c in [w.clone() for _ in range(copies_of(w.nbytes, device))]]


def dequantize_matmul(codec: str) -> Callable[..., Any]:
    """What a library without fused kernels does: decode the matrix to memory, multiply."""

    def make(n: int, k: int, device: torch.device) -> tuple[str, int, list[Callable[[torch.Tensor], torch.Tensor]]]:
        copies = matrices(codec, n, k, device)
        size = math.ceil(codecs.get(codec).nbytes((n, k)))
        return codec, size, [
            lambda x, p=p: torch.mm(x, ops.dequantize(p, codec, n, k, torch.bfloat16).T) for p in copies
        ]  # fmt: skip

    return make


def torch_int4(n: int, k: int, device: torch.device) -> tuple[str, int, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """tinygemm: 4-bit integers in groups of 128."""
    codec = "int4-g128-asym"
    e = codecs.quantize(np.tile(noise(BLOCK, k), (n // BLOCK, 1)), codec) if n * k < 1 << 20 else block(codec, k)
    stored = e.codec.to_integers(e.parts, e.shape)
    times = n // len(stored.codes)
    q = torch.from_numpy(stored.codes.astype(np.int32)).to(device).repeat(times, 1)
    q8 = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    scale = torch.from_numpy(stored.step).to(device).repeat(times, 1)
    zero = torch.from_numpy(stored.zero.astype(np.float32)).to(device).repeat(times, 1)
    # w = (q − 8) · scale + zero
    table = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()
    if device.type == "cuda":
        w = torch._convert_weight_to_int4pack(q8, 8)
        packed = [w.clone() for _ in range(copies_of(w.nbytes, device))]
        return codec, w.nbytes + table.nbytes, [lambda x, w=w: torch._weight_int4pack_mm(x, w, 128, table) for w in packed]
    w = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    return codec, w.nbytes + table.nbytes, [lambda x: torch._weight_int4pack_mm_for_cpu(x, w, 128, table)] * 2


def bitsandbytes_nf4(n: int, k: int, device: torch.device) -> tuple[str, int, list[Callable[[torch.Tensor], torch.Tensor]]]:
    import bitsandbytes.functional as bnb

    w = torch.from_numpy(noise(BLOCK, k)).to(device, torch.bfloat16).repeat(n // BLOCK, 1)
    data, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    from bitsandbytes import matmul_4bit

    packed = [data.clone() for _ in range(copies_of(data.nbytes, device))]
    return "nf4", data.nbytes + state.absmax.nbytes, [lambda x, d=d: matmul_4bit(x, d.t(), quant_state=state) for d in packed]


def marlin(n: int, k: int, device: torch.device) -> tuple[str, int, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """GPTQ weights of 4 bits in groups of 128, by vLLM's build of Marlin."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    w = torch.from_numpy(noise(BLOCK, k)).to(device, torch.bfloat16).repeat(n // BLOCK, 1)
    kind = scalar_types.uint4b8
    _, q, scale, g_idx, order, _ = marlin_quantize(w.T.contiguous(), kind, 128, act_order=False)
    space = marlin_make_workspace_new(device)
    copies = [q.clone() for _ in range(copies_of(q.nbytes, device))]

    def call(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return vllm_ops.gptq_marlin_gemm(
            x, None, q, None, scale, None, None, g_idx, order, space, kind, x.shape[0], n, k, True, False, True, False
        )  # fmt: skip

    return "?", q.nbytes + scale.nbytes, [lambda x, q=q: call(x, q) for q in copies]


PEERS: dict[str, tuple[Callable[..., Any], int]] = {
    "torch bf16": (bf16, 1 << 30),
    "torch int4 (tinygemm)": (torch_int4, 1 << 30),
    "bitsandbytes NF4": (bitsandbytes_nf4, 1 << 30),
    "Marlin (vLLM)": (marlin, 1 << 30),
    "decode + torch (Q4_0)": (dequantize_matmul("Q4_0"), 1 << 30),
}
"""Name -> how it is made, and its largest M."""


def peer_rows(name: str, n: int, k: int, ms: list[int], device: torch.device) -> Iterator[Row]:
    make, most = PEERS[name]
    codec, size, calls = make(n, k, device)
    for m in ms:
        if m <= most:
            x = activations(m, k, device)
            error = math.nan if codec == "?" else relative_error(calls[-1](x), codec, k)
            yield Row(name, n, k, m, microseconds([lambda c=c, x=x: c(x) for c in calls], device), size, error)


# ---- the rest


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "quantforge": qf.__version__}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"device": p.name, "multiprocessors": p.multi_processor_count, "l2": p.L2_cache_size, "cuda": torch.version.cuda}
        kernels = products.kernels()
        found |= {"triton": sys.modules["triton"].__version__ if kernels else None, "kernels": native.cuda_missing() or "built"}
    else:
        found |= {"device": "CPU", "isa": native.isa()}
    return found


def limits(device: torch.device, smoke: bool) -> tuple[float, float]:
    """(copy, bytes read and written in GB/s; bf16 product in TFLOP/s) of this machine."""
    size, side = (1 << 20, 128) if smoke else (2 << 30, 8192)
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = 2 * size / microseconds([lambda: b.copy_(a)] * 2, device) / 1e3
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return copy, 2 * side**3 / microseconds([lambda: torch.mm(x, y)] * 2, device) / 1e6


def encode_rows(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Encoding speed of a matrix that is on the device already, without its way back."""
    from quantforge import device as devices

    n = 256 if smoke else 8192
    w = torch.from_numpy(noise(256, n)).to(device).repeat(n // 256, 1)
    for name in ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"):
        codec = codecs.get(name)
        if device.type == "cuda" and not devices.has_kernel(codec, "encode"):
            continue
        importance = np.ones(n, np.float32) if codec.needs_importance else None
        if device.type == "cuda":
            call = lambda codec=codec, importance=importance: devices.encode(codec, w, importance)  # noqa: E731
        else:
            call = lambda codec=codec, importance=importance: codecs.quantize(w[:16].numpy(), codec, importance=importance)  # noqa: E731
        call()
        synchronize(device)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - began)
        rows = len(w) if device.type == "cuda" else 16
        yield {"codec": name, "gweights_s": rows * n / statistics.median(times) / 1e9}


def model_rows(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Generation of one sequence with a random Llama (1.0 B parameters; smoke: tiny), and evaluation of it."""
    from transformers import AutoModelForCausalLM

    from benchmarks.convert import make_model

    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "model"
        parameters = make_model(source, *((1, 256, 512) if smoke else (24, 2048, 5632)))
        files = {"bf16": source}
        for recipe in ("Q4_K_M", "IQ2_XXS"):
            files[recipe] = Path(work) / f"{recipe}.gguf"
            importance = None if recipe == "Q4_K_M" else flat_importance(source)
            began = time.perf_counter()
            qf.convert(source, files[recipe], recipe=recipe, importance=importance, device=device.type)
            yield {"what": "convert", "model": recipe, "seconds": time.perf_counter() - began, "parameters": parameters}
        for name, path in files.items():
            if name == "bf16":
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
            else:
                model = qf.load(path, device=device.type, dtype="bfloat16")
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            found = {"what": "generate", "model": name, "parameters": parameters, "memory": before}
            yield found | generation(model, device, 8 if smoke else 128)
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()
        began = time.perf_counter()
        report = qf.evaluate(
            {k: files[k] for k in ("Q4_K_M", "IQ2_XXS")}, reference=source, ctx=64 if smoke else 512, chunks=1 if smoke else 40,
            metrics=["ppl", "kld"], device=device.type, noise_floor=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        tokens = (1 if smoke else 40) * (64 if smoke else 512)
        yield {
            "what": "evaluate",
            "models": 3,
            "tokens_s": tokens / seconds,
            "seconds": seconds,
            "scored": report.text["tokens_scored"],
        }


def flat_importance(source: Path) -> Importance:
    """Ones: IQ2_XXS asks for importance, and random weights have no better."""
    found = qf.plan(source, source.with_suffix(".gguf"), recipe="Q8_0").tensors
    return Importance({t.name: np.ones(t.shape[-1], np.float32) for t in found if len(t.shape) == 2})


def generation(model: Any, device: torch.device, tokens: int) -> dict[str, Any]:
    """Greedy decoding: tokens/s of `generate`, and of its step as a CUDA graph over a static cache."""
    from transformers import StaticCache

    prompt = torch.arange(1, 17, device=device)[None]
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        synchronize(device)
        began = time.perf_counter()
        out = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        synchronize(device)
        found: dict[str, Any] = {"generate_tokens_s": (out.shape[1] - 16) / (time.perf_counter() - began)}
        cache_ = StaticCache(config=model.config, max_cache_len=16 + 2 * tokens + 8)
        first = model(prompt, past_key_values=cache_, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        ids, at = first.clone(), torch.full((1, 1), 16, device=device)

        def step() -> None:
            logits = model(ids, past_key_values=cache_, position_ids=at, use_cache=True).logits
            ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
            at.add_(1)

        replay: Callable[[], Any] = step
        if device.type == "cuda":
            try:
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    for _ in range(3):
                        step()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                replay = graph.replay
            except Exception as e:  # a benchmark says what did not work, and goes on
                return found | {"graph": f"{type(e).__name__}: {e}"[:300]}
        replay()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(tokens):
            replay()
        synchronize(device)
        return found | {"graph_tokens_s": tokens / (time.perf_counter() - began)}


# ---- reports


def tables(run: Run) -> Iterator[str]:
    """The full table, a line at a time."""
    base = {(r.n, r.k, r.m): r.us for r in run.rows if r.name == "torch bf16"}
    others: dict[tuple[int, int, int], float] = {}
    for r in run.rows:
        if r.name in PEERS and r.name != "torch bf16":
            key = (r.n, r.k, r.m)
            others[key] = min(r.us, others.get(key, math.inf))
    yield f"{run.machine}; copy {run.copy_gbs:.0f} GB/s; bf16 8192³ {run.gemm_tflops:.0f} TFLOP/s"
    yield f"{'':22} {'N×K':>12} {'M':>5} {'µs':>9} {'GB/s':>6} {'%copy':>6} {'×bf16':>6} {'×peer':>6} {'error':>8}  way"
    for r in run.rows:
        key = (r.n, r.k, r.m)
        bf, peer = (f"{t[key] / r.us:6.2f}" if key in t else "     –" for t in (base, others))
        yield (
            f"{r.name:22} {f'{r.n}×{r.k}':>12} {r.m:>5} {r.us:9.2f} {r.gbs:6.0f} {100 * r.gbs / run.copy_gbs:6.1f} {bf} {peer} "
            f"{r.error:8.1e}  {r.way} {r.config}"
        )
    for name, why in run.missing.items():
        yield f"not run: {name}: {why}"
    yield from (json.dumps(e) for e in (*run.encode, *run.model))


def readme(run: Run, shape: tuple[int, int] = (8192, 8192)) -> Iterator[str]:
    """Markdown: × bf16 by codec and M, one shape; the best peers; generation."""
    rows = [r for r in run.rows if (r.n, r.k) == shape and not r.config]
    if not rows:
        shape = (run.rows[0].n, run.rows[0].k)
        rows = [r for r in run.rows if (r.n, r.k) == shape and not r.config]
    ms = sorted({r.m for r in rows})
    base = {r.m: r.us for r in rows if r.name == "torch bf16"}
    where = f"{run.machine['device']}, {run.machine['date']}: {shape[0]}×{shape[1]}"
    yield f"{where}, speed-up over bf16 (weights not in the L2; bf16 activations)"
    yield ""
    yield "| | " + " | ".join(f"M={m}" for m in ms) + " | error |"
    yield "|---" * (len(ms) + 2) + "|"
    yield "| bf16, µs | " + " | ".join(f"{base[m]:.1f}" if m in base else "–" for m in ms) + " | |"
    for name in dict.fromkeys(r.name for r in rows if r.name != "torch bf16"):
        first = {r.m: r for r in reversed(rows) if r.name == name}
        cells = [f"{base[m] / first[m].us:.2f}" if m in first and m in base else "–" for m in ms]
        worst = max((r.error for r in first.values() if not math.isnan(r.error)), default=math.nan)
        yield f"| {name} | " + " | ".join(cells) + f" | {worst:.1e} |"
    spoken = [g for g in run.model if g["what"] == "generate"]
    if spoken:
        yield ""
        yield f"| {spoken[0]['parameters'] / 1e9:.1f} B Llama, one sequence | " + " | ".join(g["model"] for g in spoken) + " |"
        yield "|---" * (len(spoken) + 1) + "|"
        for key, what in (("graph_tokens_s", "CUDA graph, tokens/s"), ("generate_tokens_s", "`generate`, tokens/s")):
            yield f"| {what} | " + " | ".join(f"{g[key]:.0f}" if key in g else "–" for g in spoken) + " |"


def load_run(path: Path) -> Run:
    found = json.loads(path.read_text())
    return Run(**found | {"rows": [Row(**r) for r in found["rows"]]})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--smoke", action="store_true", help="tiny shapes")
    p.add_argument("--quick", action="store_true", help="eight codecs, all M on 8192×8192 and three on the others")
    p.add_argument("--ways", action="store_true", help="every way of each product, for products.UP_TO")
    p.add_argument("--tune", action="store_true", help="every configuration of the Triton kernels, and sizes of slabs")
    p.add_argument("--parts", default="products,encode,model")
    p.add_argument("--codecs")
    p.add_argument("--m")
    p.add_argument("--minutes", type=float, default=1e9, help="start no product after this time")
    p.add_argument("--json", type=Path)
    p.add_argument("--readme", type=Path, help="print the README's tables of a run, and stop")
    a = p.parse_args()
    if a.readme:
        print("\n".join(readme(load_run(a.readme))))
        return
    device = torch.device(a.device, 0) if a.device == "cuda" else torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --smoke runs the same code")
    began = time.monotonic()
    names = a.codecs.split(",") if a.codecs else QUICK if a.quick or a.smoke else CODECS
    shapes = [(256, 512)] if a.smoke else SHAPES
    ms = [int(m) for m in a.m.split(",")] if a.m else [1, 9] if a.smoke else MS
    run = Run(machine(device), *limits(device, a.smoke))
    print(run.machine, f"copy {run.copy_gbs:.0f} GB/s, bf16 {run.gemm_tflops:.0f} TFLOP/s", flush=True)

    def save() -> None:
        if a.json:
            fresh = a.json.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(run)))
            fresh.replace(a.json)

    parts = a.parts.split(",")
    if "products" in parts:
        if device.type == "cuda":
            run.missing |= {f"compile {i}": why[:300] for i, why in enumerate(compile_all(names, shapes, ms, a.tune))}
            print(f"kernels compiled after {time.monotonic() - began:.0f} s", flush=True)
        # the shape of the targets first: whatever time is left, that table is whole
        for n, k in sorted(shapes, key=lambda s: s != (8192, 8192)):
            some = ms if a.m or a.smoke or not a.quick or (n, k) == (8192, 8192) else [m for m in ms if m in (1, 16, 64)]
            for name in (*PEERS, *names):
                if time.monotonic() - began > 60 * a.minutes:
                    run.missing[f"{name} {n}×{k}"] = "out of time"
                    continue
                peer = name in PEERS
                found = peer_rows(name, n, k, some, device) if peer else product_rows(name, n, k, some, device, a.ways, a.tune)
                try:
                    for row in found:  # one by one: what was measured before a failure stays
                        run.rows.append(row)
                except Exception as e:  # a library that is not there, or a kernel that fails, is a line of the report
                    run.missing[name if peer else f"{name} {n}×{k}"] = f"{type(e).__name__}: {e}"[:300]
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            save()
    for part, rows, into in (("encode", encode_rows, run.encode), ("model", model_rows, run.model)):
        if part in parts:
            try:
                for row in rows(device, a.smoke):
                    into.append(row)
                    print(row, flush=True)
            except Exception as e:
                run.missing[part] = f"{type(e).__name__}: {e}"[:300]
            save()
    run.finished = True
    save()
    print("\n".join(tables(run)))


if __name__ == "__main__":
    main()
