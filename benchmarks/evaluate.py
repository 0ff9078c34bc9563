"""Evaluation of a reference and three candidates at once, against llama-perplexity's passes, in one run.

    python benchmarks/evaluate.py --llama-perplexity BIN [--chunks 300] [--threads 2] [--types Q8_0,Q4_K_M,Q4_0]
           [--synthetic] [--work DIR] [--json FILE]

The shipped model at context 256, or with --synthetic a random 1 B-parameter Llama at 512. llama-perplexity
makes a base pass that writes the reference's logits, and one KLD pass for each candidate that reads them;
quantforge makes one pass for all. Every step is a process of its own, start-up included; peak RSS is the
kernel's figure. Both use the same F16 GGUF as reference, the same text and the same windows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import quantforge as qf
from benchmarks.convert import make_model
from quantforge.demo import MODEL

TEXT = MODEL.parent / "text" / "heldout.txt"
OURS = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[1]))
import quantforge as qf
e = qf.evaluate(json.loads(sys.argv[2]), reference=sys.argv[3], text=sys.argv[4], ctx=int(sys.argv[5]), chunks=int(sys.argv[6]),
                metrics=["ppl", "kld", "flips"], noise_floor=sys.argv[7] == "1")
print(json.dumps({"models": [{k: getattr(m, k) for k in ("name", "ppl", "kld_mean", "kld_p99", "same_top")} for m in e.models],
                  "reference": e.reference.ppl, "scored": e.text["tokens_scored"]}))
"""


def measure(command: list[str], threads: int) -> dict[str, Any]:
    """Wall and CPU seconds, peak RSS and output of a process."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        log.seek(0)
        output = log.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{output[-2000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024, "output": output}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama-perplexity", required=True, metavar="BIN")
    p.add_argument("--types", default="Q8_0,Q4_K_M,Q4_0")
    p.add_argument("--chunks", type=int)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--synthetic", action="store_true")
    p.add_argument("--work", type=Path)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    types = a.types.split(",")
    ctx, chunks = (512, a.chunks or 4) if a.synthetic else (256, a.chunks or 300)
    with tempfile.TemporaryDirectory() as scratch:
        work = a.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        source = MODEL
        if a.synthetic and not (source := work / "model-1b").exists():
            make_model(source, 22, 2048, 5632)
        paths = {t: work / f"{source.name}-{t}.gguf" for t in ("F16", *types)}
        for t, path in paths.items():
            if not path.exists():
                qf.convert(source, path, t)
        candidates = json.dumps({t: str(paths[t]) for t in types})
        ours = [sys.executable, "-c", OURS, str(a.threads), candidates, str(paths["F16"]), str(TEXT), str(ctx), str(chunks)]
        logits = work / "logits.kld"
        theirs = [a.llama_perplexity, "-f", str(TEXT), "-c", str(ctx), "--chunks", str(chunks), "-t", str(a.threads)]
        theirs += ["--kl-divergence-base", str(logits)]

        print(f"{source.name}: reference F16 and {', '.join(types)}; {chunks} windows of {ctx}; {a.threads} threads")
        print(f"{'step':<44} {'wall s':>8} {'CPU s':>8} {'RSS MB':>8} {'disk MB':>8}")

        def show(step: str, m: dict[str, Any], disk: float) -> dict[str, Any]:
            print(f"{step:<44} {m['wall']:>8.1f} {m['cpu']:>8.1f} {m['rss'] / 1e6:>8.0f} {disk / 1e6:>8.1f}", flush=True)
            return m

        steps = []
        base = show("llama-perplexity base (F16)", measure([*theirs, "-m", str(paths["F16"])], a.threads), 0)
        disk = logits.stat().st_size
        steps.append(base)
        passes = {}
        for t in types:
            m = measure([*theirs, "-m", str(paths[t]), "--kl-divergence"], a.threads)
            steps.append(show(f"llama-perplexity KLD ({t})", m, 0))
            passes[t] = {
                "ppl": float(re.search(r"Mean PPL\(Q\)\s*:\s*([0-9.]+)", m["output"])[1]),  # type: ignore[index]
                "kld": float(re.search(r"Mean\s+KLD:\s*([0-9.]+)", m["output"])[1]),  # type: ignore[index]
            }
        logits.unlink()
        total = {"wall": sum(s["wall"] for s in steps), "cpu": sum(s["cpu"] for s in steps), "rss": max(s["rss"] for s in steps)}
        show("llama-perplexity, all", total, disk)
        one = show("quantforge, all at once", measure([*ours, "0"], a.threads), 0)
        floor = show("quantforge, with the noise floor as well", measure([*ours, "1"], a.threads), 0)
        got = json.loads(one["output"].strip().splitlines()[-1])
        seen = chunks * ctx * (1 + len(types))
        print(f"ratio of wall time {total['wall'] / one['wall']:.2f}, of CPU time {total['cpu'] / one['cpu']:.2f}; "
              f"{seen / one['wall']:,.0f} against {seen / total['wall']:,.0f} tokens/s")  # fmt: skip
        print(f"\n{'type':<10} {'PPL ours':>10} {'llama.cpp':>10} {'KLD ours':>10} {'llama.cpp':>10}")
        for m in got["models"]:
            its = passes[m["name"]]
            print(f"{m['name']:<10} {m['ppl']:>10.4f} {its['ppl']:>10.4f} {m['kld_mean']:>10.6f} {its['kld']:>10.6f}")
        if a.json:
            for m in (*steps, one, floor):
                m.pop("output", None)
            result = {"llama_perplexity": steps, "disk": disk, "quantforge": one, "with_noise_floor": floor, "figures": got}
            a.json.write_text(json.dumps({**result, "llama_figures": passes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
