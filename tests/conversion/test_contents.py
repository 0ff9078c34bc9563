"""What an output holds beside its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import formats
from quantforge.conversion.contents import contents
from quantforge.errors import ShapeError, UnsupportedError
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


def edited(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_a_tied_model_may_be_saved_under_its_heads_name_alone(name: str, tmp_path: Path) -> None:
    def change(w: dict[str, np.ndarray]) -> None:
        w["lm_head.weight"] = w.pop("model.embed_tokens.weight")

    models.make(tmp_path / "whole", name, tie_word_embeddings=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "m")
    edited(tmp_path / "m", change)
    for m in ("whole", "m"):
        qf.convert(tmp_path / m, tmp_path / f"{m}.gguf", "F32")
    with qf.open(tmp_path / "m.gguf") as one, qf.open(tmp_path / "whole.gguf") as other:
        assert set(one.weights) == set(other.weights)
        np.testing.assert_array_equal(one.read("token_embd.weight").decode(), other.read("token_embd.weight").decode())


@pytest.mark.parametrize("rows", [328, 310])
@pytest.mark.parametrize("tied", [False, True])
def test_vocab_size_is_what_the_embedding_has(rows: int, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(w: dict[str, np.ndarray]) -> None:
        for k in [k for k in w if "embed" in k or "lm_head" in k]:
            w[k] = np.resize(w[k], (rows, w[k].shape[1]))

    edited(models.make(tmp_path / "m", "LlamaForCausalLM", tie_word_embeddings=tied), change)
    with caplog.at_level("WARNING"):
        qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32")
    assert f"vocab_size is 320, but the embedding has {rows} rows" in caplog.text
    with qf.open(tmp_path / "m.gguf") as source:
        assert source.config["llama.vocab_size"] == len(source.config["tokenizer.ggml.tokens"]) == rows
    qf.convert(tmp_path / "m", tmp_path / "copy", format="safetensors", recipe="F32")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["vocab_size"] == rows
    assert qf.load(tmp_path / "m").get_input_embeddings().weight.shape[0] == rows


def test_a_head_that_is_not_stored_is_the_embedding_only_if_config_json_says_so(tmp_path: Path) -> None:
    edited(models.make(tmp_path / "m", "LlamaForCausalLM"), lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ShapeError, match=r"lacks.*lm_head\.weight; where the head is the embedding.*tie_word_embeddings = true"):
        qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32")


def test_a_directory_of_own_types_says_who_reads_it_and_transformers_refuses_it(tmp_path: Path) -> None:
    import transformers

    models.make(tmp_path / "m", "LlamaForCausalLM")
    report = qf.convert(tmp_path / "m", tmp_path / "own", "Q8_0")
    assert [w for w in report.warnings if "read by quantforge alone" in w]
    assert not qf.convert(tmp_path / "m", tmp_path / "floats", "BF16").warnings
    for cls in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method`"):
            cls.from_pretrained(tmp_path / "own")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "own")("a").input_ids
    with qf.open(tmp_path / "own") as source:
        assert source.weights["lm_head.weight"].codec.name == "Q8_0"
    path = tmp_path / "own" / "config.json"  # as this tool wrote it before
    config = json.loads(path.read_text())
    del config["quantization_config"]["quantforge"]
    config["quantization_config"]["quant_method"] = "quantforge"
    path.write_text(json.dumps(config))
    with qf.open(tmp_path / "own") as source:
        assert source.weights["lm_head.weight"].codec.name == "Q8_0"


def test_a_tensor_of_several_weights_has_the_largest_of_their_types(tmp_path: Path) -> None:
    directory = models.make(tmp_path / "m", "YoutuForCausalLM", num_hidden_layers=2, qk_nope_head_dim=32)
    qf.convert(directory, tmp_path / "m.gguf", "F32")
    for source in (directory, tmp_path / "m.gguf"):
        for rule, expected in (("attn_v_b=Q8_0", "Q8_0"), ("attn_v_b=Q4_0", "Q5_0"), ("attn_k_b=Q8_0", "Q8_0")):
            job = qf.plan(source, tmp_path / "out", "Q5_0", format="safetensors", tensor_types=[rule])
            (t,) = (t for t in job.tensors if t.name == "model.layers.1.self_attn.kv_b_proj.weight")
            assert t.codec.name == expected, (source, rule)
            job.source.close()


CARDS = {
    "no YAML": b"---\nlicense: mit\ntags: [a\n: - {x\n---\n",
    "no UTF-8": b"---\nlicense: \xff\n---\n",
    "numbers and dates": b"---\nlicense: 2026-01-01\ntags: [1, 2.5]\nversion: 1.0\nlanguage: 3\n---\n",
    "lists": b"---\nlicense: [a, 3]\nname: [x]\nbase_model: {a: 3}\ndatasets: [3, {a: b}]\n---\n",
    "good": b"---\nlicense: mit\n---\n",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_model_card_never_stops_a_conversion(card: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (models.make(tmp_path / "m", "LlamaForCausalLM") / "README.md").write_bytes(CARDS[card])
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32")
    with qf.open(tmp_path / "m.gguf") as source:
        assert isinstance(source.config["general.name"], str)
        assert isinstance(source.config.get("general.license", ""), str)
        assert source.config.get("general.license") == "mit" or card != "good"
    assert ("model card is not read" in caplog.text) is card.startswith("no ")


def test_every_json_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    models.make(tmp_path / "m", "LlamaForCausalLM")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [1, 5], "temperature": 0.5, "do_sample": true}')
    for name in ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "quantize_config.json"):
        (tmp_path / "m" / name).write_text("{}")
    for path in (tmp_path / "m").glob("*.j*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32")
    with qf.open(tmp_path / "m.gguf") as source:
        assert source.config["general.sampling.temp"] == 0.5
        assert list(source.config["tokenizer.ggml.eos_token_ids"]) == [1, 5]
        assert source.config["tokenizer.chat_template"] == "{}"
    model = qf.load(tmp_path / "m")
    assert model.generation_config.temperature == 0.5 and model.tokenizer("a").input_ids


def test_named_chat_templates_reach_a_directory_without_folders(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models.make(tmp_path / "m", "LlamaForCausalLM")
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "rag.jinja").write_text("R")
    (tmp_path / "m" / "chat_template.jinja").write_text("D")
    qf.convert(tmp_path / "m", tmp_path / "out", "F16", format="safetensors")
    made, given = (AutoTokenizer.from_pretrained(tmp_path / d).chat_template for d in ("out", "m"))
    assert made == given == {"default": "D", "rag": "R"}


def test_several_end_tokens_of_a_gguf_file_end_what_a_loaded_model_says(tmp_path: Path) -> None:
    models.make(tmp_path / "m", "LlamaForCausalLM", eos_token_id=[5, 1])
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32")
    for path in ("m", "m.gguf"):
        assert qf.load(tmp_path / path).generation_config.eos_token_id == [5, 1]
    checks = {c.name: c.status for c in qf.verify(tmp_path / "m.gguf", tmp_path / "m", fast=True).checks}
    assert checks["tokenizer"] == "ok"


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    models.make(tmp_path / "m", "LlamaForCausalLM")
    (tmp_path / "recipe.toml").write_text('base = "Q8_0"\n')
    (tmp_path / "prompts.txt").write_text("a b\nc d\n")
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 100)
    (tmp_path / "other.txt").write_text("red green blue yellow white black\n" * 100)
    qf.calibrate("~/m", "~/im.gguf", "~/text.txt", ctx=32, chunks=4)
    qf.convert("~/m", "~/m.gguf", "~/recipe.toml", "~/im.gguf")
    run = {"text": "~/other.txt", "ctx": 32, "chunks": 2, "prompts": "~/prompts.txt", "answer_tokens": 2}
    qf.evaluate("~/m.gguf", reference="~/m", report="~/report.md", metrics=["ppl", "similarity"], **run)
    assert {p.name for p in tmp_path.iterdir()} >= {"m.gguf", "im.gguf", "report.md"}
    assert not (Path.cwd() / "~").exists()
