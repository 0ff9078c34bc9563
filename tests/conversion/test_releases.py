"""Quantized releases are kept as they are: gpt-oss's MXFP4, DeepSeek's fp8, BitNet's ternary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantforge as qf
from tests.archs import models

RNG = np.random.default_rng(3)


def rewrite(directory: Path, change: Any, **quantization: Any) -> dict[str, torch.Tensor]:
    """Replace tensors of a checkpoint: change(name, tensor) gives new ones by suffix, or None; state the config."""
    tensors = {}
    for name, w in load_file(directory / "model.safetensors").items():
        new = change(name, w)
        tensors |= {name: w} if new is None else {name.removesuffix(".weight") + suffix: t for suffix, t in new.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return tensors


def test_gpt_oss_experts_go_to_gguf_bit_by_bit(tmp_path: Path) -> None:
    model = models.make(tmp_path / "m", "GptOssForCausalLM", num_hidden_layers=2)

    def mxfp4(name: str, w: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        experts, n, out = w.shape
        blocks = RNG.integers(0, 256, (experts, out, n // 32, 16), np.uint8)
        return {
            "_blocks": torch.from_numpy(blocks),
            "_scales": torch.from_numpy(RNG.integers(118, 126, blocks.shape[:3], np.uint8)),
        }

    tensors = rewrite(model, mxfp4, quant_method="mxfp4")
    plan = qf.plan(model, tmp_path / "m.gguf", "MXFP4_MOE")
    qf.convert(model, tmp_path / "m.gguf", "MXFP4_MOE")
    stem = "model.layers.1.mlp.experts."
    with qf.open(tmp_path / "m.gguf") as ours, qf.open(model) as source:
        for role, name, rows in (
            ("gate", "gate_up_proj", slice(0, None, 2)),
            ("up", "gate_up_proj", slice(1, None, 2)),
            ("down", "down_proj", slice(None)),
        ):
            e = ours.read(f"blk.1.ffn_{role}_exps.weight")
            assert e.codec.name == "MXFP4"
            scales = tensors[f"{stem}{name}_scales"].numpy()[:, rows]
            data = e.parts["data"].reshape(*scales.shape, 17)
            np.testing.assert_array_equal(data[..., 0], scales)
            blocks = tensors[f"{stem}{name}_blocks"].numpy()[:, rows]
            nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
            np.testing.assert_array_equal(data[..., 1:], nibbles[..., :16] | nibbles[..., 16:] << 4)
            np.testing.assert_array_equal(e.decode(), source.read(f"{stem}{name}_blocks").decode()[:, rows])
    assert {t.source_codec.name for t in plan.tensors if t.codec.name == "MXFP4"} == {"MXFP4"}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with fp8 under scales of 128 × 128, as Qwen and DeepSeek release theirs."""
    model = models.make(tmp_path_factory.mktemp("fp8") / "m", "Qwen3ForCausalLM", hidden_size=192, intermediate_size=320)

    def tiles(name: str, w: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if "layers" not in name or w.ndim < 2:
            return None
        scale = torch.from_numpy(RNG.uniform(0.001, 0.01, (-(-w.shape[0] // 128), -(-w.shape[1] // 128))).astype(np.float32))
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        return {".weight": (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn), ".weight_scale_inv": scale}

    rewrite(model, tiles, quant_method="fp8", weight_block_size=[128, 128])
    return model


def test_fp8_is_decoded_exactly(fp8: Path, tmp_path: Path) -> None:
    qf.convert(fp8, tmp_path / "m.gguf", "F32")
    qf.convert(fp8, tmp_path / "f32", "F32", format="safetensors")
    with qf.open(fp8) as source, qf.open(tmp_path / "m.gguf") as gguf, qf.open(tmp_path / "f32") as floats:
        name = "model.layers.1.mlp.down_proj.weight"
        assert source.weights[name].codec.name == "fp8-block128"
        np.testing.assert_array_equal(gguf.read("blk.1.ffn_down.weight").decode(), source.read(name).decode())
        np.testing.assert_array_equal(floats.read(name).decode(), source.read(name).decode())


def test_fp8_is_kept_where_the_output_can_hold_it(fp8: Path, tmp_path: Path) -> None:
    for options in ({"format": "compressed-tensors", "recipe": "FP8_BLOCK"}, {"format": "safetensors", "recipe": "fp8-block128"}):
        out = tmp_path / str(options["format"])
        report = qf.convert(fp8, out, **options)
        kept = [t for t in report.tensors if "layers" in t.name and len(t.shape) > 1]
        assert {(t.type, t.source_type) for t in kept} == {("fp8-block128", "fp8-block128")}
        with qf.open(fp8) as source, qf.open(out) as ours:
            for t in kept:
                for part, bytes_ in source.read(t.name).parts.items():
                    assert ours.read(t.name).parts[part].tobytes() == bytes_.tobytes()


@pytest.fixture(scope="module")
def bitnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with packed ternary matrices, as HF1BitLLM releases theirs."""
    model = models.make(
        tmp_path_factory.mktemp("bitnet") / "m", "LlamaForCausalLM", hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )

    def pack(name: str, w: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if "layers" not in name or w.ndim < 2:
            return None
        q = torch.from_numpy(RNG.integers(0, 3, tuple(w.shape)).astype(np.uint8)).reshape(4, -1, w.shape[1])
        packed = q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6
        return {".weight": packed, ".weight_scale": torch.tensor([RNG.uniform(20, 60)], dtype=torch.bfloat16)}

    rewrite(model, pack, quant_method="bitnet")
    return model


@pytest.mark.parametrize("recipe", ["TQ2_0", "TQ1_0", "Q4_0", "Q8_0", "Q2_K"])
def test_ternary_goes_to_gguf_with_its_integers(bitnet: Path, tmp_path: Path, recipe: str) -> None:
    if recipe == "Q2_K":
        with pytest.raises(qf.RecipeError, match=r"already quantized \(ternary\).*TQ2_0 takes it over as it is"):
            qf.plan(bitnet, tmp_path / "m.gguf", recipe)
        return
    report = qf.convert(bitnet, tmp_path / "m.gguf", recipe)
    assert {t.note for t in report.tensors if t.source_type == "ternary"} == {"the integers of ternary, scales rounded to f16"}
    with qf.open(bitnet) as source, qf.open(tmp_path / "m.gguf") as ours:
        for mine, theirs in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
            w = source.read(f"model.layers.1.{theirs}.weight").decode()
            e = ours.read(f"blk.1.{mine}.weight")
            assert e.codec.name == recipe
            np.testing.assert_array_equal(e.decode(), np.sign(w) * np.abs(w).max().astype(np.float16).astype(np.float32))


def test_ternary_floats_are_kept(bitnet: Path, tmp_path: Path) -> None:
    """bf16 that are −s, 0, s, without a word about it: ggml's own encoder keeps them, and Q4_0 where the lattice is seen."""
    model = models.make(tmp_path / "m", "LlamaForCausalLM", hidden_size=256, intermediate_size=512, num_hidden_layers=2)

    def ternary(name: str, w: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if "layers" not in name or w.ndim < 2:
            return None
        return {".weight": (torch.sign(w) * (w.abs() > 0.1) * 0.0213).bfloat16()}

    rewrite(model, ternary)
    for recipe in ("TQ2_0", "TQ1_0", "Q4_0", "Q2_K"):
        report = qf.convert(model, tmp_path / f"{recipe}.gguf", recipe, measure=True)
        assert max(t.rel_rmse or 0 for t in report.tensors if t.type == recipe and t.name.startswith("blk")) == 0
