"""What the package can do, for every registered decoder: methods, layouts of checkpoints, models that run, evaluation, and
the imatrix that llama.cpp would write. `make test` does one of these with each graph, `make test-all` all with each class."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import quantforge as qf
from quantforge import archs, methods
from quantforge.calibration import overlap
from quantforge.calibration.gather import read_windows
from quantforge.errors import UnsupportedError
from tests import checkpoints
from tests.archs import models
from tests.archs.test_logits import TOKENS, proven, reference
from tests.llama_cpp import Llama

CTX = 32
AWQ = methods.AWQ(steps=2, clip=False)
KEPT = ("F32", "F16", "BF16")


class Sample:
    """A small random decoder, and what is wanted of it more than once."""

    def __init__(self, directory: Path, name: str, sample: str) -> None:
        self.made, self.out = models.make(directory / "model", name, sample), directory / "out"
        self.text = directory / "text.txt"
        self.text.write_text(checkpoints.TEXT.read_text()[:6000])
        self._expected: np.ndarray | None = None

    @property
    def expected(self) -> np.ndarray:
        """f32[tokens, vocab], by transformers."""
        if self._expected is None:
            self._expected = reference(self.made)
        return self._expected

    def convert(self, *args: Any, **options: Any) -> qf.Report:
        if "method" in options:
            options |= {"calibration": self.text, "calibration_chunks": 3, "calibration_ctx": CTX}
        return qf.convert(self.made, self.out, *args, force=True, **options)

    def runs(self, most: float) -> None:
        """The output is loaded, speaks, and its logits are near the source's: in the median of the tokens, as one of them
        may go to another expert."""
        model = qf.load(self.out)
        with torch.inference_mode():
            got = model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float().numpy()
            said = model.generate(input_ids=torch.tensor([TOKENS[:40]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert int(said[0, 40]) == int(got[39].argmax())
        spread = self.expected.max() - self.expected.min()
        assert float(np.median(np.abs(got - self.expected).max(-1))) < most * spread

    def to_gguf(self, method: methods.Method) -> None:
        """Every matrix of a block that is quantized is calibrated; eight bits leave the model what it was."""
        report = self.convert("Q8_0", method=method)
        inside = [t for t in report.tensors if t.name.startswith("blk.") and t.type not in KEPT]
        blind = {t.name.split(".", 2)[2] for t in inside if t.output_error is None}
        assert inside and blind <= {"attn_k_b.weight"}  # a part of kv_b_proj with another input: see `runs`
        assert sum(t.output_error or 0 for t in inside) <= sum(t.rtn_output_error or 0 for t in inside)
        self.runs(0.05)

    def to_layout(self, layout: str, most: float, **options: Any) -> None:
        """Linear layers of the blocks are quantized."""
        report = self.convert(format=layout, group_size=-1, **options)
        quantized = [t for t in report.tensors if t.type not in KEPT]
        assert quantized and all(t.output_error is not None for t in quantized) == ("method" in options)
        self.runs(most)


def calibrate(s: Sample) -> None:
    """Names, counts and sums of the imatrix are those of the products in llama.cpp's graph."""
    qf.calibrate(s.made, s.out, s.text, ctx=CTX, chunks=2)
    ours = {t.name: t.data.ravel() for t in gguf.GGUFReader(s.out).tensors}
    qf.convert(s.made, s.out, "F32", force=True)
    with qf.open(s.made) as source:
        windows = read_windows(s.text, source.tokenizer(), CTX, 2)
    with Llama(s.out) as llama:
        theirs = llama.importance(windows.tolist())
    assert {n.rpartition(".")[0] for n in ours} == theirs.keys()
    for name, (sums, counts) in theirs.items():
        assert ours[f"{name}.counts"].tolist() == counts.ravel().tolist(), name
        np.testing.assert_allclose(ours[f"{name}.in_sum2"], sums.ravel(), rtol=0.02, atol=2e-3 * sums.max(), err_msg=name)


def evaluate(s: Sample) -> None:
    """Eight bits are nearer than four."""
    files = {kind: s.out.with_name(f"{kind}.gguf") for kind in ("Q8_0", "Q4_0")}
    for kind, file in files.items():
        qf.convert(s.made, file, kind)
    found = qf.evaluate(files, text=s.text, reference=s.made, chunks=2, ctx=64, metrics=["kld"], noise_floor=False)
    kld = {m.name: m.kld_mean or 0 for m in found.models}
    assert 0 < kld["Q8_0"] < kld["Q4_0"]


WAYS: dict[str, Callable[[Sample], None]] = {
    "calibrate": calibrate,
    "gptq": lambda s: s.to_gguf(methods.get("gptq")),
    "awq": lambda s: s.to_gguf(AWQ),
    "GPTQ": lambda s: s.to_layout("gptq", 0.1, bits=8, method="gptq"),
    "AWQ": lambda s: s.to_layout("awq", 0.6, method=AWQ),
    "compressed-tensors": lambda s: s.to_layout("compressed-tensors", 0.05, bits=8),
    "evaluate": evaluate,
}
"""As docs/architectures.md names them: methods in small letters are to GGUF, layouts in capitals with their own method."""


def decodes(name: str) -> bool:
    """Is a class of transformers a decoder with a head?"""
    return not name.endswith("Model") and not getattr(transformers, name).config_class.is_encoder_decoder


DECODERS = [(n, s) for n, s in models.names() if decodes(n)]
GRAPHS = {archs.supported()[n].name: n for n, _ in reversed(DECODERS)}


def go(way: str, s: Sample) -> bool:
    """Did it work? False where it is refused because the model cannot be run block by block, which only some can."""
    s.out = s.out.with_name("m" if way in ("GPTQ", "AWQ", "compressed-tensors") else "m.gguf")
    try:
        WAYS[way](s)
    except UnsupportedError as e:
        if "it cannot be run block by block" not in str(e):
            raise
        return False
    return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are not held against each other, which takes longer than these models."""
    monkeypatch.setattr(overlap, "shared", lambda *_: None)


@pytest.mark.parametrize("name", GRAPHS.values())
def test_one_way(name: str, tmp_path: Path) -> None:
    go(sorted(WAYS)[zlib.crc32(name.encode()) % len(WAYS)], Sample(tmp_path, name, ""))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample"), DECODERS, ids=lambda v: v or "usual")
def test_all_ways(name: str, sample: str, tmp_path: Path) -> None:
    s = Sample(tmp_path, name, sample)
    done = [way for way in WAYS if go(way, s)]
    proven(name=name, sample=sample, methods=done)
    assert "compressed-tensors" in done
