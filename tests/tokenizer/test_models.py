"""Kinds of tokenizer model: ids of real llama.cpp equal those of the tokenizers library, and so do those of the way back."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from quantforge import tokenizer
from quantforge.errors import FormatError, UnsupportedError
from quantforge.tokenizer import pretokenizers
from tests import checkpoints
from tests.checkpoints import NASTY
from tests.llama_cpp import Llama

TEXTS = [NASTY, *NASTY.split(" "), "", " ", "a  b", "  a", "a\n b", *NASTY.splitlines()]


def check(directory: Path, encode: Callable[[str], list[int]], texts: list[str], config: dict[str, Any] | None = None) -> dict:
    """llama.cpp's ids, and those of the tokenizer rebuilt from GGUF's keys, equal `encode`'s. Returns the keys."""
    keys = tokenizer.metadata(directory, config or {})
    back = tokenizers.Tokenizer.from_str(tokenizer.to_json(keys, directory))
    with Llama(checkpoints.vocab_gguf(directory, config), vocab_only=True) as llama:
        for text in texts:
            expected = encode(text)
            assert llama.tokenize(text) == expected, repr(text)
            assert back.encode(text, add_special_tokens=False).ids == expected, repr(text)
    return keys


def own(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def plain(engine: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: engine.encode(text, add_special_tokens=False).ids


def around(directory: Path) -> None:
    """What is put around a text equals too, and on the way back."""
    keys = tokenizer.metadata(directory, {})
    expected = own(directory).encode("Hello there").ids
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json(keys, directory)).encode("Hello there").ids == expected
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert llama.tokenize("Hello there", add_special=True) == expected


@pytest.mark.parametrize("options", [{}, {"tidy": False}, {"symbols": ("<|x|>",)}], ids=["t5", "spaces kept", "symbols"])
def test_unigram_json(options, tmp_path):
    directory = checkpoints.unigram_json(tmp_path, **options)
    texts = [t.replace("</s>", "") for t in TEXTS]
    if "tidy" in options:  # Metaspace adds no ▁ before a space, llama.cpp does; "\r\n" is one character to tokenizers' normalizer
        texts = [t.strip().replace("\r\n", "\n") for t in texts]
    keys = check(directory, plain(own(directory)), texts)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.unknown_token_id"]) == ("t5", 2)
    around(directory)


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False}], ids=["t5", "bare"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity", "nmt_nfkc_cf"])
def test_unigram_file(rule, options, tmp_path):
    settings = checkpoints.T5 | {"normalization_rule_name": rule} | options
    directory = checkpoints.sentencepiece(tmp_path, 500, model_type="unigram", byte_fallback=False, **settings)
    (directory / "tokenizer.model").rename(directory / "spiece.model")
    processor = sentencepiece.SentencePieceProcessor(str(directory / "spiece.model"))
    texts = [t.replace("\0", "").replace("</s>", "").replace("\r\n", "\n") for t in TEXTS]
    # SentencePiece adds scores in float32, llama.cpp and tokenizers in float64: "`" + "``" and "``" + "`" tie in one of them.
    texts = [re.sub(r"([^\w\s])\1+", r"\1", t) for t in texts]
    keys = check(directory, processor.EncodeAsIds, texts)
    assert ("tokenizer.ggml.precompiled_charsmap" in keys) == (rule != "identity")


def test_unigram_of_fairseq_has_ids_of_its_own(tmp_path):
    """XLM-R's sentencepiece.bpe.model: <s>, <pad>, </s>, <unk>, then the pieces, then <mask>."""
    directory = checkpoints.sentencepiece(tmp_path, 500, model_type="unigram", byte_fallback=False)
    (directory / "tokenizer.model").rename(directory / "sentencepiece.bpe.model")
    processor = sentencepiece.SentencePieceProcessor(str(directory / "sentencepiece.bpe.model"))
    checkpoints.save(directory, "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", "unk_token": "<unk>"})
    keys = tokenizer.metadata(directory, {})
    tokens = keys["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<s>", "<pad>", "</s>", "<unk>"] and tokens[-1] == "<mask>" and len(tokens) == 502
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        text = NASTY.replace("\0", "").replace("</s>", "")
        assert llama.tokenize(text) == [i + 1 if i else 3 for i in processor.EncodeAsIds(text)]
    checkpoints.save(directory, "tokenizer_config.json", {"tokenizer_class": "CamembertTokenizer"})
    with pytest.raises(UnsupportedError, match="ids of CamembertTokenizer"):
        tokenizer.metadata(directory, {})


def test_unigram_that_llama_cpp_cannot_run(tmp_path):
    directory = checkpoints.unigram_json(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    for change, said in (
        ({"model": content["model"] | {"byte_fallback": True}}, "byte fallback"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Digits"}}, "pre-tokenizer Digits"),
    ):
        checkpoints.save(directory, "tokenizer.json", content | change)
        with pytest.raises(UnsupportedError, match=said):
            tokenizer.metadata(directory, {})


# Where accents are stripped, llama.cpp keeps the first letter alone of a Hangul syllable.
WORDS = [re.sub("[가-힣]", "", t) for t in TEXTS]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
def test_wordpiece(lowercase, accents, tmp_path):
    directory = checkpoints.wordpiece(tmp_path, lowercase=lowercase, strip_accents=accents)
    keys = check(directory, plain(own(directory)), WORDS)
    assert keys["tokenizer.ggml.model"] == "bert"
    around(directory)


def test_wordpiece_that_llama_cpp_cannot_run(tmp_path):
    directory = checkpoints.wordpiece(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    for change, said in (
        ({"normalizer": None}, "normalizer none"),
        ({"normalizer": content["normalizer"] | {"clean_text": False}}, "clean_text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ({"model": content["model"] | {"continuing_subword_prefix": "@@"}}, "'@@'"),
    ):
        checkpoints.save(directory, "tokenizer.json", content | change)
        with pytest.raises(UnsupportedError, match=said):
            tokenizer.metadata(directory, {})


@pytest.mark.parametrize(
    ("options", "model", "pre"),
    [({}, "gemma4", "gemma4"), ({"bos": False}, "gpt2", "sarvam-moe"), ({"words": True}, "gpt2", "mmbert")],
    ids=["gemma", "sarvam", "mmbert"],
)
def test_bpe_on_text_itself(options, model, pre, tmp_path):
    directory = checkpoints.gemma_json(tmp_path, **options)
    texts = TEXTS if not options.get("words") else [t for t in TEXTS if "\n" not in t and t]
    keys = check(directory, plain(own(directory)), texts)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == (model, pre)


def test_gemma_whose_merges_are_scores_is_sentencepiece_and_gemma4_is_not(tmp_path):
    directory = checkpoints.gemma_json(tmp_path, 500)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    made = [p for p in vocab if len(p) > 1 and not p.startswith("<")]
    content["model"]["merges"] = [[p[:i], p[i:]] for p in made for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    checkpoints.save(directory, "tokenizer.json", content)
    assert check(directory, plain(own(directory)), TEXTS)["tokenizer.ggml.model"] == "llama"
    assert check(directory, plain(own(directory)), TEXTS, {"model_type": "gemma4_text"})["tokenizer.ggml.model"] == "gemma4"


def test_other_models_are_refused_by_name(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    content = json.loads((directory / "tokenizer.json").read_text())
    checkpoints.save(directory, "tokenizer.json", content | {"model": {"type": "WordLevel", "vocab": {"a": 0}}})
    with pytest.raises(UnsupportedError, match="WordLevel"):
        tokenizer.metadata(directory, {})
    (directory / "tokenizer.json").unlink()
    checkpoints.sentencepiece(directory, 400, model_type="char", byte_fallback=False)
    with pytest.raises(UnsupportedError, match="words or characters"):
        tokenizer.metadata(directory, {})


def test_vocab_and_merges_without_tokenizer_json(tmp_path):
    directory = checkpoints.byte_level(tmp_path)
    engine = own(directory)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer.json").unlink()
    checkpoints.save(directory, "vocab.json", model["vocab"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokens = {f"{n}_token": "<|end|>" for n in ("bos", "eos", "unk")}
    checkpoints.save(directory, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **tokens})
    keys = check(directory, plain(engine), TEXTS)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    (directory / "merges.txt").unlink()
    checkpoints.save(directory, "vocab.json", [1])
    with pytest.raises(FormatError, match=r"vocab\.json"):
        tokenizer.metadata(directory, {})


@pytest.mark.slow
def test_tekken_json_alone(tmp_path):
    """Mistral's file: tokens as bytes in the order of their merges, control tokens before them."""
    (kind,) = (k for k in pretokenizers.KINDS if k.name == "tekken")
    directory = checkpoints.byte_level(tmp_path, 600, checkpoints.isolated(*kind.splits), model={"ignore_merges": True})
    letters = {c: b for b, c in bytes_to_unicode().items()}
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    octets = [bytes(letters[c] for c in t) for t in vocab if not t.startswith("<|")]
    octets = sorted(o for o in octets if len(o) == 1) + [o for o in octets if len(o) > 1]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).unlink()
    entries = [{"rank": i, "token_bytes": base64.b64encode(o).decode(), "token_str": None} for i, o in enumerate(octets)]
    sizes = {"num_vocab_tokens": len(octets), "default_vocab_size": len(octets) + 3, "default_num_special_tokens": 3}
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    config = {"pattern": kind.splits[0], "version": "v7", **sizes}
    checkpoints.save(directory, "tekken.json", {"config": config, "vocab": entries, "special_tokens": special})
    checkpoints.save(directory, "config.json", {"model_type": "mistral"})
    keys = tokenizer.metadata(directory, {})
    assert keys["tokenizer.ggml.pre"] == "tekken"
    assert keys["tokenizer.ggml.tokens"][3:259] == [bytes_to_unicode()[b] for b in range(256)]
    ids = {n: keys[f"tokenizer.ggml.{n}_token_id"] for n in ("bos", "eos")}
    assert ids == {"bos": 1, "eos": 2}
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert llama.adds_bos
        back = tokenizers.Tokenizer.from_str(tokenizer.to_json(keys, directory))
        text = NASTY.replace("</s>", "")
        assert llama.tokenize(text) == back.encode(text, add_special_tokens=False).ids
