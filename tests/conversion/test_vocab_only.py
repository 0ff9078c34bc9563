"""GGUF files of a tokenizer and metadata, as llama.cpp's converter writes with --vocab-only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from tests import checkpoints
from tests.llama_cpp import Llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.model(tmp_path / "model", "Llama")


def metadata(path: Path) -> dict[str, object]:
    with qf.open(path) as source:
        assert not source.weights or path.name == "whole.gguf"
        return {k: np.asarray(v).tolist() for k, v in source.config.items()}


def test_the_file_has_all_but_tensors(model: Path, tmp_path: Path) -> None:
    plan = qf.plan(model, tmp_path / "vocab.gguf", vocab_only=True)
    report = qf.convert(model, tmp_path / "vocab.gguf", vocab_only=True)
    assert plan.total_bytes == report.total_bytes == (tmp_path / "vocab.gguf").stat().st_size and not report.tensors
    qf.convert(model, tmp_path / "whole.gguf", "F16", provenance=False)
    whole = metadata(tmp_path / "whole.gguf")
    del whole["general.size_label"]
    assert metadata(tmp_path / "vocab.gguf") == whole


def test_it_needs_no_weights(model: Path, tmp_path: Path) -> None:
    qf.convert(model, tmp_path / "a.gguf", vocab_only=True)
    (model / "model.safetensors").unlink()
    qf.convert(model, tmp_path / "b.gguf", vocab_only=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(qf.FormatError):
        qf.convert(model, tmp_path / "c.gguf")


def test_from_gguf(model: Path, tmp_path: Path) -> None:
    qf.convert(model, tmp_path / "whole.gguf", "F16", provenance=False)
    qf.convert(tmp_path / "whole.gguf", tmp_path / "vocab.gguf", vocab_only=True)
    assert metadata(tmp_path / "vocab.gguf") == metadata(tmp_path / "whole.gguf")


def test_llama_cpp_reads_its_tokenizer(model: Path, tmp_path: Path) -> None:
    qf.convert(model, tmp_path / "vocab.gguf", vocab_only=True)
    qf.convert(model, tmp_path / "whole.gguf", "F16", provenance=False)
    with Llama(tmp_path / "vocab.gguf", vocab_only=True) as vocab, Llama(tmp_path / "whole.gguf", vocab_only=True) as whole:
        assert vocab.tokenize(checkpoints.NASTY) == whole.tokenize(checkpoints.NASTY) != []


def test_a_directory_cannot_be_one(model: Path, tmp_path: Path) -> None:
    with pytest.raises(qf.RecipeError, match=r"--vocab-only writes a GGUF file: give it a name that ends in \.gguf"):
        qf.plan(model, tmp_path / "out", vocab_only=True)
