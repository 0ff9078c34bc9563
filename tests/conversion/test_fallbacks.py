"""What happens to tensors that the wanted type cannot hold: an error, or another type that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from tests import checkpoints

LARGE = {
    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model two of whose matrices have a weight that no f16 scale of 4 bits reaches."""
    directory = checkpoints.model(tmp_path_factory.mktemp("large") / "m", "Llama")
    tensors = load_file(directory / "model.safetensors")
    for name in LARGE.values():
        tensors[name][3, 5] = 4e6
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_values_that_do_not_fit_are_an_error_that_names_the_way_out(large: Path, tmp_path: Path) -> None:
    with pytest.raises(qf.errors.RangeError, match=r"weight \[3, 5\] is 4e\+06.*--fallback-type BF16"):
        qf.convert(large, tmp_path / "m.gguf", "Q4_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_name_the_weight_as_the_checkpoint_has_it(large: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(qf.errors.RangeError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: weight \[3, 5\] is 4e\+06"):
        qf.convert(large, tmp_path / "m.gguf", "Q4_0", method=method, calibration=qf.Calibration(chunks=2, ctx=32), threads=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"method": "gptq", "calibration": qf.Calibration(chunks=2, ctx=32)}], ids=["rtn", "gptq"]
)
def test_the_fallback_type_takes_those_tensors_and_no_other(large: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    report = qf.convert(large, tmp_path / "m.gguf", "Q4_0", fallback_type="BF16", threads=2, **options)
    taken = {t.name: t for t in report.tensors if t.note and "BF16 instead" in t.note}
    assert set(taken) == set(LARGE)
    assert {t.note for t in taken.values()} == {"Q4_0 stores its blocks' scales in f16, up to 65504: BF16 instead"}
    assert report.total_bytes == (tmp_path / "m.gguf").stat().st_size
    with qf.open(tmp_path / "m.gguf") as ours, qf.open(large) as source:
        for name, original in LARGE.items():
            assert ours.weights[name].codec.name == taken[name].type == "BF16"
            np.testing.assert_allclose(ours.read(name).decode(), source.read(original).decode(), rtol=2**-8)
        others = {n: s.codec.name for n, s in ours.weights.items() if n not in LARGE and n.startswith("blk") and len(s.shape) > 1}
        assert set(others.values()) == {"Q4_0"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_what_fits_is_what_it_was(tmp_path: Path) -> None:
    model = checkpoints.model(tmp_path / "m", "Llama")
    qf.convert(model, tmp_path / "a.gguf", "Q4_0")
    qf.convert(model, tmp_path / "b.gguf", "Q4_0", fallback_type="BF16", fallback="llama-quantize")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_fallback_that_cannot_hold_them_either(large: Path, tmp_path: Path) -> None:
    with pytest.raises(qf.errors.RangeError, match="F16 holds magnitudes up to 65504"):
        qf.convert(large, tmp_path / "m.gguf", "Q4_0", fallback_type="F16")
    assert not list(tmp_path.iterdir())


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    model = checkpoints.model(tmp_path / "m", "Llama", hidden_size=64, intermediate_size=96)
    with pytest.raises(qf.ShapeError, match="96"):
        qf.plan(model, tmp_path / "out", format="compressed-tensors", bits=4, group_size=64)
    options = {"format": "compressed-tensors", "bits": 4, "group_size": 64, "fallback_type": "BF16"}
    report = qf.convert(model, tmp_path / "out", **options)
    down = [t for t in report.tensors if "down_proj" in t.name]
    assert {(t.type, "cannot hold shape" in str(t.note)) for t in down} == {("BF16", True)}
    with qf.open(tmp_path / "out") as ours:
        assert {s.codec.name for n, s in ours.weights.items() if "down_proj" in n} == {"BF16"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fallback_type": "BF17"}, qf.RecipeError, "--fallback-type: unknown type BF17"),
        ({"fallback_type": "int4-g128"}, qf.UnsupportedError, "--fallback-type: gguf files cannot hold int4-g128"),
        ({"fallback": "other"}, qf.RecipeError, "unknown fallback other"),
    ],
)
def test_bad_options(large: Path, tmp_path: Path, options: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        qf.plan(large, tmp_path / "m.gguf", "Q4_0", **options)


def test_a_method_without_short_groups_names_the_matrix_and_the_ways_out(tmp_path: Path) -> None:
    model = checkpoints.model(tmp_path / "m", "Llama", hidden_size=64, intermediate_size=96)
    options = {"format": "gptq", "bits": 4, "group_size": 64}
    with pytest.raises(qf.ShapeError, match=r"mlp\.down_proj\.weight: .* 96 .*--group-size.*--method rtn"):
        qf.convert(model, tmp_path / "out", **options, method="gptq", calibration=qf.Calibration(chunks=2, ctx=32), threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    qf.convert(model, tmp_path / "out", **options, threads=1)
