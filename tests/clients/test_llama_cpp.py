"""Converted models in real llama.cpp: the same logits as transformers, the same token ids as the tokenizer's own program."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers

import quantforge
from tests import checkpoints
from tests.llama_cpp import Llama


def rope(kind, theta=10000.0, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim-biases": ("Llama", {"head_dim": 32, "attention_bias": True}),
    "llama-theta": ("Llama", rope("default", 500000.0) | {"rms_norm_eps": 1e-5}),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama3": ("Llama", rope("llama3", original_max_position_embeddings=8192, **LLAMA3) | {"head_dim": 32}),
    "llama3-short": ("Llama", rope("llama3", original_max_position_embeddings=64, **LLAMA3)),
    "llama-yarn": ("Llama", rope("yarn", **YARN)),
    "llama-yarn-numbers": ("Llama", rope("yarn", attention_factor=1.3, beta_fast=32.0, beta_slow=1.0, **YARN)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-head-dim": ("Mistral", {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-yarn": ("Qwen2", rope("yarn", 1e6, **YARN)),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3", rope("yarn", 1e6, **YARN) | {"head_dim": 32}),
}


def assert_same_logits(directory, path):
    """Converted to F32: within 1e-3 of the range of transformers' logits (in fact about 1e-6), the same top-1 everywhere."""
    import torch
    import transformers

    quantforge.convert(directory, path, "F32")
    tokens = [int(i) for i in np.random.default_rng(5).integers(0, 300, 120)]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with Llama(path) as llama:
        got = llama.logits(tokens)
    spread = expected.max() - expected.min()
    assert spread > 1
    error = np.abs(got - expected).max() / spread
    print(f"{directory.name}: max |Δ| / range = {error:.2e}")
    assert error <= 1e-3
    assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    kind, changes = MODELS[name]
    assert_same_logits(checkpoints.model(tmp_path, kind, **changes), tmp_path / "model.gguf")


def test_experts_are_stacked(tmp_path, monkeypatch):
    """A mixture of experts needs no more than an Arch: one declared here, converted and run."""
    sizes = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    assert_same_logits(checkpoints.model(tmp_path, "Qwen3Moe", **sizes), tmp_path / "model.gguf")


def test_the_shipped_model_runs(tmp_path):
    """bf16 weights, its own tokenizer and BOS handling; ids of real text."""
    directory = checkpoints.TEXT.parents[1] / "demo-model"
    assert_same_logits(directory, tmp_path / "model.gguf")
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(tmp_path / "model.gguf") as llama:
        for text in (checkpoints.NASTY, checkpoints.TEXT.read_text()[:20000]):
            assert llama.tokenize(text, add_special=True) == own.encode(text).ids
