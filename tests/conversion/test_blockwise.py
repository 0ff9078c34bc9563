"""--method, end to end: the same bytes in size, less error, read by real llama.cpp; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import quantforge as qf
from quantforge import methods
from quantforge.cli import group
from quantforge.conversion import blockwise
from quantforge.demo import MODEL, complete
from quantforge.errors import CalibrationError, NonFiniteError, RecipeError, UnsupportedError
from tests import checkpoints


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, qf.Report]:
    out = tmp_path_factory.mktemp("gptq") / "m.gguf"
    return out, qf.convert(MODEL, out, "Q3_K_S", method="gptq", calibration_chunks=24, measure=True)


def test_gptq_keeps_the_better(gptq: tuple[Path, qf.Report], tmp_path: Path) -> None:
    out, report = gptq
    matrices = [t for t in report.tensors if t.name.startswith("blk.") and t.type == "Q3_K"]
    assert len(matrices) == 42
    for t in matrices:
        assert t.output_error is not None
        assert t.rtn_output_error is not None
        assert t.output_error <= t.rtn_output_error
        assert (t.method == "rtn") == (t.output_error == t.rtn_output_error)
    assert sum(t.method == "gptq" for t in matrices) > 30
    assert sum(t.output_error or 0 for t in matrices) < 0.75 * sum(t.rtn_output_error or 0 for t in matrices)
    plain = qf.convert(MODEL, tmp_path / "plain.gguf", "Q3_K_S")
    types = {t.name: (t.type, t.bytes) for t in plain.tensors}
    assert {t.name: (t.type, t.bytes) for t in report.tensors} == types
    with qf.open(out) as a, qf.open(tmp_path / "plain.gguf") as b:
        assert a.config["quantforge.method"] == "gptq"
        for name in ("token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"):
            np.testing.assert_array_equal(a.read(name).parts["data"], b.read(name).parts["data"])


def test_the_model_is_nearer_to_the_original(gptq: tuple[Path, qf.Report], tmp_path: Path) -> None:
    im = MODEL / "llama.cpp-imatrix.gguf"
    qf.convert(MODEL, tmp_path / "rtn.gguf", "Q3_K_S", im)
    found = qf.evaluate(
        {"gptq": gptq[0], "rtn": tmp_path / "rtn.gguf"}, reference=MODEL, chunks=12, metrics=["ppl", "kld"], noise_floor=False
    )
    kld = {m.name: m.kld_mean for m in found.models}
    assert (kld["gptq"] or 1) < 0.8 * (kld["rtn"] or 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return checkpoints.model(tmp_path_factory.mktemp("tiny"), "Llama", **sizes)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True, "damping": 0.05}])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(2, 32, True), (3, 64, False), (4, 128, True), (8, -1, False), (4, -1, True)]
)
def test_gptq_checkpoints(
    bits: int, group_size: int, symmetric: bool, options: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    """What is written is what was chosen; the config says how; no matrix is worse than with plain rounding."""
    grid = {"format": "gptq", "bits": bits, "group_size": group_size, "symmetric": symmetric}
    report = qf.convert(tiny, tmp_path / "m", method="gptq", calibration_chunks=12, measure=True, **grid, **options)
    matrices = [t for t in report.tensors if t.output_error is not None]
    assert len(matrices) == 7
    assert sum(t.method == "gptq" for t in matrices) >= 5
    for t in matrices:
        assert t.output_error is not None
        assert t.rtn_output_error is not None
        assert t.output_error <= t.rtn_output_error
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] == options.get("act_order", False)
    assert config["static_groups"] == options.get("static_groups", False)
    assert config["damp_percent"] == options.get("damping", 0.01)
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group_size, symmetric)
    regrouped = options == {"act_order": True} and group_size > 0
    with qf.open(tmp_path / "m") as source, qf.open(tiny) as original:
        for t in matrices:
            e = source.read(t.name)
            w = original.read(t.name).decode()
            error = np.linalg.norm(e.decode() - w) / np.linalg.norm(w)
            assert error == pytest.approx(t.rel_rmse, rel=1e-4), "the file is not what was measured"
            if t.method == "gptq":
                assert e.codec.name.endswith("-act") == (regrouped and t.shape[-1] > group_size)


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K_S", "Q2_K", "Q4_K_S", "Q5_1", "IQ4_XS", "IQ2_XS"])
def test_act_order_with_static_groups_costs_no_storage(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
    model = checkpoints.model(tmp_path / "model", "Llama", **sizes)
    errors = {}
    for order in (False, True):
        out = tmp_path / f"{order}.gguf"
        given = {"act_order": order, "static_groups": order, "calibration_chunks": 32}
        report = qf.convert(model, out, kind, method="gptq", **given)
        chosen = [t for t in report.tensors if t.output_error is not None]
        assert sum(t.method == "gptq" for t in chosen) >= 4
        errors[order] = sum(t.output_error or 0 for t in chosen) / sum(t.rtn_output_error or 0 for t in chosen)
    assert errors[True] < 1
    assert (tmp_path / "True.gguf").stat().st_size == (tmp_path / "False.gguf").stat().st_size


def test_llama_cpp_reads_it(gptq: tuple[Path, qf.Report]) -> None:
    pytest.importorskip("xllamacpp")
    assert len(complete(gptq[0], "The following example shows how to open a file and read", tokens=8)) > 5


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    for threads in (1, 2):
        qf.convert(MODEL, tmp_path / f"{threads}.gguf", "Q4_0", method="gptq", calibration_chunks=2, threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown method gptk"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", method="gptk")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="too few to calibrate"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", method="gptq", calibration=tmp_path / "short.txt")
    with pytest.raises(RecipeError, match=r"--act-order goes with --method .*gptq"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", act_order=True)
    with pytest.raises(UnsupportedError, match=r"nf4: --method gptq cannot choose its codes; here use --method awq or rtn"):
        qf.convert(MODEL, tmp_path / "m", "nf4", format="bitsandbytes", method="gptq")
    with pytest.raises(RecipeError, match="device tpu: cpu, cuda or cuda:N"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", method="gptq", device="tpu")
    held_out = MODEL.parent / "text" / "heldout.txt"
    with pytest.raises(CalibrationError, match="overlaps the shipped held-out text"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", method="gptq", calibration=held_out)
    qf.convert(MODEL, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(RecipeError, match="already quantized"):
        qf.convert(tmp_path / "q.gguf", tmp_path / "m.gguf", "Q4_0", method="gptq")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["q.gguf", "short.txt"]


def test_activations_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(MODEL, tmp_path / "model")
    w = {k: v.astype(np.float32) for k, v in load_file(MODEL / "model.safetensors").items()}
    w["model.layers.1.self_attn.v_proj.weight"] *= 1e38
    save_file(w, tmp_path / "model" / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\."):
        qf.convert(tmp_path / "model", tmp_path / "m.gguf", "Q4_0", method="gptq", calibration_chunks=2)
    assert not (tmp_path / "m.gguf").exists()


def test_from_gguf_gives_the_same_codes(tmp_path: Path) -> None:
    """Rows lie in another order there; names too."""
    qf.convert(MODEL, tmp_path / "f.gguf", "F32")
    options = {"method": "gptq", "calibration_chunks": 2}
    a = qf.convert(MODEL, tmp_path / "a.gguf", "Q4_0", **options)
    b = qf.convert(tmp_path / "f.gguf", tmp_path / "b.gguf", "Q4_0", **options)
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.name == y.name
        if x.output_error is not None:
            assert x.output_error == pytest.approx(y.output_error, rel=0.05)


@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Mixtral", {"num_local_experts": 4})])
def test_one_pass_gathers_a_blocks_inputs(kind: str, more: dict[str, int], tmp_path: Path, monkeypatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = checkpoints.model(tmp_path / "model", kind, **sizes, **more)
    runs: list[int] = []
    inputs = blockwise._Block.inputs

    def counted(self, *given):
        runs.append(1)
        return inputs(self, *given)

    monkeypatch.setattr(blockwise._Block, "inputs", counted)
    errors = {}
    for sequential in (True, False):
        runs.clear()
        out = tmp_path / f"{sequential}.gguf"
        report = qf.convert(model, out, "Q4_0", method="gptq", calibration_chunks=16, sequential=sequential)
        chosen = [t for t in report.tensors if t.output_error is not None]
        assert len(chosen) == 2 * 7
        errors[sequential] = sum(t.output_error or 0 for t in chosen) / sum(t.rtn_output_error or 0 for t in chosen)
        if not sequential:  # once the model as it is, once as it becomes, of two blocks
            assert len(runs) == 2 * 2
    assert errors[False] < 1 and errors[False] < 1.2 * errors[True]


def test_command_line_offers_every_method() -> None:
    shown = CliRunner().invoke(group, ["convert", "--help"]).output
    line = " ".join(shown[shown.index("--method M") :].split())
    assert all(f"{name}" in line.split("; default")[0] for name in methods.names())
