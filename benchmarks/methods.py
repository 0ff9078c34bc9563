"""What calibrated methods are worth: KLD on the shipped model at equal bytes, as a Markdown table.

Windows and scoring as in llama-perplexity's run of the same model: the first 300 windows of 256 tokens of the
held-out text, the second half of each scored. "none" is rtn without importance, "imatrix" with llama.cpp's file.

Types like int3-g128 are symmetric integers for the linear layers of the blocks, in a GPTQ checkpoint.

    python benchmarks/methods.py [--types Q3_K_S,Q2_K] [--methods none,imatrix,gptq] [--chunks 300] [--calibration-chunks 128]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import quantforge as qf
from quantforge.demo import IMATRIX, MODEL

TYPES = "int4-g128,int3-g128,int2-g64,Q4_0,Q4_K_S,Q3_K_S,Q2_K,IQ3_XXS,IQ2_XXS"
METHODS = "none,imatrix,gptq,awq,awq+gptq"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--chunks", type=int, default=300, help="windows that are scored")
    parser.add_argument("--calibration-chunks", type=int, default=128)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    given = parser.parse_args()
    methods, rows = given.methods.split(","), []
    print("| type | bytes | " + " | ".join(methods) + " |\n|---|---|" + "---|" * len(methods), flush=True)
    for kind in given.types.split(","):
        integers = re.fullmatch(r"int(\d)-g(\d+)", kind)
        options: dict[str, Any] = {"recipe": kind}
        if integers:
            options = {"format": "gptq", "bits": int(integers[1]), "group_size": int(integers[2]), "symmetric": True}
        with tempfile.TemporaryDirectory() as directory:
            files, sizes, seconds = {}, set(), {}
            for method in methods:
                out = Path(directory) / (method if integers else f"{method}.gguf")
                plain = method in ("none", "imatrix")
                report = qf.convert(
                    MODEL,
                    out,
                    importance=IMATRIX if method != "none" else None,
                    method="rtn" if plain else method,
                    calibration_chunks=given.calibration_chunks,
                    **options,
                )
                files[method], seconds[method] = out, report.seconds
                sizes.add(sum(t.bytes for t in report.tensors))
            found = qf.evaluate(files, reference=MODEL, chunks=given.chunks, metrics=["ppl", "kld"], noise_floor=False)
            kld = {m.name: m.kld_mean for m in found.models}
            ppl = {m.name: m.ppl for m in found.models}
        size = " / ".join(f"{s:,}" for s in sorted(sizes))
        print(f"| {kind} | {size} | " + " | ".join(f"{kld[m]:.4f}" for m in methods) + " |", flush=True)
        rows.append({"type": kind, "bytes": sorted(sizes), "kld": kld, "ppl": ppl, "seconds": seconds})
        if given.json:
            Path(given.json).write_text(json.dumps(rows, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
