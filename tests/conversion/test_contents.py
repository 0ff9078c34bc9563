"""What an output holds beside its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import formats
from quantforge.conversion.contents import contents
from quantforge.errors import UnsupportedError
from tests.archs import models


def with_head(directory: Path, name: str, change: float, **settings: object) -> Path:
    """A model that is called tied, and stores a head: the embedding times `change`."""
    models.make(directory, name, tie_word_embeddings=True, **settings)
    w = load_file(directory / "model.safetensors")
    assert "lm_head.weight" not in w
    head = np.ascontiguousarray(w["model.embed_tokens.weight"] * np.float32(change))
    save_file(w | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("kept", [False, True])
def test_a_stored_head_is_the_output_where_it_differs(tmp_path: Path, kept: bool) -> None:
    """LoRA fine-tunes are saved so; transformers uses the stored head."""
    directory = with_head(tmp_path / "m", "LlamaForCausalLM", 0.5 if kept else 1.0)
    with qf.open(directory) as source:
        found = contents(source, formats.get("gguf"), None)
        assert source.checkpoint_config()["tie_word_embeddings"] is not kept
        assert ("output.weight" in found.outputs) is kept
        assert source.config["tie_word_embeddings"] is True
    qf.convert(directory, tmp_path / "copy", format="safetensors", recipe="F32")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"] is not kept


def test_a_graph_without_a_head_of_its_own_refuses_one(tmp_path: Path) -> None:
    directory = with_head(tmp_path / "m", "Gemma2ForCausalLM", 0.5)
    with pytest.raises(UnsupportedError, match=r"tie_word_embeddings = False.*only with tie_word_embeddings = True"):
        qf.convert(directory, tmp_path / "m.gguf", "F32")
    with_head(tmp_path / "same", "Gemma2ForCausalLM", 1.0)
    qf.convert(tmp_path / "same", tmp_path / "m.gguf", "F32")


def test_a_tensor_of_several_weights_has_the_largest_of_their_types(tmp_path: Path) -> None:
    directory = models.make(tmp_path / "m", "YoutuForCausalLM", num_hidden_layers=2, qk_nope_head_dim=32)
    qf.convert(directory, tmp_path / "m.gguf", "F32")
    for source in (directory, tmp_path / "m.gguf"):
        for rule, expected in (("attn_v_b=Q8_0", "Q8_0"), ("attn_v_b=Q4_0", "Q5_0"), ("attn_k_b=Q8_0", "Q8_0")):
            job = qf.plan(source, tmp_path / "out", "Q5_0", format="safetensors", tensor_types=[rule])
            (t,) = (t for t in job.tensors if t.name == "model.layers.1.self_attn.kv_b_proj.weight")
            assert t.codec.name == expected, (source, rule)
            job.source.close()
