"""Products of quantized weights on a GPU against bf16 and other libraries; encoding, GPTQ, generation, evaluation.

    python benchmarks/gpu.py [--quick] [--json FILE] [--parts products,encode,gptq,model] [--codecs ...] [--ways]
    python benchmarks/gpu.py --readme FILE...     the README's tables of a run, or of several on one machine
    python benchmarks/gpu.py --device cpu --smoke a dry run of the same code, tiny and without graphs

What is measured, and how: benchmarks/on_gpu/. Times and errors are in FILE as soon as they are known.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.on_gpu import report
from benchmarks.on_gpu.run import Run, load, merged
from benchmarks.on_gpu.worker import JobError, Worker

Job = tuple[str, Callable[..., Iterator[Any]], tuple[Any, ...]]
"""(name, function, arguments)"""

BEST = (8192, 8192)
SHAPES = [BEST, (4096, 4096), (4096, 14336), (14336, 4096), (28672, 8192)]  # rows, columns
MS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
FEW_MS = [1, 8, 16, 64, 256]
QUICK = ["Q8_0", "Q6_K", "Q4_K", "Q4_0", "IQ4_XS", "nf4", "int4-g128-sym", "IQ2_XXS"]
CODECS = [*QUICK, "int4-g128-asym", "Q5_K", "Q4_1", "IQ4_NL", "MXFP4", "IQ3_XXS"]


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--smoke", action="store_true", help="tiny shapes")
    p.add_argument("--quick", action="store_true", help="eight codecs, two shapes, five numbers of activations")
    p.add_argument("--ways", action="store_true", help="every way of each product, for products.UP_TO")
    p.add_argument("--tune", action="store_true", help="every configuration of the Triton kernels, and sizes of slabs")
    p.add_argument("--parts", default="products,encode,gptq,model,compiled", help="in this order")
    p.add_argument("--codecs", help="instead of the list, with commas")
    p.add_argument("--shapes", help="such as 8192x8192,4096x14336: rows x columns")
    p.add_argument("--m", help="numbers of activations, with commas")
    p.add_argument("--no-peers", action="store_true", help="of other libraries only torch's bf16")
    p.add_argument("--minutes", type=float, default=1e9, help="start nothing after this time")
    p.add_argument("--json", type=Path, help="where everything found goes, as it is found")
    p.add_argument("--readme", type=Path, nargs="+", help="print the README's tables of runs, and stop")
    return p.parse_args()


def product_jobs(a: argparse.Namespace) -> Iterator[Job]:
    """Every library and codec, the shape of the targets first."""
    from benchmarks.on_gpu import peers, products

    names = a.codecs.split(",") if a.codecs else QUICK if a.quick or a.smoke else CODECS
    usual = [(256, 512)] if a.smoke else SHAPES[:2] if a.quick else SHAPES
    shapes = [tuple(map(int, s.split("x"))) for s in a.shapes.split(",")] if a.shapes else usual
    ms = [int(m) for m in a.m.split(",")] if a.m else [1, 9] if a.smoke else FEW_MS if a.quick else MS
    for n, k in shapes:
        if a.device == "cuda":
            yield f"Triton {n}×{k}", products.compile_all, (names, [(n, k)], ms, a.device, a.ways, a.tune)
        for peer in peers.NAMES[:1] if a.no_peers else peers.NAMES:
            yield f"{peer} {n}×{k}", peers.rows, (peer, n, k, ms, a.device)
        for name in names:
            yield f"{name} {n}×{k}", products.rows, (name, n, k, ms, a.device, a.ways, a.tune)


def model_jobs(a: argparse.Namespace, work: str, parts: list[str]) -> Iterator[Job]:
    """The random model, what it does as bf16 and quantized, the evaluator, GPTQ of all of it."""
    from benchmarks.on_gpu import calibrated, model

    yield "model", model.prepare, (work, a.device, a.smoke)
    for part, ways in (("model", ("graph", "generate")), ("compiled", ("compiled",))):
        for name in ("bf16", *model.RECIPES) if part in parts else ():
            yield f"generate {name}, {' and '.join(ways)}", model.generate_rows, (work, name, a.device, a.smoke, ways)
        if part == "model" and part in parts:
            yield "evaluate", model.evaluate_rows, (work, a.device, a.smoke)
            yield "GPTQ of the model", calibrated.whole, (work, a.device, a.smoke)


class Session:
    """Does jobs one by one, writes what they find."""

    def __init__(self, run: Run, path: Path | None, minutes: float) -> None:
        self.run, self.path, self.began, self.until = run, path, time.monotonic(), 60 * minutes
        self.worker = Worker()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def do(self, jobs: list[Job], into: list[Any], patience: float = 120) -> None:
        """All of them; what does not work, or comes too late, is named in the report."""
        for i, (name, function, arguments) in enumerate(jobs, 1):
            if self.seconds > self.until:
                self.run.missing[name] = "out of time"
                continue
            began, count, why = self.seconds, 0, ""
            try:
                for found in self.worker.run(function, *arguments, patience=patience):
                    if isinstance(found, str):  # a remark, not a result
                        why = why or found
                        if found and not found.endswith("Triton kernels"):
                            self.run.missing[f"compile {found[:80]}"] = found
                    else:
                        into.append(found)
                        count += 1
                    print(".", end="", flush=True)  # a sign of life
                    self.save()
            except JobError as e:
                why = self.run.missing[name] = str(e)
            print(f"\n[{self.seconds:5.0f} s] {i}/{len(jobs)} {name}: {count} in {self.seconds - began:.1f} s {why}", flush=True)
            self.save()

    def save(self) -> None:
        self.run.seconds = self.seconds
        self.run.save(self.path)


def stopped(*_: Any) -> None:
    """Leave with what was found; `timeout` says so twice, to the process and to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def main() -> None:
    a = options()
    if a.readme:
        print("\n".join(report.readme(merged([load(path) for path in a.readme]))))
        return
    from benchmarks.on_gpu import calibrated, harness, model

    run = Run()
    session = Session(run, a.json, a.minutes)
    signal.signal(signal.SIGTERM, stopped)
    try:
        try:
            run.machine = next(iter(list(session.worker.run(harness.machine, a.device))))
        except JobError as e:
            sys.exit(str(e).removeprefix("RuntimeError: "))
        found: list[Any] = []
        session.do([("limits", harness.limits, (a.device, a.smoke))], found)
        run.limits = found[0] if found else None
        parts = a.parts.split(",")
        if "products" in parts:
            session.do(list(product_jobs(a)), run.rows, 300 if a.tune else 180)
        if "encode" in parts:
            session.do([("encode", model.encode_rows, (a.device, a.smoke))], run.encode)
        if "gptq" in parts:
            session.do([("GPTQ of a block", calibrated.blocks, (a.device, a.smoke))], run.model)
        if {"model", "compiled"} & set(parts):
            session.worker.stop()  # and its memory
            with tempfile.TemporaryDirectory() as work:
                session.do(list(model_jobs(a, work, parts)), run.model, model.patience(a.smoke))
        run.finished = True
    finally:
        session.worker.stop()
        session.save()
        print("\n".join(report.text(run)), flush=True)


if __name__ == "__main__":
    main()
