"""An adapter by itself as a GGUF file: llama.cpp with it says what the merged model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantforge as qf
from quantforge import formats
from quantforge.errors import QuantForgeError, RecipeError, UnsupportedError
from quantforge.formats.merged import Names
from tests import adapters
from tests.adapters import low_rank, random, save
from tests.archs import models
from tests.llama_cpp import Llama

TOKENS = np.random.default_rng(1).integers(3, 300, 40).tolist()


def everything(model: Path, directory: Path, **config: Any) -> Path:
    """An adapter of every matrix of a checkpoint, but for the embedding's."""
    tensors: dict[str, Any] = {}
    with formats.open_path(model) as source:
        names = Names(source, [])
        assert names.arch is not None
        weights = names.arch.weights(names.config, names.shapes)
        wanted = {s for w in weights if w.role not in ("token_embd", "position_embd") and not w.single for s in w.sources}
        for i, name in enumerate(sorted(n for n in wanted if len(names.shapes[n]) == 2)):
            out, n = names.shapes[name][::-1] if names.crosswise(name) else names.shapes[name]
            tensors |= low_rank(name.removesuffix(".weight"), out, n, 6 if "up_proj" in name else 4, seed=2 * i)
    tensors = {k: v * np.float32(0.3) for k, v in tensors.items()}  # what llama.cpp rounds grows with the change
    return save(directory, tensors, rank_pattern={".*up_proj": 6}, **config)


def logits(model: Path, adapter: Path | None = None) -> Any:
    with Llama(model) as llama:
        return (llama if adapter is None else llama.adapt(adapter)).logits(TOKENS)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaForCausalLM", {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),  # rows of q and k in another order
        ("GPT2LMHeadModel", {}),  # stored crosswise
        ("Qwen3MoeForCausalLM", {}),  # experts stacked
        ("Qwen3NextForCausalLM", {}),  # fused, and reordered
    ],
)
def test_llama_cpp_with_it_is_the_merged_model(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    model = models.make(tmp_path / "m", name)
    a = everything(model, tmp_path / "a", **config)
    qf.convert(model, tmp_path / "base.gguf", "F32")
    qf.convert(model, tmp_path / "merged.gguf", "F32", lora=a)
    report = qf.convert(a, tmp_path / "a.gguf", base=model)
    assert {t.type for t in report.tensors} == {"F32"}
    want, before = logits(tmp_path / "merged.gguf"), logits(tmp_path / "base.gguf")
    have = logits(tmp_path / "base.gguf", tmp_path / "a.gguf")
    size = np.abs(want).max()
    assert np.abs(want - before).max() > 0.1 * size
    assert np.abs(have - want).max() < 1e-5 * size
    qf.convert(a, tmp_path / "half.gguf", "F16", base=tmp_path / "base.gguf")  # the base may be GGUF as well
    half = logits(tmp_path / "base.gguf", tmp_path / "half.gguf")
    assert np.abs(half - want).max() < 5e-3 * size


def test_the_embedding(tmp_path: Path) -> None:
    """A and B change places there."""
    model = models.make(tmp_path / "m", "LlamaForCausalLM")
    lora = {"model.embed_tokens.lora_embedding_A": random(4, 320), "model.embed_tokens.lora_embedding_B": random(64, 4)}
    base = formats.open_path(model).read("model.embed_tokens.weight").decode()
    a = save(tmp_path / "a", lora | {"model.embed_tokens.base_layer.weight": base})  # as PEFT saves it
    qf.convert(model, tmp_path / "base.gguf", "F32")
    qf.convert(model, tmp_path / "merged.gguf", "F32", lora=a)
    qf.convert(a, tmp_path / "a.gguf", base=model)
    want = logits(tmp_path / "merged.gguf")
    assert np.abs(logits(tmp_path / "base.gguf", tmp_path / "a.gguf") - want).max() < 1e-5 * np.abs(want).max()


def test_a_file_names_the_adapters_that_are_in_it(tmp_path: Path) -> None:
    """Also where the model came from a file that says what it was made of, and behind a float file on the way."""
    model = models.make(tmp_path / "m", "LlamaForCausalLM")
    a = save(tmp_path / "a", low_rank("model.layers.0.self_attn.q_proj", 64, 64))
    qf.convert(model, tmp_path / "base.gguf", "F32")
    qf.convert(tmp_path / "base.gguf", tmp_path / "merged.gguf", "F32", lora=a)
    qf.convert(tmp_path / "merged.gguf", tmp_path / "small.gguf", "Q4_0")
    said = []
    for name in ("base", "merged", "small"):
        with qf.open(tmp_path / f"{name}.gguf") as source:
            said.append({k.removeprefix("quantforge.source."): v for k, v in source.config.items() if "quantforge.source" in k})
    base, merged, small = said
    assert base.keys() == {"name", "sha256"} and base["name"] == "m"
    assert merged["name"] == "base.gguf" and merged["adapters"] == "a" and merged["sha256"] != base["sha256"]
    assert small == merged


def test_what_the_file_says(tmp_path: Path) -> None:
    adapters.llama(tmp_path / "m")
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    tensors = low_rank(q, 32, 32) | low_rank(up, 48, 32, 8)
    a = save(tmp_path / "a", tensors, rank_pattern={"up_proj": 8}, alora_invocation_tokens=[3, 4])
    qf.convert(a, tmp_path / "a.gguf", base=tmp_path / "m")
    with qf.open(tmp_path / "a.gguf") as source:
        assert {k: source.config[k] for k in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")} == {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 8.0,
        }
        assert source.config["adapter.alora.invocation_tokens"].tolist() == [3, 4]
        read = {n: source.read(n).decode() for n in source.weights}
    assert list(read) == [f"blk.{i}.{t}.weight.lora_{k}" for i, t in ((0, "attn_q"), (1, "ffn_up")) for k in "ab"]
    assert (read["blk.1.ffn_up.weight.lora_b"] == tensors[f"{up}.lora_B.weight"]).all(), (
        "alpha / rank is what PEFT has: untouched"
    )
    assert (read["blk.0.attn_q.weight.lora_a"] == tensors[f"{q}.lora_A.weight"]).all()


def test_scales_that_differ_are_in_b(tmp_path: Path) -> None:
    """llama.cpp knows one alpha, and divides it by each matrix's rank."""
    adapters.llama(tmp_path / "m")
    v, up = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"
    tensors = low_rank(v, 16, 32) | low_rank(up, 48, 32)
    a = save(tmp_path / "a", tensors, alpha_pattern={"v_proj": 2}, use_rslora=True)
    qf.convert(a, tmp_path / "a.gguf", base=tmp_path / "m")
    with qf.open(tmp_path / "a.gguf") as source:
        assert source.config["adapter.lora.alpha"] == 16.0  # 8 / √4 · 4
        np.testing.assert_allclose(
            source.read("blk.0.attn_v.weight.lora_b").decode(), tensors[f"{v}.lora_B.weight"] / 4, rtol=1e-6
        )


Q = low_rank("model.layers.0.self_attn.q_proj", 32, 32)
E = {"model.embed_tokens.lora_embedding_A": random(4, 40), "model.embed_tokens.lora_embedding_B": random(32, 4)}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], bool, str]] = {
    "DoRA": (
        Q | {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": random(32)},
        {"use_dora": True},
        False,
        "q_proj.weight is DoRA",
    ),
    "a whole tensor": (
        Q | {"lm_head.weight": random(40, 32, seed=9)},
        {"modules_to_save": ["lm_head"]},
        False,
        "lm_head.weight is stored whole",
    ),
    "tokens": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(1, 32)},
        {"trainable_token_indices": [1]},
        False,
        "trained tokens",
    ),
    "a bias": (Q | {"model.layers.0.self_attn.q_proj.lora_B.bias": random(32)}, {"lora_bias": True}, False, "a bias of its own"),
    "a tied embedding": (E, {}, True, "are one"),
    "a tied head": (low_rank("lm_head", 40, 32), {}, True, "are one"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_gguf_cannot_hold_is_named(tmp_path: Path, kind: str) -> None:
    tensors, config, tied, message = REFUSED[kind]
    adapters.llama(tmp_path / "m", tie_word_embeddings=tied)
    a = save(tmp_path / "a", tensors, **config)
    with pytest.raises(UnsupportedError, match=rf"{message}.*--lora {a}"):
        qf.convert(a, tmp_path / "a.gguf", base=tmp_path / "m")
    assert not (tmp_path / "a.gguf").exists()


def test_matrices_that_llama_cpp_takes_no_adapter_for(tmp_path: Path) -> None:
    model = models.make(tmp_path / "m", "MiniCPM3ForCausalLM")
    a = everything(model, tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"minicpm3 graph takes no adapter there.*--lora"):
        qf.convert(a, tmp_path / "a.gguf", base=model)


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    adapters.llama(tmp_path / "m")
    a = save(tmp_path / "a", Q)
    wrong: list[tuple[str, dict[str, Any], type[QuantForgeError], str]] = [
        ("o", {}, RecipeError, r"name the output \*\.gguf"),
        ("o.gguf", {"recipe": "Q8_0"}, RecipeError, "F32 .*F16 or BF16"),
        ("o.gguf", {"lora": [a]}, RecipeError, "no --lora"),
    ]
    for out, options, error, message in wrong:
        with pytest.raises(error, match=message):
            qf.convert(a, tmp_path / out, base=tmp_path / "m", **options)


def test_verify_names_it(tmp_path: Path) -> None:
    adapters.llama(tmp_path / "m")
    lora = adapters.save(tmp_path / "a", adapters.low_rank("model.layers.0.mlp.up_proj", adapters.INTER, adapters.HIDDEN))
    qf.convert(lora, tmp_path / "a.gguf", base=tmp_path / "m")
    (check,) = qf.verify(tmp_path / "a.gguf", tmp_path / "m", fast=True).checks
    assert check.status == "differs" and "an adapter (LoRA), not a model" in check.detail
