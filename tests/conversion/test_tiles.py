"""Rows of a planned tensor: what a scale that several share, and integers under another type's name, come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge import codecs
from quantforge.archs.base import Weight
from tests import checkpoints

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return checkpoints.model(tmp_path_factory.mktemp("tiny"), "Llama", **sizes)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_joined_matrices_have_one_scale(method: str, tiny: Path, tmp_path: Path) -> None:
    """A tile at a time, and a block at a time."""
    how = {"method": method, "calibration_chunks": 2, "calibration_ctx": 32}
    qf.convert(tiny, tmp_path / "m", "NVFP4A16", format="compressed-tensors", **how)
    with qf.open(tmp_path / "m") as source:
        scale = {
            leaf: float(source.read(f"{LAYER}{leaf}_proj.weight").parts["scale"][0])
            for leaf in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        }
    assert scale["self_attn.q"] == scale["self_attn.k"] == scale["self_attn.v"]
    assert scale["mlp.gate"] == scale["mlp.up"]
    assert len(set(scale.values())) == 4


def test_integers_that_another_type_takes_over(tiny: Path, tmp_path: Path) -> None:
    report = qf.convert(tiny, tmp_path / "m.gguf", bits=4, group_size=32, symmetric=True)
    taken = next(t for t in report.tensors if t.name == "blk.0.ffn_down.weight")
    assert (taken.type, taken.note) == ("Q4_0", "int4-g32-sym as Q4_0, lossless")
    with qf.open(tiny) as a, qf.open(tmp_path / "m.gguf") as b:
        w = a.read(f"{LAYER}mlp.down_proj.weight").decode()
        codec = codecs.get("int4-g32-sym")
        np.testing.assert_array_equal(b.read(taken.name).decode(), codec.decode(codec.encode(w), w.shape))


def test_experts_are_a_fact_of_the_shape() -> None:
    assert Weight("blk.0.ffn_up_exps.weight", (8, 4, 2)).experts == 8
    assert Weight("blk.0.expected.weight", (4, 2)).experts == 0
    assert Weight("output_norm.weight", (4,)).experts == 0
