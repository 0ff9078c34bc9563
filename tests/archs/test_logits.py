"""Every registered architecture against transformers and real llama.cpp, on small random models: there, and back again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantforge as qf
from quantforge import archs
from quantforge.errors import UnsupportedError
from tests.archs import models
from tests.llama_cpp import Llama

TOLERANCE = 1e-3
"""Of the range of the logits. ggml's GELU alone, a table in 16 bits, makes 2e-4 to 4e-4, and more where a router is of two
minds or queries are long; so a model with GELU may also be held against transformers with that table in place of its own."""
MEDIAN = 1e-4
"""Of a token's largest difference, with ggml's GELU on both sides: what is left are arguments that round to another of its
entries because the sums before them were added up in another order."""
BACK = 5e-6
"""On the way back, where numbers change: f32(exp(f32(log(w)))) or f32(f32(w + 1) - 1) is one rounding of a decay rate or a norm,
which deep recurrences make ten times as much of. Where none change it is the same model, bit by bit."""
TOKENS = [int(i) for i in np.random.default_rng(5).integers(2, 300, 120)]


def proven(**row: Any) -> None:
    """Keep a figure for docs/architectures.md, where one is being made."""
    if path := os.environ.get("QUANTFORGE_PROOFS"):
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")


def looked_up(x: Any) -> Any:
    """GELU as ggml computes it: between -10 and 10 from a table, whose arguments and values are numbers of 16 bits."""
    import torch

    near = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, near))


def _is_gelu(module: Any) -> bool:
    return "gelu" in type(module).__name__.lower()


def reference(directory: Path, *, table: bool = False) -> np.ndarray:
    """f32[tokens, vocab]: transformers' logits, computed the plain way; of a model without a head the last hidden states.

    table: with ggml's GELU in place of its own.
    """
    import torch
    import transformers

    name = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    model = getattr(transformers, name).from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    for module in model.modules() if table else ():
        if _is_gelu(module):
            module.forward = looked_up
    tokens = torch.tensor([TOKENS])
    both = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder and hasattr(model, "decoder") else {}
    with torch.no_grad():
        given = model(input_ids=tokens, **both)
    found: np.ndarray = (given.logits if "logits" in given else given.last_hidden_state)[0].float().numpy()
    return found


def computed(gguf: Path, expected: np.ndarray) -> np.ndarray:
    """The same by llama.cpp."""
    with Llama(gguf) as llama:
        return llama.logits(TOKENS) if expected.shape[-1] == llama.n_vocab else llama.embeddings(TOKENS)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in parts of the range; where that is within TOLERANCE the likeliest token is the same too, unless
    the two likeliest differ by less."""
    spread = expected.max() - expected.min()
    assert spread > 1
    assert np.isfinite(got).all()
    worst = float(np.abs(got - expected).max() / spread)
    first, second = np.sort(expected, -1)[:, -1], np.sort(expected, -1)[:, -2]
    clear = first - second > 2 * TOLERANCE * spread
    if worst <= TOLERANCE:
        assert (got.argmax(-1) == expected.argmax(-1))[clear].all()
    return worst


@pytest.mark.parametrize(("name", "sample"), models.names(), ids=lambda v: v or "usual")
def test_logits_equal_transformers(name: str, sample: str, tmp_path: Path) -> None:
    directory = models.make(tmp_path / "model", name, sample)
    expected = reference(directory)
    qf.convert(directory, tmp_path / "f32.gguf", "F32")
    got = computed(tmp_path / "f32.gguf", expected)
    worst = error(got, expected)
    print(f"{name} {sample}: max |Δ| / range = {worst:.1e}")
    row = {"logits": worst}
    by_table = reference(directory, table=True) if worst > MEDIAN / 10 else expected
    if not np.array_equal(by_table, expected):
        row["table"] = error(got, by_table)
        print(f"{name} {sample}: with ggml's GELU {row['table']:.1e}")
        assert row["table"] <= TOLERANCE
        assert np.median(np.abs(got - by_table).max(-1)) <= MEDIAN * (expected.max() - expected.min())
    else:
        assert worst <= TOLERANCE

    qf.convert(tmp_path / "f32.gguf", tmp_path / "back", "F32")
    again = error(reference(tmp_path / "back"), expected)
    exact = all(t.value is None for t in archs.supported()[name].tensors.values())
    assert again <= (0 if exact else BACK)
    proven(name=name, sample=sample, back=again, **row)
    if not models.decoder(directory):
        return  # no next token to compare by
    try:
        both = qf.evaluate(
            [tmp_path / "f32.gguf"], reference=directory, chunks=2, ctx=64, metrics=["kld"], noise_floor=False,
        )  # fmt: skip
    except UnsupportedError as e:  # blocks that share keys, or stacks that run several times: said, and left out of the table
        if "it cannot be run block by block" not in str(e):
            raise
        return
    kld = both.models[0].kld_mean
    assert kld is not None and abs(kld) < 1e-6
    proven(name=name, sample=sample, kld=abs(kld))


@pytest.mark.parametrize("name", sorted({n for n, _ in models.names()}))
def test_quantized(name: str, tmp_path: Path) -> None:
    """Presets convert and load, with an error that is theirs."""
    directory = models.make(tmp_path / "model", name)
    expected = reference(directory)
    for preset, most in (("Q8_0", 0.05), ("Q4_K_M", 0.5)):
        qf.convert(directory, tmp_path / "m.gguf", preset, force=True)
        got = computed(tmp_path / "m.gguf", expected)
        # in the median: a token whose router is of two minds goes to another expert
        middle = float(np.median(np.abs(got - expected).max(-1)) / (expected.max() - expected.min()))
        assert middle < most
        proven(name=name, **{preset: middle})


@pytest.mark.parametrize("name", sorted({a.hf[0] for a in archs.supported().values()}))
def test_scale_groups_name_roles_that_fit(name: str) -> None:
    arch = archs.supported()[name]
    for group in arch.scale_groups:
        assert group.source in arch.tensors
        assert {arch.tensors[t].dims[-1] for t in group.targets}
