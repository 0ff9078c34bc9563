"""CPU products with stored weights: ours, torch's on decoded weights, llama.cpp's on the same bytes: docs/running.md's tables.

    python benchmarks/matmul.py [--type Q4_K ...] [--tokens 1 512] [--shape 4096 4096] [--model FILE.gguf ...] [--threads 1]

One layer: one thread, milliseconds of CPU time, the best of several runs in turns, all in this process. With one token
the weights are several layers', one after the other, so that they come from memory as a model's do. `float` and `int8`
are QuantLinear's activations; ggml's own are 8 bits wide; "repacked" is what llama.cpp makes of the weights while loading,
where it has such a layout. ggml comes from the xllamacpp wheel. With --model: tokens a second of a whole model, prompt
and generation, beside llama.cpp's on the same file, in turns: of CPU time with one thread, of wall time with more.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantforge import codecs, native
from quantforge.arrays import empty
from quantforge.nn import QuantLinear

RUNS = 5
TYPES = {
    1: "Q8_0 Q4_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_XS IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_S IQ1_M TQ1_0 TQ2_0 MXFP4 NVFP4 "
    "int4-g128-sym int4-g128-asym int4-g32-sym int4-g128-sym-act int8-channel-sym int8-row nf4 nf4-dq fp8-channel fp8-block128",
    512: "Q8_0 Q4_K IQ2_XXS int4-g128-asym int8-channel-sym nf4 fp8-channel",
}
"""Tokens -> types that docs/running.md lists."""

COLD = 300 << 20
"""Bytes of weights that are read in turn: more than a cache keeps."""


class Ggml:
    """ggml_mul_mat of weights in their stored bytes and f32 activations."""

    def __init__(self) -> None:
        import gguf
        import xllamacpp

        (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
        self.lib = ctypes.CDLL(str(path))
        self.ids = {t.name: int(t) for t in gguf.GGMLQuantizationType}
        p, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        for name, result, arguments in (
            ("ggml_init", p, [self.Params]),
            ("ggml_new_tensor_2d", p, [p, ctypes.c_int, i64, i64]),
            ("ggml_mul_mat", p, [p, p, p]),
            ("ggml_new_graph", p, [p]),
            ("ggml_build_forward_expand", None, [p, p]),
            ("ggml_backend_cpu_init", p, []),
            ("ggml_backend_cpu_set_n_threads", None, [p, ctypes.c_int]),
            ("ggml_backend_graph_compute", ctypes.c_int, [p, p]),
            ("ggml_backend_cpu_buffer_type", p, []),
            ("_Z35ggml_backend_cpu_repack_buffer_typev", p, []),
            ("ggml_backend_alloc_ctx_tensors_from_buft", p, [p, p]),
            ("ggml_backend_tensor_set", None, [p, p, size, size]),
            ("ggml_backend_tensor_get", None, [p, p, size, size]),
        ):
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.backend = self.lib.ggml_backend_cpu_init()
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, 1)

    class Params(ctypes.Structure):
        """ggml_init_params"""

        _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    def product(self, name: str, data: np.ndarray, x: np.ndarray, out: int, repack: bool) -> Callable[[], np.ndarray]:
        """A function that multiplies and gives f32[m, out]."""
        lib, m, n = self.lib, *x.shape
        weights, rest = (lib.ggml_init(self.Params(1 << 20, None, True)) for _ in range(2))
        w = lib.ggml_new_tensor_2d(weights, self.ids[name], n, out)
        plain = lib.ggml_backend_cpu_buffer_type()
        lib.ggml_backend_alloc_ctx_tensors_from_buft(weights, lib._Z35ggml_backend_cpu_repack_buffer_typev() if repack else plain)
        lib.ggml_backend_tensor_set(w, data.ctypes.data, 0, data.nbytes)
        tensor = lib.ggml_new_tensor_2d(rest, 0, n, m)
        y = lib.ggml_mul_mat(rest, w, tensor)
        graph = lib.ggml_new_graph(rest)
        lib.ggml_build_forward_expand(graph, y)
        lib.ggml_backend_alloc_ctx_tensors_from_buft(rest, plain)
        lib.ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)
        found = np.empty((m, out), np.float32)

        def run() -> np.ndarray:
            assert lib.ggml_backend_graph_compute(self.backend, graph) == 0
            lib.ggml_backend_tensor_get(y, found.ctypes.data, 0, found.nbytes)
            return found

        return run


REPACKED = {"Q4_0", "Q4_K"}  # on x86


def layer(ggml: Ggml | None, name: str, m: int, out: int, n: int) -> dict[str, float]:
    """Competitor -> CPU seconds of one product."""
    rng = np.random.default_rng(0)
    w = np.tile(rng.normal(0, 0.02, (128, n)).astype(np.float32), (-(-out // 128), 1))[:out]
    e = codecs.quantize(w[:128], name, importance=np.ones(n, np.float32))
    e = stacked(e, out) if set(e.parts) == {"data"} else codecs.quantize(w, name, importance=np.ones(n, np.float32))
    x = torch.from_numpy(rng.normal(size=(m, n)).astype(np.float32))
    dense = torch.from_numpy(e.decode())
    half, rounded = dense.bfloat16(), x.bfloat16()

    def copies(nbytes: int) -> range:
        return range(-(-COLD // nbytes) if m < 16 else 1)

    runs: dict[str, list[Callable[[], Any]]] = {}
    for activations in ("int8", "float"):
        runs[activations] = [partial(QuantLinear(e, activations=activations), x) for _ in copies(e.nbytes)]
    for kind, (a, b) in {"torch f32": (x, dense), "torch bf16": (rounded, half)}.items():
        runs[kind] = [partial(torch.nn.functional.linear, a, b.clone()) for _ in copies(b.nbytes)]
    if ggml is not None and name in ggml.ids and set(e.parts) == {"data"}:
        data = e.parts["data"]
        for kind in ("ggml", "repacked") if name in REPACKED else ("ggml",):
            runs[kind] = [ggml.product(name, data, x.numpy(), out, kind == "repacked") for _ in copies(data.nbytes)]
    best = dict.fromkeys(runs, np.inf)
    for _ in range(RUNS):
        for k, layers in runs.items():
            began = time.process_time()
            for run in layers:
                run()
            best[k] = min(best[k], (time.process_time() - began) / len(layers))
    if (native.has(name, "matmul_int8") or codecs.get(name).integers is not None) and not name.endswith("-act"):
        return best
    return {k: t for k, t in best.items() if k != "int8"}  # the same as float there


def stacked(e: codecs.Encoded, out: int) -> codecs.Encoded:
    """Its rows over and over: some types take minutes to encode."""
    data = empty((out, e.parts["data"].shape[1]), np.uint8)
    data[:] = np.tile(e.parts["data"], (-(-out // e.shape[0]), 1))[:out]
    return codecs.Encoded(e.codec, (out, e.shape[1]), {"data": data})


def generation(path: Path, tokens: int, prompt: int, threads: int) -> None:
    """Tokens a second of a model here and in llama.cpp."""
    import xllamacpp

    import quantforge as qf

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 1000, (1, prompt)))
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_predict = prompt + tokens + 64, 1, tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    server = xllamacpp.Server(params)

    def theirs(n: int, made: int) -> None:
        wanted = {"n_predict": made, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions({"prompt": ids[0, :n].tolist(), **wanted})

    def ours(model: Any, n: int, made: int) -> None:
        model.generate(ids[:, :n], max_new_tokens=made, min_new_tokens=made, do_sample=False, pad_token_id=0)

    runs = {f"quantforge, {a}": partial(ours, qf.load(path, activations=a)) for a in ("int8", "float")} | {"llama.cpp": theirs}
    best: dict[tuple[str, bool], float] = {}
    for _ in range(4):  # the first to warm up
        for k, run in runs.items():
            for whole in (True, False):
                began = clock()
                run(prompt if whole else 1, 1 if whole else tokens)
                took = clock() - began
                best[k, whole] = min(best.get((k, whole), np.inf), took)
    print(f"\n| {path.name}, tokens a second, {threads} thread{'s' * (threads > 1)} | prompt of {prompt} | {tokens} generated |")
    print("|---|---|---|")
    for k in runs:
        print(f"| {k} | {prompt / best[k, True]:.1f} | {tokens / best[k, False]:.1f} |")


COLUMNS = ("int8", "float", "torch f32", "torch bf16", "ggml", "repacked")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", nargs="+")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with torch.inference_mode():
        tables(options)


def tables(options: argparse.Namespace) -> None:
    """Print those that are asked for."""
    if options.model:
        for path in options.model:
            generation(path, options.generate, options.prompt, options.threads)
        return
    torch.set_num_threads(1)
    try:
        ggml = Ggml()
    except (ImportError, AttributeError, ValueError) as e:
        print(f"without ggml: {e}")
        ggml = None
    out, n = options.shape
    for m in options.tokens:
        print(f"\n| {m} token{'s' * (m > 1)} | {' | '.join(COLUMNS)} | speed beside the faster ggml |")
        print("|---" * (len(COLUMNS) + 2) + "|")
        for name in options.type or TYPES.get(m, TYPES[1]).split():
            found = layer(ggml, name, m, out, n)
            cells = [f"{1e3 * found[k]:.{2 if m < 16 else 0}f}" if k in found else "–" for k in COLUMNS]
            peer = min((found[k] for k in ("ggml", "repacked") if k in found), default=None)
            ratio = "–" if peer is None else f"{peer / found.get('int8', found['float']):.2f}"
            print(f"| {name} | {' | '.join(cells)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
