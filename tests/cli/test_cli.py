"""The command line as a user meets it: what it prints, what it refuses, what it leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge as qf
from quantforge import backends, layouts, methods
from quantforge.cli import group
from quantforge.conversion.options import writable
from quantforge.demo import MODEL
from tests import adapters

# found from any directory, installed or not
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def quantforge(*arguments: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantforge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENV, **env}, stdin=subprocess.DEVNULL)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv=['quantforge', '--help']\nfrom quantforge.cli import main\ntry:\n main()\nexcept SystemExit: pass\n"
    )
    code += "assert not {'torch', 'numpy', 'gguf', 'transformers'} & set(sys.modules), 'slow start'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    for command in group.commands:
        assert re.search(rf"^  {command} ", done.stdout, re.M)


def test_convert_help_lists_what_the_registries_hold() -> None:
    text = " ".join(quantforge("convert", "--help").stdout.replace("-\n", "-").split()).replace("- ", "-")
    for name in (*writable(), *layouts.names(), *methods.names(), *backends.names()):
        assert name in text


def test_adapters_are_merged_in_order_or_converted_alone(tmp_path: Path) -> None:
    adapters.llama(tmp_path / "m")
    q = "model.layers.0.self_attn.q_proj"
    tensors = adapters.low_rank(q, 32, 32)
    a = adapters.save(tmp_path / "a", tensors)
    quantforge("convert", tmp_path / "m", tmp_path / "o", "-t", "F32", "--lora", a, "--lora", f"{a}:-0.25")
    delta = 0.75 * 2 * tensors[f"{q}.lora_B.weight"] @ tensors[f"{q}.lora_A.weight"]
    with qf.open(tmp_path / "m") as before, qf.open(tmp_path / "o") as after:
        moved = after.read(f"{q}.weight").decode() - before.read(f"{q}.weight").decode()
    assert abs(moved - delta).max() < 1e-6
    quantforge("convert", a, tmp_path / "a.gguf", "--base", tmp_path / "m")
    with qf.open(tmp_path / "a.gguf") as source:
        assert list(source.weights) == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
    refused = quantforge("convert", a, tmp_path / "x.gguf", check=False)
    assert refused.returncode == 1 and f"--lora {a}" in refused.stderr


def test_options_of_convert_are_those_of_the_api() -> None:
    known = set(inspect.signature(qf.convert).parameters) - {"measure", "progress", "scheme"}
    types = {"kind", "output_tensor_type", "token_embedding_type", "pure", "keep_output"}
    output = {"dry_run", "report", "as_json"}
    assert {p.name for p in group.commands["convert"].params} == known | types | output


def test_convert_and_inspect(tmp_path: Path) -> None:
    out, report = tmp_path / "m.gguf", tmp_path / "report.json"
    plan = json.loads(quantforge("convert", MODEL, out, "--type", "q4_k_m", "--dry-run", "--json").stdout)
    assert not out.exists()
    done = quantforge("convert", MODEL, out, "--type", "q4_k_m", "--report", report)
    assert "Q4_K_M" in done.stdout
    assert done.stderr == ""
    seen = json.loads(quantforge("inspect", out, "--json").stdout)
    for found in (plan, seen):
        assert found["total_bytes"] == out.stat().st_size
        assert found["metadata"]["general.architecture"] == "llama"
    row = {"name": "blk.0.attn_q.weight", "type": "Q4_K", "shape": [256, 256], "bytes": 36864}
    assert [row.items() <= t.items() for t in seen["tensors"]].count(True) == 1
    assert [row.items() <= t.items() for t in plan["tensors"]].count(True) == 1
    written = json.loads(report.read_text())
    assert {t["name"] for t in written["tensors"]} == {t["name"] for t in plan["tensors"]}
    assert all(t["rel_rmse"] is not None for t in written["tensors"])
    text = quantforge("inspect", out, "--tensors", "--hash").stdout
    assert "blk.5.ffn_down.weight" in text
    assert "[4096 values]" in text


def test_what_other_tools_call_it(tmp_path: Path) -> None:
    for i, arguments in enumerate((["quantize", "-t"], ["convert", "--outtype"])):
        quantforge(arguments[0], MODEL, tmp_path / f"{i}.gguf", arguments[1], "q4_0")
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()
    both = quantforge("inspect", tmp_path / "0.gguf", tmp_path / "1.gguf")
    assert "0.gguf:" in both.stdout and "1.gguf:" in both.stdout
    assert len(json.loads(quantforge("inspect", tmp_path / "0.gguf", tmp_path / "1.gguf", "--json").stdout)) == 2


@pytest.mark.parametrize("place", ["before", "behind"])
def test_quiet_and_verbose_stand_where_they_are_put(place: str, tmp_path: Path) -> None:
    """IQ2_XXS without an imatrix is worth a warning."""
    command = ["convert", MODEL, tmp_path / "m.gguf", "-t", "IQ2_XXS", "--force"]
    said = {flag: quantforge(*([flag, *command] if place == "before" else [*command, flag])).stderr for flag in ("-q", "-v")}
    assert "warning" not in said["-q"] and "warning" in said["-v"] and "info" in said["-v"]


def test_types_json() -> None:
    rows = {r["name"]: r for r in json.loads(quantforge("types", "--json").stdout)}
    assert rows["Q4_K"] == {
        "name": "Q4_K",
        "block_size": 256,
        "type_size": 144,
        "bpw": 4.5,
        "ggml_type": 12,
        "encode": True,
        "decode": True,
        "needs_importance": False,
    }
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K"} <= set(rows)
    assert {"TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"} <= set(rows)


def test_user_rules(tmp_path: Path) -> None:
    rules = ["--tensor-type", r"attn_v=Q8_0", "--tensor-type", r"attn=Q6_K", "--output-tensor-type", "Q5_0"]
    plan = json.loads(quantforge("convert", MODEL, tmp_path / "m.gguf", "-t", "Q4_0", *rules[:4], "--dry-run", "--json").stdout)
    kinds = {t["name"]: t["type"] for t in plan["tensors"]}
    assert kinds["blk.0.attn_v.weight"] == "Q8_0"
    assert kinds["blk.0.attn_k.weight"] == "Q6_K"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "nowhere", "x.gguf"], ["nowhere", "No such file"]),
        (["convert", MODEL, "x.gguf", "--type", "Q4_KM"], ["Q4_KM", "Q4_K_M"]),
        (["convert", MODEL, "x.gguf", "--report", "x.html"], ["x.html", "*.json"]),
        (["compare", MODEL, "--memory", "6"], ["--memory '6'", "6GB"]),
        (["convert", MODEL, "x.gguf", "--tensor-type", "attn_x=Q8_0"], ["attn_x"]),
        (["convert", MODEL, "x.gguf", "--tensor-type", "attn_v=Q9"], ["Q9"]),
        (["convert", MODEL, "x.gguf", "--tensor-type", "attn_v"], ["REGEX=TYPE"]),
        (["convert", MODEL, "x.gguf", "--tensor-type", "(=Q8_0"], ["("]),
        (["convert", MODEL, "x.gguf", "--imatrix", MODEL / "config.json"], ["config.json"]),
        (["convert", MODEL, "x.gguf", "--imatrix", "nowhere.gguf"], ["nowhere.gguf"]),
        (["convert", MODEL, "no-dir/x.gguf"], ["no-dir"]),
        (["convert", MODEL / "config.json", "x.gguf"], ["config.json"]),
        (["convert", MODEL, "x.gguf", "--recipe", "nowhere.toml"], ["nowhere.toml"]),
        (["inspect", MODEL / "tokenizer.json"], ["tokenizer.json"]),
        (["convert", MODEL], ["OUT", "--help"]),
        (["convert", MODEL, "x.gguf", "--threads", "0"], ["--threads"]),
        (["convert", MODEL, "out.npy"], ["*.npy", "*.gguf", "safetensors"]),
        (["convert", MODEL, "out", "--format", "gptk"], ["gptk", "did you mean gptq"]),
        (["convert", MODEL, "out", "--max-shard-size", "much"], ["--max-shard-size", "much", "6GB"]),
        (["convrt"], ["convrt"]),
    ],
)
def test_every_failure_is_one_line(arguments: list[str | Path], words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantforge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_isa() -> None:
    done = quantforge("convert", MODEL, os.devnull + ".gguf", check=False, QUANTFORGE_ISA="avx9000")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
