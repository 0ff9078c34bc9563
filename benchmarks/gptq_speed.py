"""GPTQ of a whole model: time, peak memory and what became of the matrices, beside GPTQModel's on the same machine.

Both get the same windows of token ids and write 4 bits in groups of 128, symmetric. Each runs in a process of its own.

    python benchmarks/gptq_speed.py MODEL [--chunks 64] [--ctx 512] [--threads 2] [--gptqmodel-python PATH] [--only quantforge]

GPTQModel needs an environment of its own (docs/checkpoints.md); on few cores also GPTQMODEL_CPU_WORKERS.
A model whose config.json says a shorter context than --ctx is run with --ctx all the same: give a copy of it that says more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

QUANTFORGE = """
import json, resource, sys, time
import torch
given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
import quantforge as qf
began, cpu = time.perf_counter(), time.process_time()
report = qf.convert(given["model"], given["out"], format="gptq", bits=4, group_size=128, method="gptq", force=True,
                    calibration_chunks=given["chunks"], calibration_ctx=given["ctx"], threads=given["threads"])
kept = [t.method for t in report.tensors if t.output_error is not None]
row = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
row["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(row | {"note": f"gptq kept for {kept.count('gptq')} of {len(kept)} matrices"}))
"""

GPTQMODEL = """
import json, resource, sys, time
given = json.loads(sys.argv[1])
import torch
torch.set_num_threads(given["threads"])
from gptqmodel import GPTQModel, QuantizeConfig
rows = [{"input_ids": r, "attention_mask": [1] * len(r)} for r in given["ids"]]
began, cpu = time.perf_counter(), time.process_time()
model = GPTQModel.load(given["model"], QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False), device="cpu")
model.quantize(rows, batch_size=1)
model.save(given["out"])
row = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
row["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(row | {"note": ""}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gptqmodel-python", metavar="PATH", help="an interpreter that has GPTQModel")
    parser.add_argument("--only", choices=("quantforge", "gptqmodel"))
    given = parser.parse_args()
    import quantforge as qf
    from quantforge.calibration.gather import read_windows
    from quantforge.tokenizer import Tokenizer

    with qf.open(given.model) as source:
        tokenizer = Tokenizer(Path(given.model), source.config, gguf_metadata=False)
        ids = read_windows("builtin", tokenizer, given.ctx, given.chunks, spread=True)
    programs = [("quantforge", sys.executable, QUANTFORGE)]
    if given.gptqmodel_python:
        programs.append(("gptqmodel", given.gptqmodel_python, GPTQMODEL))
    print("| | time | CPU time | peak RSS | |\n|---|--:|--:|--:|---|", flush=True)
    for name, python, code in programs:
        if given.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as directory:
            arguments = {"model": given.model, "out": f"{directory}/out", "chunks": given.chunks, "ctx": given.ctx}
            arguments |= {"threads": given.threads, "ids": ids.tolist() if name == "gptqmodel" else []}
            settings = {"OMP_NUM_THREADS": str(given.threads), "GPTQMODEL_CPU_WORKERS": str(max(2, given.threads))}
            # token ids are longer than a command line may be
            script = Path(directory) / "run.py"
            script.write_text(f"import sys\nsys.argv[1:] = [{json.dumps(arguments)!r}]\n{textwrap.dedent(code)}")
            environment = os.environ | settings | {"PYTHONPATH": str(Path(qf.__file__).parents[1])}
            done = subprocess.run([python, str(script)], env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:200]} | | | |", flush=True)
            continue
        row = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"seconds"')))
        figures = f"{row['seconds']:.0f} s | {row['cpu']:.0f} s | {row['rss'] / 1e9:.2f} GB | {row['note']}"
        print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
