"""benchmarks/gpu.py runs to its end without a GPU: the same code, tiny and without graphs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run(tmp_path):
    file = tmp_path / "run.json"
    printed = run("--device", "cpu", "--smoke", "--codecs", "Q4_0,IQ2_XXS", "--m", "1,9", "--json", str(file))
    found = json.loads(file.read_text())
    assert found["finished"]
    rows = {(r["name"], r["m"]): r for r in found["rows"]}
    for name in ("torch bf16", "torch int4 (tinygemm)", "decode + torch (Q4_0)", "Q4_0", "IQ2_XXS"):
        for m in (1, 9):
            row = rows[name, m]
            assert row["us"] > 0 and math.isfinite(row["error"]) and row["error"] < 4e-3
            assert name in printed
    assert rows["Q4_0", 1]["nbytes"] == 256 * 512 * 18 // 32
    assert {e["codec"] for e in found["encode"]} >= {"Q4_K", "IQ2_XXS"}
    assert [g["model"] for g in found["model"] if g["what"] == "generate"] == ["bf16", "Q4_K_M", "IQ2_XXS"]
    assert all(g["generate_tokens_s"] > 0 and g["graph_tokens_s"] > 0 for g in found["model"] if g["what"] == "generate")
    assert any(g["what"] == "evaluate" and g["tokens_s"] > 0 for g in found["model"])
    assert "model" not in found["missing"] and "encode" not in found["missing"]
    table = run("--readme", str(file))
    assert "| Q4_0 |" in table and "| IQ2_XXS |" in table and "tokens/s" in table


def test_without_a_device_it_says_so():
    import torch

    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("no CUDA device") and "Traceback" not in done.stderr
