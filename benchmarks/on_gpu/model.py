"""Whole models: tokens a second of a random Llama (1.0 B parameters) as bf16 and quantized, of the evaluator; encoding."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantforge as qf
from quantforge import codecs
from quantforge.calibration.importance import Importance

from . import harness

SIZES = {False: (24, 2048, 5632), True: (1, 256, 512)}
"""Smoke -> layers, hidden size, feed-forward size."""

RECIPES = ("Q4_K_M", "IQ2_XXS")
WAYS = ("graph", "generate", "compiled")
PROMPT = 16

Found = dict[str, Any]


def encode_rows(device: str, smoke: bool) -> Iterator[Found]:
    """Encoding speed of a matrix that is on the device already, without its way back."""
    from quantforge import device as devices

    here, n = harness.of(device), 256 if smoke else 8192
    w = torch.from_numpy(harness.noise(256, n)).to(here).repeat(n // 256, 1)
    for name in ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"):
        codec = codecs.get(name)
        if here.type == "cuda" and not devices.has_kernel(codec, "encode"):
            continue
        importance = np.ones(n, np.float32) if codec.needs_importance else None

        def call(codec: Any = codec, importance: Any = importance) -> None:
            if here.type == "cuda":
                devices.encode(codec, w, importance)
                harness.synchronize(here)
            else:
                codecs.quantize(w[:16].numpy(), codec, importance=importance)

        call()
        seconds = statistics.median(harness.clocked([call]) for _ in range(3))
        rows = len(w) if here.type == "cuda" else 16
        yield {"codec": name, "gweights_s": rows * n / seconds / 1e9}


# ---- generation


def prepare(work: str, device: str, smoke: bool) -> Iterator[Found]:
    """The random model, as bf16 and in every recipe, in the folder `work`."""
    from benchmarks.convert import make_model

    source = Path(work) / "bf16"
    parameters = make_model(source, *SIZES[smoke])
    yield {"what": "made", "model": "bf16", "parameters": parameters}
    for recipe in RECIPES:
        importance = flat_importance(source) if recipe.startswith("IQ") else None
        began = time.perf_counter()
        report = qf.convert(source, Path(work) / f"{recipe}.gguf", recipe=recipe, importance=importance, device=device)
        seconds = time.perf_counter() - began
        yield {"what": "convert", "model": recipe, "seconds": seconds, "parameters": parameters, "bytes": report.total_bytes}


def flat_importance(source: Path) -> Importance:
    """Ones: IQ2_XXS asks for importance, and random weights have no better."""
    found = qf.plan(source, source.with_suffix(".gguf"), recipe="Q8_0").tensors
    return Importance({t.name: np.ones(t.shape[-1], np.float32) for t in found if len(t.shape) == 2})


def load(work: str, name: str, device: torch.device) -> Any:
    """One of the models, bf16 activations."""
    if name == "bf16":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(Path(work) / name, dtype=torch.bfloat16).to(device)
    return qf.load(Path(work) / f"{name}.gguf", device=device.type, dtype="bfloat16")


def generate_rows(work: str, name: str, device: str, smoke: bool, ways: tuple[str, ...] = WAYS) -> Iterator[Found]:
    """Greedy decoding of one sequence, tokens/s: the step as a CUDA graph, `generate`, `generate` with torch.compile.

    The last is transformers' own way to CUDA graphs: a static cache, and a step compiled with mode "reduce-overhead".
    """
    run_of = {"graph": _graph, "generate": _plain, "compiled": _compiled}
    here, tokens = harness.of(device), 8 if smoke else 128
    before = torch.cuda.memory_allocated() if here.type == "cuda" else 0
    model = load(work, name, here)
    memory = torch.cuda.memory_allocated() - before if here.type == "cuda" else 0
    prompt = torch.arange(1, 1 + PROMPT, device=here)[None]
    with torch.inference_mode():
        plain = _generate(model, prompt, tokens)
        for how in ways:
            row = {"what": "generate", "how": how, "model": name, "memory": memory}
            try:
                yield row | run_of[how](model, prompt, tokens, plain)
            except Exception as e:  # the next way may work
                yield row | {"error": f"{type(e).__name__}: {str(e)[:300]}"}


def _generate(model: Any, prompt: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """The ids that are new: [1, tokens]."""
    made = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    harness.synchronize(prompt.device)
    found: torch.Tensor = made[:, PROMPT:]
    return found


def _agreement(found: torch.Tensor, plain: torch.Tensor) -> float:
    """The share of tokens before the first that differs: a random model is often undecided."""
    same = (found == plain).int().cumprod(1)
    return float(same.sum()) / same.numel()


def _plain(model: Any, prompt: torch.Tensor, tokens: int, plain: torch.Tensor) -> Found:
    seconds = harness.clocked([lambda: _generate(model, prompt, tokens)])
    return {"tokens_s": tokens / seconds}


def _compiled(model: Any, prompt: torch.Tensor, tokens: int, plain: torch.Tensor) -> Found:
    """`generate(cache_implementation="static")`, which compiles the step on CUDA, and says whether graphs were captured."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True)  # a break would be an error
    if not prompt.is_cuda:  # traced, but no code is generated
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    began = time.perf_counter()
    options = {"cache_implementation": "static", "compile_config": config}
    first = _generate(model, prompt, tokens, **options)  # compiles, captures
    compile_seconds = time.perf_counter() - began
    seconds = min(harness.clocked([lambda: _generate(model, prompt, tokens, **options)]) for _ in range(2))
    return {
        "tokens_s": tokens / seconds,
        "first_seconds": compile_seconds,
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "agreement": _agreement(first, plain),
    }


def _graph(model: Any, prompt: torch.Tensor, tokens: int, plain: torch.Tensor) -> Found:
    """A step over a static cache, captured once and replayed: what the kernels allow, without Python between them."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 2 * tokens + 8)
    ids = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    at = torch.full((1, 1), PROMPT, device=prompt.device)
    made: list[torch.Tensor] = [ids.clone()]

    def step() -> None:
        logits = model(ids, past_key_values=cache, position_ids=at, use_cache=True).logits
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        at.add_(1)

    replay: Callable[[], Any] = step
    if prompt.is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
                made.append(ids.clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    while len(made) < tokens:
        replay()
        made.append(ids.clone())
    agreement = _agreement(torch.cat(made, 1), plain)
    harness.synchronize(prompt.device)

    def all_of_them() -> None:
        for _ in range(tokens):
            replay()
        harness.synchronize(prompt.device)

    return {"tokens_s": tokens / harness.clocked([all_of_them]), "agreement": agreement}


def evaluate_rows(work: str, device: str, smoke: bool) -> Iterator[Found]:
    """Perplexity and KL divergence of both recipes, and of bf16: tokens a second of the whole run."""
    ctx, chunks = (64, 1) if smoke else (512, 40)
    files = {name: Path(work) / f"{name}.gguf" for name in RECIPES}
    began = time.perf_counter()
    report = qf.evaluate(
        files, reference=Path(work) / "bf16", ctx=ctx, chunks=chunks, metrics=["ppl", "kld"], device=device, noise_floor=False
    )
    seconds = time.perf_counter() - began
    scored = report.text["tokens_scored"]
    yield {"what": "evaluate", "models": 1 + len(files), "tokens_s": ctx * chunks / seconds, "seconds": seconds, "scored": scored}


def patience(smoke: bool) -> float:
    """Seconds that compiling a model may take."""
    return 240 if smoke or (os.cpu_count() or 1) > 4 else 600
