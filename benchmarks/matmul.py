"""CPU products with stored weights: ours, torch's on decoded weights, llama.cpp's on the same bytes.

    python benchmarks/matmul.py [--type Q4_K ...] [--tokens 1 512] [--shape 4096 4096] [--model FILE.gguf]

One layer: one thread, CPU time, the best of several runs in turns, all in this process. `float` and `int8` are
QuantLinear's activations; ggml's own are 8 bits wide; `ggml repacked` is what llama.cpp makes of the weights
while loading, where it has such a layout. ggml comes from the xllamacpp wheel. With --model: tokens a second of a
whole model, prompt and generation, beside llama.cpp's on the same file.
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

from quantforge import codecs
from quantforge.arrays import empty
from quantforge.nn import QuantLinear

RUNS = 7
TYPES = ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ2_XXS"]


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


def layer(ggml: Ggml | None, name: str, m: int, out: int, n: int) -> dict[str, tuple[float, np.ndarray]]:
    """Competitor -> CPU seconds and result."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.02, (64, n)).astype(np.float32)
    some = codecs.quantize(w, name, importance=np.ones(n, np.float32))
    data = empty((out, some.parts["data"].shape[1]), np.uint8)
    data[:] = np.tile(some.parts["data"], (out // 64, 1))
    e = codecs.Encoded(some.codec, (out, n), {"data": data})
    x = torch.from_numpy(rng.normal(size=(m, n)).astype(np.float32))
    dense = torch.from_numpy(e.decode())
    runs: dict[str, Callable[[], Any]] = {}
    for activations in ("int8", "float"):
        runs[activations] = partial(QuantLinear(e, activations=activations), x)
    runs["torch f32"] = lambda: torch.nn.functional.linear(x, dense)
    half, rounded = dense.bfloat16(), x.bfloat16()
    runs["torch bf16"] = lambda: torch.nn.functional.linear(rounded, half)
    if ggml is not None:
        runs["ggml"] = ggml.product(name, data, x.numpy(), out, False)
        if name in REPACKED:
            runs["ggml repacked"] = ggml.product(name, data, x.numpy(), out, True)
    best = dict.fromkeys(runs, np.inf)
    found: dict[str, Any] = {}
    for _ in range(RUNS):
        for k, run in runs.items():
            began = time.process_time()
            found[k] = run()
            best[k] = min(best[k], time.process_time() - began)
    return {k: (best[k], np.asarray(torch.as_tensor(found[k]).float())) for k in runs}


def generation(path: Path, tokens: int, prompt: int) -> None:
    """Tokens a second of a model here and in llama.cpp, all threads."""
    import xllamacpp

    import quantforge as qf

    threads = torch.get_num_threads()
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 1000, (1, prompt)))
    for activations in ("int8", "float"):
        model = qf.load(path, activations=activations)
        speeds = []
        for n in (prompt, 1):
            model.generate(ids[:, :n], max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)  # warm
            began = time.perf_counter()
            made = tokens if n == 1 else 1
            model.generate(ids[:, :n], max_new_tokens=made, min_new_tokens=made, do_sample=False, pad_token_id=0)
            speeds.append((n if n > 1 else made) / (time.perf_counter() - began))
        print(
            f"{path.name}  {activations:<12} prompt {speeds[0]:8.1f} t/s   generation {speeds[1]:7.2f} t/s   ({threads} threads)"
        )
        del model
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_predict = prompt + tokens + 64, 1, tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    server = xllamacpp.Server(params)
    for n in (prompt, 1):
        answer = server.handle_completions(
            {"prompt": ids[0, :n].tolist(), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        )
        t = answer["timings"]
        speeds = [t["prompt_per_second"], t["predicted_per_second"]]
        print(f"{path.name}  llama.cpp     prompt {speeds[0]:8.1f} t/s   generation {speeds[1]:7.2f} t/s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", nargs="+", default=TYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    if options.model:
        for path in options.model:
            generation(path, options.generate, options.prompt)
        return
    torch.set_num_threads(1)
    try:
        ggml = Ggml()
    except (ImportError, AttributeError, ValueError) as e:
        print(f"without ggml: {e}")
        ggml = None
    out, n = options.shape
    for m in options.tokens:
        print(
            f"\n{m} tokens, {out} x {n}, one thread, ms of CPU time; GB/s of stored bytes and ratio to the faster ggml for int8"
        )
        heads = ("int8", "float", "f32", "bf16", "ggml", "repacked", "GB/s", "ggml/int8", "error")
        print(f"{'type':<8} " + " ".join(f"{h:>9}" for h in heads))
        for name in options.type:
            found = layer(ggml, name, m, out, n)
            ms = {k: f"{1e3 * t:.2f}" for k, (t, _) in found.items()}
            peer = min((found[k][0] for k in ("ggml", "ggml repacked") if k in found), default=np.nan)
            mine, want = found["int8"][1], found["torch f32"][1]
            error = np.linalg.norm(mine - want) / np.linalg.norm(want)
            rate = codecs.get(name).nbytes((out, n)) / found["int8"][0] / 1e9
            columns = " ".join(
                f"{ms.get(k, '-'):>9}" for k in ("int8", "float", "torch f32", "torch bf16", "ggml", "ggml repacked")
            )
            print(f"{name:<8} {columns} {rate:>9.1f} {peer / found['int8'][0]:>9.2f} {error:>9.1e}", flush=True)


if __name__ == "__main__":
    main()
