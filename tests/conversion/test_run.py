"""The main job, end to end: from a checkpoint to a file with the bytes that llama.cpp's tools write."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import formats
from quantforge.demo import IMATRIX, MODEL
from quantforge.inspection import describe

REFERENCE = json.loads((MODEL / "llama.cpp.json").read_text())["presets"]
CASES = [(p, kind) for p, kinds in REFERENCE.items() for kind in ("plain", "imatrix") if kinds.get(kind)]


@pytest.mark.parametrize(("preset", "kind"), CASES, ids=lambda x: x)
def test_tensors_equal_llama_quantize(preset: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    qf.convert(MODEL, out, recipe=preset, importance=IMATRIX if kind == "imatrix" else None)
    ours = {t["name"]: t for t in describe(out, hashes=True)["tensors"]}
    for name, (codec, digest) in REFERENCE[preset][kind].items():
        assert ours[name]["type"] == codec, name
        if digest is not None:
            assert ours[name]["sha256"] == digest, name


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the demo model with its weights as a plain dict, to be damaged."""
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    return directory


def edit(directory: Path, change: dict[str, np.ndarray | None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_bytes_do_not_depend_on_threads_or_instruction_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = set()
    for threads, isa in ((1, "scalar"), (2, ""), (7, "")):
        monkeypatch.setenv("QUANTFORGE_ISA", isa)
        out = tmp_path / f"{threads}{isa}.gguf"
        qf.convert(MODEL, out, recipe="Q4_K_M", importance=IMATRIX, threads=threads)
        outputs.add(out.read_bytes())
    assert len(outputs) == 1


def test_dry_run_tells_the_exact_size(tmp_path: Path) -> None:
    for recipe in ("F16", "Q4_K_M", "Q3_K_S"):
        out = tmp_path / f"{recipe}.gguf"
        plan = qf.plan(MODEL, out, recipe)
        assert not out.exists()
        report = qf.convert(MODEL, out, recipe)
        assert plan.total_bytes == out.stat().st_size == report.total_bytes
        assert [(t.name, t.type, t.bytes) for t in report.tensors] == [
            (t["name"], t["type"], t["bytes"]) for t in plan.to_json()["tensors"]
        ]


def test_measured_errors_are_the_files_errors(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    report = qf.convert(MODEL, out, "Q4_0", IMATRIX, measure=True, threads=2)
    qf.convert(MODEL, tmp_path / "f32.gguf", "F32")
    with qf.open(out) as ours, qf.open(tmp_path / "f32.gguf") as exact:
        for t in report.tensors:
            w, d = exact.read(t.name).decode(), ours.read(t.name).decode()
            expected = np.linalg.norm(d.astype(float) - w) / np.linalg.norm(w.astype(float))
            assert t.rel_rmse == pytest.approx(expected, rel=1e-4, abs=1e-9)
    weighted = {t.name: t.weighted_rel_rmse for t in report.tensors}
    assert weighted["blk.0.ffn_up.weight"] is not None
    assert weighted["blk.0.attn_norm.weight"] is None


def test_gguf_to_gguf_equals_the_direct_way(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "bf16.gguf", "BF16")
    qf.convert(tmp_path / "bf16.gguf", tmp_path / "two.gguf", "Q5_K_M")
    qf.convert(MODEL, tmp_path / "one.gguf", "Q5_K_M")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_requantizing_is_refused_unless_allowed(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(qf.RecipeError, match=r"already quantized.*--allow-requantize"):
        qf.convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    assert not (tmp_path / "q4.gguf").exists()
    qf.convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow_requantize=True)
    # the same type again copies the bytes
    qf.convert(tmp_path / "q8.gguf", tmp_path / "again.gguf", "Q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_non_finite_weights_are_named_in_the_checkpoints_terms(small: Path, tmp_path: Path, bad: float, name: str) -> None:
    w = load_file(small / "model.safetensors")[name].copy()
    w[77, 5] = bad
    edit(small, {name: w})
    with pytest.raises(qf.NonFiniteError, match=r"weight \[77, 5\]") as caught:
        qf.convert(small, tmp_path / "m.gguf", "Q4_K_M")
    assert name in str(caught.value)
    assert list(tmp_path.glob("*.gguf*")) == []


def test_non_finite_norm(small: Path, tmp_path: Path) -> None:
    w = load_file(small / "model.safetensors")["model.norm.weight"].copy()
    w[9] = np.nan
    edit(small, {"model.norm.weight": w})
    with pytest.raises(qf.NonFiniteError, match=r"model\.norm\.weight: weight \[9\]"):
        qf.convert(small, tmp_path / "m.gguf", "F16")


def test_bad_checkpoints_are_refused_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    edit(small, {"model.layers.3.mlp.up_proj.weight": None})
    with pytest.raises(qf.ShapeError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        qf.convert(small, tmp_path / "m.gguf")
    edit(small, {"model.layers.3.mlp.up_proj.weight": np.zeros((3, 3), ml_dtypes.bfloat16)})
    with pytest.raises(qf.ShapeError, match=r"layers\.3\.mlp\.up_proj\.weight"):
        qf.convert(small, tmp_path / "m.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(qf.OutputError, match="--force"):
        qf.convert(MODEL, out)
    assert out.read_text() == "precious"
    with pytest.raises(qf.OutputError):
        qf.convert(MODEL, tmp_path / "no" / "m.gguf")
    qf.convert(MODEL, out, "Q8_0", force=True)
    with qf.open(out) as source:
        assert source.weights


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, kind: int) -> None:
    """The process is stopped in the middle: a progress callback that never returns marks the moment."""
    code = f"""
import sys, time
from quantforge import cli
from quantforge.conversion import run as conversion
real = conversion._Work._do
def slow(self, *tile):
    real(self, *tile)
    print("tile", flush=True)
    time.sleep(0.2)
conversion._Work._do = slow
sys.argv = ["quantforge", "convert", {str(MODEL)!r}, {str(tmp_path / "m.gguf")!r}, "-t", "Q8_0"]
cli.main()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("tile")
    process.send_signal(kind)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    qf.convert(small, out, "Q8_0")
    before = out.read_bytes()
    w = load_file(small / "model.safetensors")["model.layers.5.mlp.down_proj.weight"].copy()
    w[0, 0] = np.nan
    edit(small, {"model.layers.5.mlp.down_proj.weight": w})
    with pytest.raises(qf.NonFiniteError):
        qf.convert(small, out, "Q8_0", force=True)
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name != "model"] == ["m.gguf"]


def test_importance_of_another_model_is_refused(tmp_path: Path, small: Path) -> None:
    config = json.loads((small / "config.json").read_text())
    w = load_file(small / "model.safetensors")
    narrow = {n: np.ascontiguousarray(x[:, :512]) for n, x in w.items() if "down_proj" in n}
    narrow |= {n: np.ascontiguousarray(x[:512]) for n, x in w.items() if "up_proj" in n or "gate_proj" in n}
    edit(small, dict(narrow))
    (small / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(qf.CalibrationError, match=r"ffn_down\.weight.*768.*512"):
        qf.convert(small, tmp_path / "m.gguf", importance=IMATRIX)


def test_fallbacks_are_reported(small: Path, tmp_path: Path) -> None:
    """Rows of 384 weights are no multiple of 256."""
    config = json.loads((small / "config.json").read_text())
    w = load_file(small / "model.safetensors")
    edit(
        small,
        {n: np.ascontiguousarray(x[:, :384]) for n, x in w.items() if "down_proj" in n}
        | {n: np.ascontiguousarray(x[:384]) for n, x in w.items() if "up_proj" in n or "gate_proj" in n},
    )
    (small / "config.json").write_text(json.dumps(config | {"intermediate_size": 384}))
    report = qf.convert(small, tmp_path / "m.gguf", "Q4_K_S")
    down = next(t for t in report.tensors if t.name == "blk.3.ffn_down.weight")
    assert down.type == "Q5_0"
    assert down.note is not None
    assert "384" in down.note


def test_metadata(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M", IMATRIX)
    with qf.open(tmp_path / "m.gguf") as source:
        c = source.config
    assert c["general.architecture"] == "llama"
    assert c["general.file_type"] == 15
    assert c["general.quantization_version"] == 2
    assert c["general.size_label"] == "5.8M"
    assert c["quantize.imatrix.entries_count"] == 42
    assert c["tokenizer.ggml.pre"] == "gpt-2"
    assert len(c["tokenizer.ggml.tokens"]) == 4096


def test_safetensors_output_with_any_codec(tmp_path: Path) -> None:
    report = qf.convert(MODEL, tmp_path / "dir", "Q6_K", measure=True)
    with qf.open(tmp_path / "dir") as source, qf.open(MODEL) as original:
        assert set(source.weights) == set(original.weights)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert source.weights[name].codec.name == "Q6_K"
        w, d = original.read(name).decode(), source.read(name).decode()
        assert np.linalg.norm(w - d) / np.linalg.norm(w) < 0.03
    assert (tmp_path / "dir" / "tokenizer.json").exists()
    assert report.total_bytes < 6_000_000


def test_public_names_resolve() -> None:
    for name in qf.__all__:
        assert getattr(qf, name) is not None
    with pytest.raises(AttributeError):
        _ = qf.nothing_like_this
    assert formats.open_path is qf.open


def test_quantize_example() -> None:
    rng = np.random.default_rng(0)
    w, importance = rng.standard_normal((64, 512), np.float32), rng.random(512, np.float32)
    e = qf.quantize(w, "Q4_K", importance=importance, threads=1)
    assert e.bpw == 4.5
    assert len(e.tobytes()) == e.nbytes == 64 * 2 * 144
    assert np.abs(e.decode() - w).max() < 0.5
    import torch

    assert qf.quantize(torch.from_numpy(w).bfloat16(), "Q8_0").shape == (64, 512)
