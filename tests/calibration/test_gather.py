"""Importance matrices: equal to llama-imatrix's on the same tokens; text that is too short or held out is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.calibration import importance
from quantforge.calibration.gather import observing, read_windows
from quantforge.demo import IMATRIX, MODEL
from quantforge.errors import CalibrationError, NonFiniteError, OutputError
from quantforge.runtime import Model
from quantforge.tokenizer import Tokenizer
from tests import checkpoints

TEXT = Path(qf.__file__).parent / "data" / "text"


def tokenizer() -> Tokenizer:
    with qf.open(MODEL) as source:
        return Tokenizer(MODEL, source.config, gguf_metadata=False)


@pytest.mark.slow
def test_equals_llama_imatrix(tmp_path: Path) -> None:
    """All 911 windows of the shipped calibration text against the file that llama-imatrix made of them."""
    qf.calibrate(MODEL, tmp_path / "im.gguf")
    ours, theirs = importance.read(tmp_path / "im.gguf"), importance.read(IMATRIX)
    assert list(ours) == list(theirs)
    assert ours.chunks == theirs.chunks
    for name in theirs:
        assert np.abs(ours[name] / theirs[name] - 1).max() < 0.01, name


def test_layout_is_llama_imatrix_s(tmp_path: Path) -> None:
    report = qf.calibrate(MODEL, tmp_path / "im.gguf", chunks=2)
    ours, theirs = gguf.GGUFReader(tmp_path / "im.gguf"), gguf.GGUFReader(IMATRIX)
    assert [(t.name, t.shape.tolist(), t.tensor_type) for t in ours.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type) for t in theirs.tensors
    ]
    keys = [k for k in theirs.fields if not k.startswith("GGUF.")]
    assert [k for k in ours.fields if not k.startswith(("GGUF.", "quantforge."))] == keys
    assert [ours.fields[k].types for k in keys] == [theirs.fields[k].types for k in keys]
    counts = {float(t.data[0]) for t in ours.tensors if t.name.endswith(".counts")}
    assert counts == {512.0}
    assert (report.chunks, report.ctx, report.tokens) == (2, 256, 512)


def test_means_equal_a_plain_forward_pass(tmp_path: Path) -> None:
    """in_sum2 / counts against transformers itself on the same windows; conversion takes the file."""
    import transformers

    qf.calibrate(MODEL, tmp_path / "im.gguf", chunks=3)
    found = importance.read(tmp_path / "im.gguf")
    module = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, role in {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}.items():
        for i in (0, 5):
            module.get_submodule(f"model.layers.{i}.{name}").register_forward_pre_hook(
                lambda m, a, k=f"blk.{i}.{role}.weight": seen.update({k: a[0].reshape(-1, a[0].shape[-1])})
            )
    with torch.no_grad():
        module(input_ids=torch.from_numpy(read_windows("builtin", tokenizer(), 256, 3)))
    assert len(seen) == 6
    for name, x in seen.items():
        np.testing.assert_allclose(found[name], (x**2).mean(0).numpy(), rtol=2e-3)
    report = qf.convert(MODEL, tmp_path / "m.gguf", "IQ4_XS", importance=tmp_path / "im.gguf", measure=True)
    assert all(t.weighted_rel_rmse is not None for t in report.tensors if t.name.startswith("blk.") and t.type == "IQ4_XS")


def test_gguf_models_calibrate_to_the_same(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "BF16")
    qf.calibrate(MODEL, tmp_path / "a.gguf", chunks=2)
    qf.calibrate(tmp_path / "m.gguf", tmp_path / "b.gguf", chunks=2)
    a, b = importance.read(tmp_path / "a.gguf"), importance.read(tmp_path / "b.gguf")
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4)


def test_experts_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per expert: the sum over its tokens, however few these are; a warning says so."""
    sizes = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    model = checkpoints.model(tmp_path / "moe", "Qwen3Moe", **sizes)
    report = qf.calibrate(model, tmp_path / "im.gguf", ctx=32, chunks=2)
    for name, counts in report.experts.items():
        assert sum(counts) == 2 * report.tokens, name
    reader = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "im.gguf").tensors}
    assert reader["blk.0.ffn_down_exps.weight.in_sum2"].shape == (8, 32)
    assert reader["blk.0.ffn_gate_inp.weight.counts"].item() == report.tokens
    counts = np.asarray(report.experts["blk.0.ffn_up_exps.weight"])
    assert counts.min() < 32, "the case that this is about"
    assert any("saw fewer than 32 tokens" in w for w in report.warnings)
    np.testing.assert_array_equal(reader["blk.0.ffn_up_exps.weight.counts"].ravel(), counts)

    # the same from the module itself
    with qf.open(model) as source:
        runner = Model(source, "moe")
        ids = read_windows("builtin", Tokenizer(model, source.config, gguf_metadata=False), 32, 2)
        states: list[torch.Tensor] = []
        with runner.resident() as module, torch.no_grad():
            hook = module.get_submodule("model.layers.0.mlp.experts").register_forward_pre_hook(lambda m, a: states.extend(a[:2]))
            module(input_ids=torch.from_numpy(ids))
            hook.remove()
    x, chosen = states[0], states[1]
    sums = np.stack([(x[(chosen == e).any(-1)] ** 2).sum(0).numpy() for e in range(8)])
    np.testing.assert_allclose(reader["blk.0.ffn_up_exps.weight.in_sum2"], sums, rtol=1e-3)


def test_observing_leaves_no_hooks() -> None:
    ids = torch.arange(2, 34)[None]
    with qf.open(MODEL) as source, torch.inference_mode():
        model = Model(source, "demo")
        hidden = model.enter(ids, 1)
        seen: list[str] = []
        with model.block(0) as layer:
            with observing(layer, model, 0, lambda names, x: seen.extend(names)):
                model.run_block(0, layer, hidden.clone(), 1)
            first = list(seen)
            model.run_block(0, layer, hidden, 1)
    assert seen == first and len(first) == 7 and "model.layers.0.mlp.down_proj.weight" in first


def test_too_short(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a few words\n")
    with pytest.raises(CalibrationError, match=r"t\.txt: \d+ tokens are too few .* at least 512"):
        qf.calibrate(MODEL, tmp_path / "im.gguf", tmp_path / "t.txt")
    assert not (tmp_path / "im.gguf").exists()


def test_held_out_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="overlaps the shipped held-out text"):
        qf.calibrate(MODEL, tmp_path / "im.gguf", TEXT / "heldout.txt")
    # a hidden copy: a passage, wrapped otherwise
    passage = (TEXT / "heldout.txt").read_text()[3000:5000].replace("\n", " ").upper()
    mixed = (TEXT / "calibration.txt").read_text()[:20000] + "\n\n" + passage + "\n\n"
    (tmp_path / "mixed.txt").write_text(mixed)
    with pytest.raises(
        CalibrationError, match=r"mixed\.txt overlaps the shipped held-out text: \d+% of it, with a passage of 1\d{3}"
    ):
        qf.calibrate(MODEL, tmp_path / "im.gguf", tmp_path / "mixed.txt")


def test_context_and_output_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--ctx 512 is more than the model's own context of 256"):
        qf.calibrate(MODEL, tmp_path / "im.gguf", ctx=512)
    (tmp_path / "im.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        qf.calibrate(MODEL, tmp_path / "im.gguf", chunks=2)
    assert (tmp_path / "im.gguf").read_text() == "mine"


def test_activations_that_overflow_name_the_layer(tmp_path: Path) -> None:
    for f in MODEL.iterdir():
        if f.name != "model.safetensors":
            (tmp_path / f.name).write_bytes(f.read_bytes())
    w = {k: v.astype(np.float32) for k, v in load_file(MODEL / "model.safetensors").items()}
    w["model.layers.2.mlp.down_proj.weight"] *= 1e38
    save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.down_proj"):
        qf.calibrate(tmp_path, tmp_path / "im.gguf", chunks=2)
    assert not (tmp_path / "im.gguf").exists()
