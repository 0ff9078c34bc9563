"""Layers that predict further tokens, which transformers leaves out: kept on the way there and back, beside the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import archs
from quantforge.formats import open_path
from tests.archs import models
from tests.archs.test_logits import TOKENS, TOLERANCE, error, reference
from tests.llama_cpp import Llama


def with_prediction_layer(directory: Path, arch: archs.Arch) -> dict[str, np.ndarray]:
    """Add random tensors for one prediction layer to a checkpoint: what was added."""
    h = {**arch.hyperparameters(json.loads((directory / "config.json").read_text())), "nextn": 1}
    block = f"blk.{h['num_hidden_layers']}."
    shapes: dict[str, tuple[int, ...]] = {}
    for role in arch._roles(h, 1000):
        if role.name.startswith(block) and not role.tensor.optional:
            shapes |= role.spellings[0].shapes
    rng = np.random.default_rng(4)
    added = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    file = directory / "model.safetensors"
    save_file(load_file(file) | added, file, {"format": "pt"})
    return added


NAMES = sorted({n for n, _ in models.names() if archs.supported()[n].nextn is not None})


@pytest.mark.parametrize("name", {archs.supported()[n].nextn: n for n in NAMES}.values())
def test_prediction_layers_can_be_left_out(name: str, tmp_path: Path) -> None:
    """From a checkpoint and from a GGUF file, to either: as if the model never had any."""
    arch = archs.supported()[name]
    directory = models.make(tmp_path / "model", name)
    qf.convert(directory, tmp_path / "never.gguf", "F32")
    with_prediction_layer(directory, arch)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    qf.convert(directory, tmp_path / "with.gguf", "F32")
    for kind, source in (("checkpoint", directory), ("gguf", tmp_path / "with.gguf")):
        qf.convert(source, tmp_path / f"{kind}.gguf", "F32", mtp=False)
        qf.convert(source, tmp_path / kind, "F32", mtp=False)
        with open_path(tmp_path / "never.gguf") as never, open_path(tmp_path / f"{kind}.gguf") as without:
            assert without.weights == never.weights
            ours, theirs = ({k: np.asarray(v).tolist() for k, v in s.config.items()} for s in (without, never))
            of_the_source = ("general.size_label", "quantforge.source.sha256")
            ours, theirs = ({k: v for k, v in said.items() if k not in of_the_source} for said in (ours, theirs))
            assert ours == theirs
            for tensor in never.weights:
                assert without.read(tensor).tobytes() == never.read(tensor).tobytes()
        back = load_file(tmp_path / kind / "model.safetensors")
        assert not any("mtp" in n or f"layers.{never.config[f'{arch.name}.block_count']}." in n for n in back)
        assert json.loads((tmp_path / kind / "config.json").read_text()).get("num_nextn_predict_layers", 0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_prediction_layers_are_kept(name: str, tmp_path: Path) -> None:
    arch = archs.supported()[name]
    directory = models.make(tmp_path / "model", name)
    expected = reference(directory)
    added = with_prediction_layer(directory, arch)
    assert added
    qf.convert(directory, tmp_path / "f32.gguf", "F32")
    with open_path(tmp_path / "f32.gguf") as source:
        blocks = source.config[f"{arch.name}.block_count"]
        assert source.config[f"{arch.name}.nextn_predict_layers"] == 1
    with Llama(tmp_path / "f32.gguf") as llama:
        assert error(llama.logits(TOKENS), expected) <= TOLERANCE

    qf.convert(tmp_path / "f32.gguf", tmp_path / "back", "F32")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("text_config", config)["num_hidden_layers"] == blocks - 1
    back = load_file(tmp_path / "back" / "model.safetensors")
    for key, w in added.items():
        assert np.allclose(back[key], w, atol=1e-6), key
