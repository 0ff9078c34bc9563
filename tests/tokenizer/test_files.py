"""The files around a tokenizer: added tokens that contradict each other, several end tokens, missing rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from quantforge import tokenizer
from quantforge.errors import FormatError
from tests import checkpoints
from tests.llama_cpp import Llama

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def add(directory: Path, *entries: tuple[int, str], **options: Any) -> Path:
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"] += [PLAIN | options | {"id": i, "content": t} for i, t in entries]
    checkpoints.save(directory, "tokenizer.json", content)
    return directory


STALE = {
    "text in the vocabulary": ([(310, "e"), (300, "<a>")], {}, {}),
    "a gap": ([(305, "<a>")], {}, {}),
    "stale added_tokens.json": ([(300, "<a>"), (301, "<b>")], {}, {"<a>": 301, "<b>": 300}),
    "stale decoder": ([(300, "<a>"), (301, "<b>")], {"301": PLAIN | {"content": "<a>"}}, {}),
    "one text twice": ([(300, "<a>"), (301, "<a>"), (301, "<b>")], {}, {}),
    "two texts, one id": ([(300, "<a>"), (300, "<b>")], {}, {}),
}


@pytest.mark.parametrize("name", STALE)
def test_two_ids_with_one_text_are_resolved_as_transformers_does(name, tmp_path):
    entries, decoder, added = STALE[name]
    directory = add(checkpoints.byte_level(tmp_path, 300), *entries)
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoints.save(directory, "tokenizer_config.json", settings | {"added_tokens_decoder": decoder})
    checkpoints.save(directory, "added_tokens.json", added)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    tokens = tokenizer.metadata(directory, {"vocab_size": 320})["tokenizer.ggml.tokens"]
    assert {t: i for i, t in enumerate(tokens) if not t.startswith("[PAD")} == theirs.get_vocab()
    with Llama(checkpoints.vocab_gguf(directory, {"vocab_size": 320}), vocab_only=True) as llama:
        text = "a<a>b<b> the"
        assert llama.tokenize(text) == theirs.encode(text, add_special_tokens=False)


def test_two_ids_with_one_text_that_nothing_resolves(tmp_path):
    """A user-defined piece is looked for in the raw text, where ▁ is a space."""
    directory = checkpoints.sentencepiece(tmp_path, 500, user_defined_symbols=["▁▁x", "  x"], normalization_rule_name="identity")
    checkpoints.save(directory, "tokenizer_config.json", {"added_tokens_decoder": {"500": PLAIN | {"content": "  x"}}})
    with pytest.raises(FormatError, match=r"are both '  x': llama\.cpp needs texts that differ"):
        tokenizer.metadata(directory, {})


def test_a_placeholder_never_has_the_text_of_a_token(tmp_path):
    directory = add(checkpoints.byte_level(tmp_path, 300), (300, "[PAD301]"))
    tokens = tokenizer.metadata(directory, {"vocab_size": 303})["tokenizer.ggml.tokens"]
    assert tokens[300] == "[PAD301]" and len(set(tokens)) == 303
    with Llama(checkpoints.vocab_gguf(directory, {"vocab_size": 303}), vocab_only=True) as llama:
        assert llama.n_vocab == 303


@pytest.mark.parametrize("kind", [checkpoints.byte_level, checkpoints.sentencepiece, checkpoints.unigram_json])
def test_added_tokens_beyond_the_embedding_are_left_out_with_a_warning(kind, tmp_path, caplog):
    directory = kind(tmp_path, 500)
    checkpoints.save(directory, "added_tokens.json", {"<a>": 500, "<b>": 501})
    tokens = tokenizer.metadata(directory, {"vocab_size": 501})["tokenizer.ggml.tokens"]
    assert tokens[500] == "<a>" and len(tokens) == 501
    assert "1 added tokens have no row in the embedding of 501 and are left out: '<b>'" in caplog.text


@pytest.mark.parametrize(("special", "level"), [(False, "WARNING"), (True, "INFO")])
def test_spaces_that_llama_cpp_will_not_take(special, level, tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer.metadata(add(checkpoints.byte_level(tmp_path, 300), (300, "<m>"), lstrip=True, special=special), {})
    assert [r.levelname for r in caplog.records if "'<m>' take the spaces beside them" in r.getMessage()] == [level]


ENDS = {
    "generation_config": ({"eos_token_id": [1, 300]}, {}, [1, 300], 300),
    "config": ({}, {"eos_token_id": [1, 300]}, [1, 300], 300),
    "generation_config first": ({"eos_token_id": [1, 300]}, {"eos_token_id": [1, 302]}, [1, 300], 300),
    "config, where generation_config has one": ({"eos_token_id": 1}, {"eos_token_id": [300, 1]}, [300, 1], 300),
    "twice": ({"eos_token_id": [300, 300, 1]}, {}, [300, 1], 300),
    "known by its text": ({"eos_token_id": [1, 301, 300]}, {}, [1, 301, 300], 300),
    "one": ({"eos_token_id": [1]}, {}, None, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_several_end_tokens(name, tmp_path):
    generation, config, every, eot = ENDS[name]
    directory = add(checkpoints.byte_level(tmp_path, 300), (300, "<stop>"), (301, "<|im_end|>"), (302, "<other>"), special=True)
    checkpoints.save(directory, "generation_config.json", generation)
    keys = tokenizer.metadata(directory, config)
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys.get("tokenizer.ggml.eot_token_id") == eot
    ends = keys.get("tokenizer.ggml.eos_token_ids")
    assert every is None if ends is None else ends.tolist() == every
    back = json.loads(tokenizer.files(keys, {}, directory)["generation_config.json"])
    assert back["eos_token_id"] == (every or 1)
    with Llama(checkpoints.vocab_gguf(directory, config), vocab_only=True) as llama:
        assert all(llama.ends(i) for i in every or [1])


def test_more_end_tokens_than_llama_cpp_has_room_for(tmp_path, caplog):
    directory = add(checkpoints.byte_level(tmp_path, 300), (300, "<x>"), (301, "<y>"), (302, "<z>"), special=True)
    checkpoints.save(directory, "generation_config.json", {"eos_token_id": [1, 300, 301, 302]})
    keys = tokenizer.metadata(directory, {})
    assert (keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.eom_token_id"]) == (300, 301)
    assert "it will not stop at '<z>' (302)" in caplog.text
    assert json.loads(tokenizer.files(keys, {}, directory)["generation_config.json"])["eos_token_id"] == [1, 300, 301, 302]


def test_a_byte_order_mark_is_read_over(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    before = tokenizer.metadata(directory, {})["tokenizer.ggml.tokens"]
    path = directory / "tokenizer.json"
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert tokenizer.metadata(directory, {})["tokenizer.ggml.tokens"] == before
    assert isinstance(tokenizer.Tokenizer(directory, {}, gguf_metadata=False).encode("a")[0][0], int)


def test_a_stale_sentencepiece_file_beside_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers reads tokenizer.json; a tokenizer.model of the same tokens has their scores."""
    checkpoints.llama_json(tmp_path, 500)
    expected = tokenizer.metadata(tmp_path, {})
    checkpoints.sentencepiece(tmp_path, 450)
    found = tokenizer.metadata(tmp_path, {})
    assert found["tokenizer.ggml.tokens"] == expected["tokenizer.ggml.tokens"]
    np.testing.assert_array_equal(found["tokenizer.ggml.scores"], expected["tokenizer.ggml.scores"])
    assert "tokenizer.model is another tokenizer than tokenizer.json" in caplog.text


def test_a_pointer_in_a_json_files_place(tmp_path: Path) -> None:
    checkpoints.byte_level(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FormatError, match=r"tokenizer\.json: a Git LFS pointer"):
        tokenizer.metadata(tmp_path, {})
