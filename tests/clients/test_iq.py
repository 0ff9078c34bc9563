"""The IQ types of the shipped model in real llama.cpp: it loads them, and their logits are those of our decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge.demo import IMATRIX, MODEL, complete
from tests import llama_cpp

pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("kind", ["IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"])
def test_logits_are_those_of_our_decode(kind: str, tmp_path: Path) -> None:
    quantized, decoded = tmp_path / "q.gguf", tmp_path / "f32.gguf"
    qf.convert(MODEL, quantized, kind, IMATRIX)
    qf.convert(quantized, decoded, "F32", allow_requantize=True)
    tokens = list(np.random.default_rng(0).integers(2, 4096, 60))
    ours, theirs = (np.asarray(llama_cpp.Llama(p).logits(tokens)) for p in (decoded, quantized))
    # llama.cpp quantizes activations to 8 bits for these types, so its logits differ a little
    assert np.abs(ours - theirs).max() < 0.06 * np.ptp(ours)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("IQ2_XXS", "IQ4_XS", "Q2_K")]


@pytest.mark.parametrize("kind", ["IQ3_XXS", "Q3_K_M", *SLOW])
def test_gptq_on_grids(kind: str, tmp_path: Path) -> None:
    """Codes chosen by error feedback: llama.cpp loads the file and computes with what we decode."""
    quantized, decoded = tmp_path / "q.gguf", tmp_path / "f32.gguf"
    report = qf.convert(MODEL, quantized, kind, IMATRIX, method="gptq", calibration_chunks=6)
    chosen = [t.method for t in report.tensors if t.output_error is not None]
    assert len(chosen) == 42
    assert chosen.count("gptq") > 10
    qf.convert(quantized, decoded, "F32", allow_requantize=True)
    tokens = list(np.random.default_rng(0).integers(2, 4096, 60))
    ours, theirs = (np.asarray(llama_cpp.Llama(p).logits(tokens)) for p in (decoded, quantized))
    assert np.abs(ours - theirs).max() < 0.06 * np.ptp(ours)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S", "IQ4_XS"])
def test_completes_text(kind: str, tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", kind, IMATRIX)
    text = complete(tmp_path / "m.gguf", "The following example shows how to open a file and", tokens=16)
    assert len(text.split()) >= 4
