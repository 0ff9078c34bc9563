"""The main job on the shipped model: convert, show sizes and errors, let real llama.cpp complete a prompt."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .conversion.convert import convert
from .conversion.run import Report
from .errors import NativeError

DATA = Path(__file__).with_name("data")
MODEL = DATA / "demo-model"
IMATRIX = MODEL / "llama.cpp-imatrix.gguf"
TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "IQ2_XXS")
SCORECARD_WINDOWS = 80
PROMPT = "The following example shows how to open a file and read"


def run(out: Path, say: Callable[[str], None], types: tuple[str, ...] = TYPES, prompt: str = PROMPT) -> list[Report]:
    """Convert the shipped model to each type in `out`; `say` gets the lines to show."""
    from .evaluation import scorecard  # torch, which MODEL's other users do without
    from .evaluation.report.markdown import render

    out.mkdir(parents=True, exist_ok=True)
    say(f"The shipped model: a 5.8 M-parameter Llama, bf16, {(MODEL / 'model.safetensors').stat().st_size:,} bytes\n")
    reports = []
    for kind in types:
        path = out / f"demo-{kind}.gguf"
        reports.append(convert(MODEL, path, kind, IMATRIX, force=True, measure=True))
    say(f"{'type':<8} {'bytes':>12} {'bpw':>7} {'seconds':>8}   relative error of the weights: median, worst")
    for r in reports:
        errors = sorted((t.rel_rmse or 0.0, t.name) for t in r.tensors)
        quantized = [e for e in errors if e[0] > 0] or errors
        median, worst = quantized[len(quantized) // 2], quantized[-1]
        say(f"{r.recipe:<8} {r.total_bytes:>12,} {r.bpw:>7.3f} {r.seconds:>8.2f}   {median[0]:.3g}, {worst[0]:.3g} ({worst[1]})")
    if importlib.util.find_spec("xllamacpp") is None:
        say("\nTo hear the files speak in llama.cpp: pip install 'quantforge[llama-cpp]'")
    else:
        say(f"\nllama.cpp, greedily, after: {prompt!r}")
        for r in reports:
            say(f"{r.recipe:<8} {complete(Path(r.path), prompt)!r}")
    say(f"\nScorecard: {', '.join(scorecard.TYPES)} against the original, on {SCORECARD_WINDOWS} windows of held-out text\n")
    card = out / "scorecard.html"
    evaluation = scorecard.compare(MODEL, memory="5MB", chunks=SCORECARD_WINDOWS, report=[card, out / "scorecard.json"])
    say(render(evaluation))
    say(f"To look at: {card}")
    return reports


def complete(path: Path, prompt: str, tokens: int = 24) -> str:
    """What llama.cpp (the xllamacpp wheel) says after `prompt`, greedily."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256
    parameters.cpuparams.n_threads = 2
    with _silence():
        server = xllamacpp.Server(parameters)
        answer = server.handle_completions({"prompt": prompt, "max_tokens": tokens, "temperature": 0.0})
        del server  # it logs when it goes, too
    text = json.loads(answer) if isinstance(answer, str) else answer
    if "choices" not in text:
        raise NativeError(f"llama.cpp could not complete with {path}: {text}")
    return str(text["choices"][0]["text"])


class _silence:
    """llama.cpp logs to the process's stderr; what it has to say is only of interest when it fails."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *exception: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
