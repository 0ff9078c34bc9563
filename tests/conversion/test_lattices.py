"""Checkpoints of quantization-aware training: their lattices are seen, kept where the type can, and named where not."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.cli.convert import COMMAND
from quantforge.demo import MODEL
from tests import checkpoints

BF16 = ml_dtypes.bfloat16


def train(directory: Path) -> Path:
    """Put the blocks' matrices of a checkpoint on 4-bit lattices of 32 columns, as bf16."""
    tensors = load_file(directory / "model.safetensors")
    for name, w in tensors.items():
        if "layers" in name and w.ndim == 2:
            x = w.astype(np.float32).reshape(len(w), -1, 32)
            step = (np.abs(x).max(-1, keepdims=True) / 8 + 1e-6).astype(BF16).astype(np.float32)
            tensors[name] = (np.clip(np.rint(x / step), -8, 7) * step).reshape(w.shape).astype(BF16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, trained so."""
    directory = tmp_path_factory.mktemp("qat") / "model"
    shutil.copytree(MODEL, directory)
    return train(directory)


@pytest.mark.parametrize("recipe", ["Q4_0", "Q5_0", "Q8_0", "Q4_1"])
def test_what_is_on_a_lattice_comes_back(trained: Path, tmp_path: Path, recipe: str) -> None:
    plan = qf.plan(trained, tmp_path / "m.gguf", recipe)
    report = qf.convert(trained, tmp_path / "m.gguf", recipe, measure=True)
    matrices = [t for t in report.tensors if t.name.startswith("blk") and len(t.shape) == 2]
    assert {t.note for t in matrices} == {"on a lattice of 4 bits: kept"}
    assert [t.note for t in plan.tensors] == [t.note for t in report.tensors]
    assert max(t.rel_rmse or 0 for t in matrices) < 0.002
    with qf.open(tmp_path / "m.gguf") as ours, qf.open(trained) as original:
        name = "blk.3.ffn_up.weight"
        decoded, w = ours.read(name).decode(), original.read("model.layers.3.mlp.up_proj.weight").decode()
        assert ours.weights[name].codec.name == recipe
        assert (decoded.astype(BF16) == w.astype(BF16)).mean() > 0.999


def test_rows_in_another_order_and_a_gguf_as_source(trained: Path, tmp_path: Path) -> None:
    qf.convert(trained, tmp_path / "bf16.gguf", "BF16")
    qf.convert(trained, tmp_path / "one.gguf", "Q4_0")
    report = qf.convert(tmp_path / "bf16.gguf", tmp_path / "two.gguf", "Q4_0")
    assert sum(t.note is not None for t in report.tensors) == 7 * sum("attn_q.weight" in t.name for t in report.tensors)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_type_that_loses_the_lattice_is_named_with_one_that_keeps_it(trained: Path, tmp_path: Path) -> None:
    plan = qf.plan(trained, tmp_path / "m.gguf", "Q4_K_S")
    (warning,) = [w for w in plan.warnings if "lattice of 4 bits, which Q4_K loses; Q4_0 keeps it" in w]
    assert "--tensor-type" in warning and not any(t.note and "kept" in t.note for t in plan.tensors)


def test_methods_keep_it(tmp_path: Path) -> None:
    calibration = qf.Calibration(chunks=2, ctx=32)
    small = train(checkpoints.model(tmp_path / "model", "Llama"))
    report = qf.convert(small, tmp_path / "m.gguf", "Q4_0", method="gptq", calibration=calibration, measure=True)
    errors = [t.rel_rmse for t in report.tensors if t.name.startswith("blk") and len(t.shape) == 2]
    assert len(errors) == 14 and max(map(float, errors)) < 0.005  # without: 0.07


def test_the_command_says_how_many(trained: Path, tmp_path: Path) -> None:
    command = [str(trained), str(tmp_path / "m.gguf"), "-t", "Q4_0"]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(COMMAND, command + more)
        assert "note: 42 tensors: on a lattice of 4 bits: kept\n" in result.stderr


def test_ordinary_models_have_none(tmp_path: Path) -> None:
    plan = qf.plan(MODEL, tmp_path / "m.gguf", "Q4_0")
    assert not any(t.note for t in plan.tensors) and not any("lattice" in w for w in plan.warnings)
