"""Quantized checkpoints as other tools leave them: every number is what the published formula makes of the arrays."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    kept = {k: v if isinstance(v, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}
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
