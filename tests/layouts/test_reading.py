"""Quantized checkpoints as other tools leave them: every number is what the published formula makes of the arrays."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

import quantforge as qf
from quantforge import codecs
from quantforge.codecs.integers import pack_bits

RNG = np.random.default_rng(13)
P = "model.layers.0.mlp.up_proj."


def checkpoint(directory: Path, tensors: Mapping[str, Any], config: Mapping[str, Any], **files: Any) -> Path:
    """A directory with these arrays (NumPy's, or torch's for dtypes that NumPy lacks), config.json and more JSON files."""
    directory.mkdir(exist_ok=True)
    kept = {
        k: (v if isinstance(v, torch.Tensor) else torch.from_numpy(np.array(v, order="C"))).clone() for k, v in tensors.items()
    }
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    for name, content in {"config": config, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def read(directory: Path, tensor: str = P + "weight") -> np.ndarray:
    with qf.open(directory) as source:
        return source.read(tensor).decode()


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis, values in a little-endian stream of 32-bit words."""
    return pack_bits(np.ascontiguousarray(values), bits).view(np.int32)


# ---- GPTQ


def gptq(
    n: int, k: int, group: int, bits: int = 4, zero: int | None = 8, stored: int = -1, **more: Any
) -> tuple[Any, np.ndarray]:
    """Arrays of one matrix, and what they stand for: scales[g] · (q − zeros[g]), columns k of group k // group.

    stored: what the file adds to zeros: −1 in v1, 0 in v2. zero: of all, or None for different ones.
    """
    groups = -(-k // group)
    q = RNG.integers(0, 1 << bits, (k, n)).astype(np.uint8)
    zeros = np.full((groups, n), zero, np.uint8) if zero is not None else RNG.integers(1, 1 << bits, (groups, n)).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    arrays = {"qweight": words(q.T, bits).T, "qzeros": words(zeros + np.uint8(stored & 255), bits), "scales": scales}
    of = np.arange(k) // group
    w = scales[of].astype(np.float32) * (q.astype(np.float32) - zeros[of])
    return {P + name: a for name, a in (arrays | more).items()}, w.T


def gptq_config(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, **settings}}


@pytest.mark.parametrize(("k", "group"), [(192, 128), (576, 128), (64, 128), (160, 64)])
@pytest.mark.parametrize("zero", [8, None])
def test_gptq_last_group_is_short(k: int, group: int, zero: int | None, tmp_path: Path) -> None:
    arrays, w = gptq(64, k, group, zero=zero)
    checkpoint(tmp_path / "m", arrays, gptq_config(group_size=group, sym=zero is not None))
    np.testing.assert_array_equal(read(tmp_path / "m"), w)
    # with the groups of columns in the file, whatever the config says
    arrays[P + "g_idx"] = (np.arange(k) // group).astype(np.int32)
    checkpoint(tmp_path / "m", arrays, gptq_config(group_size=32, sym=zero is not None))
    np.testing.assert_array_equal(read(tmp_path / "m"), w)


def test_gptq_groups_that_the_config_denies(tmp_path: Path) -> None:
    arrays, _ = gptq(64, 192, 64)
    checkpoint(tmp_path / "m", arrays, gptq_config(group_size=128))
    with pytest.raises(
        qf.errors.FormatError, match=r"up_proj: 3 groups in rows of 192 columns; the config's group_size is \[128\]"
    ):
        qf.open(tmp_path / "m")


def test_gptq_settings_of_one_module(tmp_path: Path) -> None:
    arrays, w = gptq(64, 192, 96, bits=8, zero=128)
    config = gptq_config(dynamic={r"-:.*down_proj": {}, r"+:model\.layers\.0\..*": {"bits": 8, "group_size": 96}})
    np.testing.assert_array_equal(read(checkpoint(tmp_path / "m", arrays, config)), w)


def test_gptq_g_idx_of_zeros_says_nothing(tmp_path: Path) -> None:
    arrays, w = gptq(64, 256, 128, g_idx=np.zeros(256, np.int32))
    np.testing.assert_array_equal(read(checkpoint(tmp_path / "m", arrays, gptq_config())), w)


def test_gptq_short_groups_of_scattered_columns(tmp_path: Path) -> None:
    arrays, _ = gptq(64, 192, 128)
    order = RNG.permutation(192)
    group = (np.arange(192) // 128)[order].astype(np.int32)
    scales, codes = arrays[P + "scales"].astype(np.float32), arrays[P + "qweight"]
    fields = (codes[:, None, :] >> (4 * np.arange(8, dtype=np.int32))[None, :, None] & 15).reshape(192, 64)
    expected = scales[group] * (fields.astype(np.float32) - 8)
    checkpoint(tmp_path / "m", arrays | {P + "g_idx": group}, gptq_config(desc_act=True))
    np.testing.assert_array_equal(read(tmp_path / "m"), expected.T)


@pytest.mark.parametrize(
    ("label", "stored", "noted"), [("gptq", 0, True), ("gptq", -1, False), ("gptq_v2", 0, False), ("gptq_v2", -1, True)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_symmetric_zeros_say_their_version(
    label: str, stored: int, noted: bool, bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays, w = gptq(64, 128, 64, bits, 1 << (bits - 1), stored)
    checkpoint(tmp_path / "m", arrays, gptq_config(bits=bits, group_size=64, checkpoint_format=label))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(read(tmp_path / "m"), w)
    assert ("store their zeros as" in caplog.text) == noted


def test_gptq_asymmetric_zeros_are_read_as_labelled(tmp_path: Path) -> None:
    """All zeros may be 9 in an asymmetric file: the label stands."""
    arrays, w = gptq(64, 128, 64, zero=9)
    checkpoint(tmp_path / "m", arrays, gptq_config(group_size=64, sym=False))
    np.testing.assert_array_equal(read(tmp_path / "m"), w)


def test_short_groups_go_on(tmp_path: Path) -> None:
    """Written by row 128 + 64 in GPTQ, which goes to Q4_0 without loss; compressed-tensors takes whole groups only."""
    from tests import checkpoints

    model = checkpoints.model(tmp_path, "Llama", hidden_size=192, intermediate_size=192, num_hidden_layers=1, head_dim=48)
    qf.convert(model, tmp_path / "gptq", format="gptq", threads=1)
    stem = "model.layers.0.mlp.down_proj"
    with qf.open(tmp_path / "gptq") as source, qf.open(model) as plain:
        e = source.read(f"{stem}.weight")
        w = plain.read(f"{stem}.weight").decode()
    assert (e.codec.name, e.parts["scale"].shape) == ("int4-g128-sym", (192, 2))
    np.testing.assert_array_equal(e.decode()[:, 128:], codecs.quantize(w[:, 128:], "int4-channel-sym").decode())
    report = qf.convert(tmp_path / "gptq", tmp_path / "m.gguf", "Q4_0", threads=1)
    assert any("lossless" in (t.note or "") for t in report.tensors)
    with qf.open(tmp_path / "m.gguf") as gguf:
        np.testing.assert_array_equal(gguf.read("blk.0.ffn_down.weight").decode(), e.decode())
    with pytest.raises(qf.ShapeError, match="rows of 192 weights are not a multiple of the group size 128"):
        qf.convert(model, tmp_path / "ct", format="compressed-tensors")


# ---- FP8, NVFP4, MXFP4

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape).astype(np.float32) * 50).to(torch.float8_e4m3fn)


def nibbles(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of 4-bit floats, the even one in the low nibble, and the floats."""
    packed = RNG.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    return packed, E2M1[np.stack([packed & 15, packed >> 4], -1).reshape(shape)]


@pytest.mark.parametrize(("n", "k"), [(256, 384), (200, 136), (64, 64)])
def test_fp8_of_tiles(n: int, k: int, tmp_path: Path) -> None:
    """DeepSeek's: w = weight · weight_scale_inv of its block of 128 × 128, the last of which are cut off."""
    w, scale = e4m3(n, k), RNG.uniform(0.001, 0.1, (-(-n // 128), -(-k // 128))).astype(np.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}}
    checkpoint(tmp_path / "m", {P + "weight": w, P + "weight_scale_inv": scale}, config)
    wide = scale.repeat(128, 0).repeat(128, 1)[:n, :k]
    np.testing.assert_array_equal(read(tmp_path / "m"), w.float().numpy() * wide)


def test_fp8_of_stacked_experts(tmp_path: Path) -> None:
    w, scale = e4m3(3, 128, 256), RNG.uniform(0.001, 0.1, (3, 1, 2)).astype(np.float32)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    checkpoint(tmp_path / "m", {"experts.gate_up_proj": w, "experts.gate_up_proj_scale_inv": scale}, config)
    np.testing.assert_array_equal(read(tmp_path / "m", "experts.gate_up_proj"), w.float().numpy() * scale.repeat(128, 2))


def as_e8m0(directory: Path, tensor: str) -> None:
    """Give bytes the dtype F8_E8M0, which safetensors' own writer does not know."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header[tensor]["dtype"] = "F8_E8M0"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


@pytest.mark.parametrize("own_dtype", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "mxfp8", "modelopt", "compressed-tensors"])
def test_scales_that_are_powers_of_two(kind: str, own_dtype: bool, tmp_path: Path) -> None:
    """DeepSeek's scale_fmt ue8m0 and MXFP8: 2**(byte − 127), of a block of 128 × 128 or of 32 columns."""
    w, tiled = e4m3(256, 384), kind == "fp8"
    scale = RNG.integers(110, 135, (2, 3) if tiled else (256, 12)).astype(np.uint8)
    config = {
        "fp8": {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        "mxfp8": {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        "modelopt": {"quant_algo": "MXFP8"},
        "compressed-tensors": {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "group_size": 32}}}},
    }[kind]
    name = P + ("weight_scale_inv" if "fp8" in kind else "weight_scale")
    checkpoint(tmp_path / "m", {P + "weight": w, name: scale}, said(kind, **config))
    if own_dtype:
        as_e8m0(tmp_path / "m", name)
    factors = np.exp2(scale.astype(np.float32) - 127)
    wide = factors.repeat(128, 0).repeat(128, 1) if tiled else factors.repeat(32, 1)
    np.testing.assert_array_equal(read(tmp_path / "m"), w.float().numpy() * wide)


def test_scales_without_weights_of_fp8_are_named(tmp_path: Path) -> None:
    arrays = {P + "weight": np.zeros((32, 16), np.int8), P + "weight_scale_inv": np.zeros((32, 1), np.uint8)}
    with pytest.raises(qf.errors.FormatError, match=r"up_proj\.weight_scale_inv has no FP8 weight beside it"):
        qf.open(checkpoint(tmp_path / "m", arrays, said("fp8")))


def test_fp8_of_matrices_and_rows(tmp_path: Path) -> None:
    """Static fp8 has one scale a matrix, fbgemm_fp8 one a row; scales of activations are not the model's."""
    w, one = e4m3(48, 32), np.array(0.02, np.float32)
    extra = {P + "input_scale": np.array(0.5, np.float32), "model.layers.0.self_attn.k_scale": np.array(1, np.float32)}
    config = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    checkpoint(tmp_path / "a", {P + "weight": w, P + "weight_scale": one, **extra}, config)
    np.testing.assert_array_equal(read(tmp_path / "a"), w.float().numpy() * one)
    with qf.open(tmp_path / "a") as source:
        assert set(source.weights) == {P + "weight"}
    rows = torch.from_numpy(RNG.uniform(0.01, 0.1, (48, 1)).astype(np.float32)).bfloat16()
    config = {"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}}
    checkpoint(tmp_path / "b", {P + "weight": w, P + "weight_scale": rows}, config)
    np.testing.assert_array_equal(read(tmp_path / "b"), w.float().numpy() * rows.float().numpy())


@pytest.mark.parametrize("beside", [False, True])
def test_modelopt(beside: bool, tmp_path: Path) -> None:
    """NVFP4: w = level · weight_scale · weight_scale_2; FP8: weight · weight_scale. In config.json or hf_quant_config.json."""
    packed, levels = nibbles(32, 128)
    block, whole = e4m3(32, 8).abs(), np.array(0.003, np.float32)
    q = P.replace("up_proj", "q_proj")
    w, one = e4m3(16, 64), np.array(0.02, np.float32)
    arrays = {P + "weight": packed, P + "weight_scale": block, P + "weight_scale_2": whole, P + "input_scale": one}
    arrays |= {q + "weight": w, q + "weight_scale": one, "model.layers.0.self_attn.k_proj.k_scale": one}
    said = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
    where = {"hf_quant_config": {"producer": {"name": "modelopt"}, "quantization": said}} if beside else {}
    checkpoint(tmp_path / "m", arrays, {} if beside else {"quantization_config": {"quant_method": "modelopt", **said}}, **where)
    np.testing.assert_allclose(read(tmp_path / "m"), levels * block.float().numpy().repeat(16, 1) * whole, rtol=1e-6)
    np.testing.assert_array_equal(read(tmp_path / "m", q + "weight"), w.float().numpy() * one)
    with qf.open(tmp_path / "m") as source:
        assert set(source.weights) == {P + "weight", q + "weight"}


def test_gpt_oss_experts_are_mxfp4_bit_by_bit(tmp_path: Path) -> None:
    packed, levels = nibbles(2, 6, 96)
    scales = RNG.integers(110, 135, (2, 6, 3), np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {
        f"{name}_blocks": packed.reshape(2, 6, 3, 16),
        f"{name}_scales": scales,
        f"{name}_bias": np.ones((2, 6), np.float32),
    }
    checkpoint(tmp_path / "m", arrays, {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}})
    with qf.open(tmp_path / "m") as source:
        e = source.read(f"{name}_blocks")
        assert (e.codec.name, e.shape) == ("MXFP4", (2, 6, 96)) and f"{name}_bias" in source.weights
    w = levels * np.exp2(scales.astype(np.float32) - 127).repeat(32, -1)
    np.testing.assert_array_equal(e.decode(), w)
    # ggml pairs weight i of a block with weight i + 16
    first = e.parts["data"][0, 0, :17]
    assert first[0] == scales[0, 0, 0]
    assert first[1] == (packed[0, 0, 0] & 15) | (packed[0, 0, 8] & 15) << 4


# ---- AutoRound, AutoGPTQ's and AutoAWQ's old files, MLX


def awq(n: int, k: int, group: int) -> tuple[Any, np.ndarray]:
    q, z = RNG.integers(0, 16, (k, n)).astype(np.uint8), RNG.integers(0, 16, (k // group, n)).astype(np.uint8)
    scales, order = RNG.uniform(0.01, 0.1, (k // group, n)).astype(np.float16), np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(v: np.ndarray) -> np.ndarray:
        return words(v.reshape(len(v), -1, 8)[..., order].reshape(v.shape), 4)

    w = (q.astype(np.float32) - z.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    return {P + "qweight": packed(q), P + "qzeros": packed(z), P + "scales": scales}, w.T


AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False, "data_type": "int", "iters": 200}
KINDS = {
    "auto_round:auto_gptq": (lambda: gptq(64, 192, 64, zero=None), AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "auto_round": (lambda: gptq(64, 192, 64, zero=None, stored=0), AUTO_ROUND | {"packing_format": "auto_round"}),
    "auto_round:auto_awq": (lambda: awq(64, 192, 64), AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_round(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    arrays, w = make()
    np.testing.assert_array_equal(read(checkpoint(tmp_path / "m", arrays, {"quantization_config": config})), w)


def test_auto_round_module_of_other_bits(tmp_path: Path) -> None:
    arrays, w = gptq(64, 192, 32, bits=8, zero=None)
    config = AUTO_ROUND | {"extra_config": {P[:-1]: {"bits": 8, "group_size": 32}}}
    np.testing.assert_array_equal(read(checkpoint(tmp_path / "m", arrays, {"quantization_config": config})), w)


def test_old_auto_gptq_and_auto_awq(tmp_path: Path) -> None:
    arrays, w = gptq(64, 192, 128, zero=None)
    checkpoint(tmp_path / "g", arrays, {}, quantize_config={"bits": 4, "group_size": 128, "desc_act": False, "sym": False})
    np.testing.assert_array_equal(read(tmp_path / "g"), w)
    arrays, w = awq(64, 128, 32)
    checkpoint(tmp_path / "a", arrays, {}, quant_config={"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})
    np.testing.assert_array_equal(read(tmp_path / "a"), w)


@pytest.mark.parametrize(("bits", "own"), [(4, {}), (8, {"bits": 8, "group_size": 32}), (3, {"bits": 3})])
def test_mlx(bits: int, own: dict[str, int], tmp_path: Path) -> None:
    size = own.get("group_size", 64)
    q = RNG.integers(0, 1 << bits, (48, 192)).astype(np.uint8)
    scales, biases = (torch.from_numpy(RNG.normal(size=(48, 192 // size)).astype(np.float32)).bfloat16() for _ in range(2))
    said = {"group_size": 64, "bits": 4, **({P[:-1]: own} if own else {})}
    weight = torch.from_numpy(words(q, bits)).view(torch.uint32)
    arrays = {P + "weight": weight, P + "scales": scales, P + "biases": biases}
    checkpoint(tmp_path / "m", arrays, {"quantization": said, "quantization_config": said})
    w = q * scales.float().numpy().repeat(size, 1) + biases.float().numpy().repeat(size, 1)
    np.testing.assert_array_equal(read(tmp_path / "m"), w)


# ---- BitNet


def packed_ternary(q: np.ndarray) -> np.ndarray:
    """−1, 0, 1 [out, in] as transformers packs them: four quarters of the rows in one byte."""
    quarters = (q + 1).astype(np.uint8).reshape(4, -1, q.shape[1])
    return sum((quarters[i] << np.uint8(2 * i) for i in range(1, 4)), start=quarters[0])


@pytest.mark.parametrize("settings", [{}, {"linear_class": "autobitlinear"}, {"linear_class": "bitlinear"}], ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_bitnet(settings: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    """bitlinear divides by the scale, autobitlinear multiplies."""
    q = RNG.integers(-1, 2, (48, 64)).astype(np.int8)
    scale = torch.tensor([2.34375], dtype=torch.bfloat16)
    weight = packed_ternary(q) if packed else torch.from_numpy(q).bfloat16()
    arrays = {P + "weight": weight, P + "weight_scale": scale, "model.embed_tokens.weight": np.ones((8, 64), np.float32)}
    checkpoint(tmp_path / "m", arrays, said("bitnet", **settings))
    w = q.astype(np.float32)
    w = w * np.float32(2.34375) if settings.get("linear_class") == "autobitlinear" else w / np.float32(2.34375)
    np.testing.assert_array_equal(read(tmp_path / "m"), w)
    with qf.open(tmp_path / "m") as source:
        assert {n: t.codec.name for n, t in source.weights.items()} == {
            P + "weight": "ternary",
            "model.embed_tokens.weight": "F32",
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitnet_that_becomes_ternary_as_it_runs(dtype: torch.dtype, tmp_path: Path) -> None:
    w = torch.from_numpy(RNG.normal(0, 0.02, (48, 64)).astype(np.float32)).to(dtype)
    kept = "model.layers.0.self_attn.q_proj"
    settings = {"linear_class": "autobitlinear", "quantization_mode": "online", "modules_to_not_convert": [kept]}
    arrays = {P + "weight": w, "lm_head.weight": w, f"{kept}.weight": w, "model.layers.0.input_layernorm.weight": w[0]}
    checkpoint(tmp_path / "m", arrays, said("bitnet", **settings))
    scale = 1.0 / w.float().abs().mean().clamp_(min=1e-5)  # `WeightQuant.forward`, which is compiled
    expected = ((w.float() * scale).round().clamp(-1, 1) / scale).to(dtype).float().numpy()
    np.testing.assert_allclose(read(tmp_path / "m"), expected, rtol=1e-6, atol=0)
    with qf.open(tmp_path / "m") as source:
        assert [n for n, t in source.weights.items() if t.codec.name == "ternary"] == [P + "weight"]


# ---- torchao's tensors, as its own flatten_tensor_state_dict names and describes them


def torchao(kind: str) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Arrays, what the header says of the tensor, and what it stands for."""
    n, k = 48, 128
    if kind == "Float8Tensor":
        w, scale = e4m3(n, k), RNG.uniform(0.001, 0.1, (n, 1)).astype(np.float32)
        return {"qdata": w, "scale": scale}, {"block_size": [1, k]}, w.float().numpy() * scale
    scale = torch.from_numpy(RNG.uniform(0.001, 0.1, (n, k // 32)).astype(np.float32)).bfloat16()
    wide = scale.float().numpy().repeat(32, 1)
    if kind == "Int4Tensor":  # two in a byte, the even one low; scales and what is added are [groups, out]
        q, zero = RNG.integers(-8, 8, (n, k)), torch.from_numpy(RNG.normal(size=(n, k // 32)).astype(np.float32)).bfloat16()
        packed = (q[:, 1::2] << 4 | q[:, ::2] & 15).astype(np.int8)
        arrays = {"qdata": packed, "scale": scale.T.contiguous(), "zero_point": zero.T.contiguous()}
        return arrays, {"block_size": [1, 32], "shape": [n, k]}, q * wide + zero.float().numpy().repeat(32, 1)
    bits = 8 if kind == "Int8Tensor" else 4
    q = RNG.integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)
    zero = RNG.integers(-3, 4, (n, k // 32)).astype(np.int8)
    said = {"block_size": [1, 32]} | ({"target_dtype": {"_type": "torch.dtype", "_data": "int4"}} if bits == 4 else {})
    w = (q.astype(np.float32) - zero.repeat(32, 1)) * wide
    return {"qdata": q, "scale": scale, "zero_point": zero}, said, w


def torchao_checkpoint(directory: Path, kind: str, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    stem = P[:-1]
    header = {f"{stem}.weight": json.dumps({"_type": kind, "_data": about, "_tensor_data_names": list(arrays)})}
    header |= {"model.norm.weight": json.dumps({"_type": "Tensor"}), "tensor_names": json.dumps([f"{stem}.weight"])}
    tensors = {f"{stem}._weight_{k}": v for k, v in arrays.items()} | {"model.norm.weight": np.ones(8, np.float32)}
    checkpoint(directory, tensors, said("torchao", quant_type={"default": {}}))
    kept = safetensors.torch.load_file(directory / "model.safetensors")
    save_file(kept, directory / "model.safetensors", {"format": "pt", **header})
    return directory


@pytest.mark.parametrize("kind", ["Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor", "Int4Tensor"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    arrays, about, w = torchao(kind)
    torchao_checkpoint(tmp_path / "m", kind, arrays, about)
    np.testing.assert_allclose(read(tmp_path / "m"), w, rtol=1e-6, atol=1e-6)
    with qf.open(tmp_path / "m") as source:
        assert set(source.weights) == {P + "weight", "model.norm.weight"}


def test_other_tensors_of_torchao_are_named(tmp_path: Path) -> None:
    arrays, about, _ = torchao("Int4Tensor")
    torchao_checkpoint(tmp_path / "a", "Int4TilePackedTo4dTensor", arrays, about)
    torchao_checkpoint(tmp_path / "b", "Int4Tensor", arrays | {"act_pre_scale": np.ones(128, np.float32)}, about)
    checkpoint(tmp_path / "c", {f"{P}_weight_{k}": v for k, v in arrays.items()}, said("torchao"))
    for name, message in {"a": "Int4TilePackedTo4dTensor are not read", "b": "act_pre_scale", "c": "header does not say"}.items():
        with pytest.raises(qf.errors.FormatError, match=message):
            qf.open(tmp_path / name)


# ---- what is not read is named


def integers() -> dict[str, np.ndarray]:
    return {P + "codes": np.zeros((8, 8), np.int32)}


def said(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


NAMED = [
    *((m, integers(), said(m), w) for m, w in {
        "exl2": "ExLlamaV2's", "exl3": "ExLlamaV3's", "aqlm": "AQLM", "hqq": "HQQ", "vptq": "VPTQ", "higgs": "HIGGS",
        "spqr": "SpQR", "eetq": "EETQ", "fp_quant": "FP-Quant", "quip": "QuIP",
        "brand_new": "quant_method 'brand_new'",
    }.items()),
    *((f"awq {v}", awq(64, 64, 32)[0], said("awq", bits=4, group_size=32, **v), "AWQ version '(gemv|llm-awq)'")
      for v in ({"version": "gemv"}, {"format": "gemv"}, {"backend": "llm-awq"})),
    *((f"gptq called {m}", gptq(64, 64, 32)[0], said(m), f"config.json says {m}, but .*(qweight|qzeros) is none of its")
      for m in ("bitsandbytes", "fp8", "mxfp4", "compressed-tensors")),
    ("mxfp4 without scales", {"x_blocks": np.zeros((2, 2, 2, 16), np.uint8)}, said("mxfp4"), "x_blocks.*no MXFP4"),
    ("fp8 without scales", {P + "weight": e4m3(8, 8)}, said("fp8"), "no .*up_proj.weight_scale_inv beside it"),
    ("oblong blocks", {P + "weight": e4m3(8, 8)}, said("fp8", weight_block_size=[64, 128]), "square blocks"),
    ("bitnet without scale", {P + "weight": np.zeros((8, 8), np.uint8)}, said("bitnet"), "weight_scale is missing"),
    ("bitnet with norms", {P + "weight": np.zeros((8, 8), np.uint8)}, said("bitnet", use_rms_norm=True), "use_rms_norm"),
    ("modelopt awq", integers(), said("modelopt", quant_algo="W4A16_AWQ"), "W4A16_AWQ"),
    ("auto-round nvfp4", integers(), said("auto-round", data_type="nv_fp"), "export it as"),
    ("mlx mxfp4", {P + "scales": np.zeros((8, 1), np.uint8)}, said("mlx", mode="mxfp4"), "mode 'mxfp4'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arrays", "config", "message"), NAMED, ids=[n[0] for n in NAMED])
def test_what_is_not_read_is_named(kind: str, arrays: Any, config: Any, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", arrays, config)
    with pytest.raises(qf.errors.FormatError, match=message) as refused:
        qf.open(tmp_path / "m")
    assert "\n" not in str(refused.value)


UNSAID = {
    "fp8": lambda: ({P + "weight": e4m3(256, 128), P + "weight_scale_inv": np.full((2, 1), 0.5, np.float32)}, 0.5),
    "static fp8": lambda: ({P + "weight": e4m3(64, 128), P + "weight_scale": np.array(0.25, np.float32)}, 0.25),
}


@pytest.mark.parametrize("kind", UNSAID)
def test_arrays_may_say_enough_without_a_config(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays, scale = UNSAID[kind]()
    checkpoint(tmp_path / "m", arrays, {})
    np.testing.assert_array_equal(read(tmp_path / "m"), arrays[P + "weight"].float().numpy() * np.float32(scale))
    assert "no quantization_config" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda: gptq(64, 128, 64)[0], r"qweight is quantized, but no quantization_config.*quantize_config\.json"),
        (lambda: {P + "weight": np.zeros((8, 4), np.uint32), P + "scales": np.ones((8, 1), np.float16)}, "scales is quantized"),
        (lambda: {P + "q_weight": np.zeros((8, 8), np.int32), P + "q_scale": np.zeros((1, 8), np.int32)}, "ExLlamaV2's"),
        (lambda: {P + "trellis": np.zeros((4, 4, 4), np.int16), P + "suh": np.ones(8, np.float16)}, "ExLlamaV3's"),
    ],
)
def test_or_they_are_named(arrays: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(qf.errors.FormatError, match=message):
        qf.open(checkpoint(tmp_path / "m", arrays(), {}))


def test_integers_that_nothing_explains_are_no_weights(tmp_path: Path) -> None:
    from tests import checkpoints

    checkpoints.model(tmp_path, "Llama")
    w = safetensors.torch.load_file(tmp_path / "model.safetensors")
    save_file(w | {P + "weight": (w[P + "weight"] * 100).to(torch.int8)}, tmp_path / "model.safetensors", {"format": "pt"})
    for run in (lambda: qf.convert(tmp_path, tmp_path / "m.gguf"), lambda: qf.load(tmp_path)):
        with pytest.raises(qf.errors.FormatError, match=r"up_proj\.weight holds integers \(I8\)"):
            run()


def test_a_config_that_was_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w = RNG.normal(size=(8, 8)).astype(np.float32)
    checkpoint(tmp_path / "m", {P + "weight": w}, {"quantization_config": {"quant_method": "hqq"}})
    np.testing.assert_array_equal(read(tmp_path / "m"), w)
    assert "all tensors are floats" in caplog.text


def test_what_is_only_read_is_not_offered_for_writing() -> None:
    from quantforge import layouts

    assert set(layouts.names()) < set(layouts.readable())
    for name in set(layouts.readable()) - set(layouts.names()):
        with pytest.raises(qf.UnsupportedError, match="read, not written"):
            layouts.get(name).choose(None, 4, None, None, "bf16")
