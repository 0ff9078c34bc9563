"""tokenizer.* metadata: ids of real llama.cpp equal those of the tokenizer's own program; kinds, flags, hostile files."""

from __future__ import annotations

import json
import random
import re
import unicodedata

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers

from quantforge import tokenizer
from quantforge.errors import FormatError, QuantForgeError, UnsupportedError
from quantforge.tokenizer import pretokenizers
from tests import checkpoints
from tests.checkpoints import BYTE_LEVEL, LLAMA3, NASTY, QWEN2, isolated
from tests.llama_cpp import Llama


def random_texts(n: int = 60) -> list[str]:
    rng = random.Random(11)
    pieces = [*NASTY, *NASTY.split(" "), "\n", "  ", "\t", " 's", "'T", "12", " x", "日", "🚀", "\u0301"]
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 40))) for _ in range(n)]


def disagreements(llama: Llama, encode, texts: list[str]) -> list[str]:
    return [t for t in texts if llama.tokenize(t) != encode(t)]


def without(regex: str, text: str) -> str:
    """The text after all that matches is taken out, what comes to match by that too."""
    while regex and re.search(regex, text):
        text = re.sub(regex, "", text)
    return text


@pytest.mark.parametrize("kind", pretokenizers.KINDS, ids=lambda k: k.name)
def test_ids_of_every_known_kind_equal(kind, tmp_path):
    directory = checkpoints.byte_level(tmp_path, 600, isolated(*kind.splits), model={"ignore_merges": kind.ignore_merges})
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    if not kind.adds_bos:
        checkpoints.save(directory, "tokenizer_config.json", {"eos_token": "<|end|>"})
    keys = tokenizer.metadata(directory, {})
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", kind.name)
    texts = [without(kind.apart, t) for t in (NASTY, *random_texts())]
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert llama.n_vocab == own.get_vocab_size()
        assert not llama.adds_bos
        assert not disagreements(llama, lambda t: own.encode(t, add_special_tokens=False).ids, texts)
    back = tokenizers.Tokenizer.from_str(tokenizer.to_json(keys, "x"))
    assert all(back.encode(t, add_special_tokens=False).ids == own.encode(t, add_special_tokens=False).ids for t in texts)


# With a dummy prefix, llama.cpp puts one after each user-defined symbol too; SentencePiece does not.
SYMBOLS = {"add_dummy_prefix": False, "user_defined_symbols": ["<|x|>", "▁▁▁"]}


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, SYMBOLS], ids=["prefix", "no prefix", "symbols"])
def test_ids_of_sentencepiece_equal(options, tmp_path):
    directory = checkpoints.sentencepiece(tmp_path, **options)
    own = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    keys = tokenizer.metadata(directory, {})
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("llama", "default")
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        texts = [t.replace("\0", "") for t in [NASTY, *random_texts()]]
        assert not disagreements(llama, own.EncodeAsIds, texts)
        assert llama.adds_bos


@pytest.mark.parametrize("metaspace", [None, "first", "never"])
def test_ids_of_llama_json_equal(metaspace, tmp_path):
    directory = checkpoints.llama_json(tmp_path, metaspace=metaspace)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [t.replace("</s>", "") for t in [NASTY, *random_texts()]]
    if metaspace == "first":  # Metaspace adds no ▁ before a space, llama.cpp does
        texts = [t.lstrip(" ") for t in texts]
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert not disagreements(llama, lambda t: own.encode(t, add_special_tokens=False).ids, texts)
        assert llama.tokenize("a", add_special=True) == own.encode("a").ids


def test_json_made_from_a_sentencepiece_model(tmp_path, caplog):
    """Llama 2's tokenizer.json is made so: merges are all splits of every piece, best score first."""
    directory = checkpoints.sentencepiece(tmp_path)
    own = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    vocab = {own.IdToPiece(i): i for i in range(own.GetPieceSize())}
    merges = []
    for piece in sorted((p for p in vocab if not own.IsByte(vocab[p])), key=lambda p: -own.GetScore(vocab[p])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]]))
    checkpoints.llama_json(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"] |= {"vocab": vocab, "merges": merges}
    checkpoints.save(directory, "tokenizer.json", content)
    with_model = tokenizer.metadata(directory, {})
    (directory / "tokenizer.model").unlink()
    keys = tokenizer.metadata(directory, {})
    assert not caplog.records
    for key in ("model", "pre", "tokens", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert keys[f"tokenizer.ggml.{key}"] == with_model[f"tokenizer.ggml.{key}"]
    np.testing.assert_array_equal(keys["tokenizer.ggml.token_type"], with_model["tokenizer.ggml.token_type"])
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        texts = [t.replace("\0", "").replace("</s>", "") for t in [NASTY, *random_texts()]]
        assert not disagreements(llama, own.EncodeAsIds, texts)


def test_merges_that_llama_cpp_would_add_are_warned_of(tmp_path, caplog):
    directory = checkpoints.llama_json(tmp_path, 2000)
    tokenizer.metadata(directory, {})
    assert "merges that are not in its list" in caplog.text


def test_invalid_bytes_are_replacement_characters(tmp_path):
    directory = checkpoints.byte_level(tmp_path)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    garbage = b"a \xff b\xc3 c \x80\xf5 \xe2\x82"
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        expected = own.encode("a \ufffd b\ufffd c \ufffd\ufffd \ufffd\ufffd", add_special_tokens=False).ids
        assert llama.tokenize(garbage) == expected


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


GPT2 = BYTE_LEVEL | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPELLINGS = {
    "gpt-2": (GPT2, sequence(GPT2), sequence(split(pretokenizers.GPT2), BYTE_LEVEL)),
    "smollm": (sequence(DIGITS, GPT2), sequence(split(r"\p{N}"), GPT2)),
    "falcon": (
        sequence(
            {"type": "Punctuation", "behavior": "Contiguous"},
            GPT2,
            {"type": "Digits", "individual_digits": False},
            split("[0-9][0-9][0-9]"),
        ),
    ),
    "qwen2": (
        sequence(split(QWEN2), BYTE_LEVEL),
        sequence(split(QWEN2, "Removed", True), BYTE_LEVEL),
        # cl100k's way of writing
        sequence(
            split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
            BYTE_LEVEL,
        ),
    ),
}


@pytest.mark.parametrize(("name", "pre"), [(n, p) for n, ps in SPELLINGS.items() for p in ps])
def test_kinds_are_recognised_by_what_they_do(name, pre, tmp_path):
    directory = checkpoints.byte_level(tmp_path, 560, pre)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.metadata(directory, {})["tokenizer.ggml.pre"] == name
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert not disagreements(llama, lambda t: own.encode(t, add_special_tokens=False).ids, [NASTY, *random_texts(20)])


def test_nfc_is_accepted_and_harmless_on_composed_text(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 560, isolated(QWEN2), normalizer={"type": "NFC"})
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        text = unicodedata.normalize("NFC", NASTY)
        assert llama.tokenize(text) == own.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("parts", "shown", "near"),
    [
        ({"pre_tokenizer": isolated(QWEN2.replace("[\\r\\n]*", "[\\r\\n/]*"))}, "[\\r\\n/]*", "qwen2"),
        ({"pre_tokenizer": isolated(r"\w+|\W")}, r"\w+|\W", ""),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase", "gpt-2"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace", ""),
        ({"pre_tokenizer": None}, "(none)", ""),
        ({"pre_tokenizer": split(QWEN2)}, "no ByteLevel step", "qwen2"),
    ],
)
def test_unknown_kind_is_an_error_with_a_way_out(parts, shown, near, tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    content = json.loads((directory / "tokenizer.json").read_text())
    for key, value in parts.items():
        content[key] = content[key] | value if key == "model" else value
    checkpoints.save(directory, "tokenizer.json", content)
    with pytest.raises(UnsupportedError) as e:
        tokenizer.metadata(directory, {})
    message = str(e.value)
    assert shown in message and "\n" not in message
    assert f"--pre-tokenizer {near}" in message
    assert tokenizer.metadata(directory, {}, pre_tokenizer="qwen2")["tokenizer.ggml.pre"] == "qwen2"


def test_ignore_merges_of_the_other_kind(tmp_path):
    """It matters only if the vocabulary has a token that its merges do not lead to."""
    directory = checkpoints.byte_level(tmp_path, 600, isolated(QWEN2), model={"ignore_merges": True})
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.metadata(directory, {})["tokenizer.ggml.pre"] == "qwen2"
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert not disagreements(llama, lambda t: own.encode(t, add_special_tokens=False).ids, [NASTY, *random_texts()])
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["vocab"]["zqzq"] = 600
    checkpoints.save(directory, "tokenizer.json", content)
    with pytest.raises(UnsupportedError, match="ignore_merges true; the nearest is qwen2: --pre-tokenizer qwen2"):
        tokenizer.metadata(directory, {})


def test_byte_fallback_beside_byte_level_is_byte_level(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300, model={"byte_fallback": True})
    assert tokenizer.metadata(directory, {})["tokenizer.ggml.model"] == "gpt2"


def test_a_prefix_space_is_warned_of(tmp_path, caplog):
    tokenizer.metadata(checkpoints.byte_level(tmp_path, 300, GPT2 | {"add_prefix_space": True}), {})
    assert "puts a space before the text" in caplog.text


def test_unknown_pre_tokenizer_name(tmp_path):
    with pytest.raises(UnsupportedError, match="did you mean qwen2"):
        tokenizer.metadata(checkpoints.byte_level(tmp_path, 300), {}, pre_tokenizer="qwen-2")


def test_every_other_name_loads_in_llama_cpp(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for name in sorted(pretokenizers.BY_NAME.keys() - {k.name for k in pretokenizers.KINDS}):
        with Llama(checkpoints.vocab_gguf(directory, pre_tokenizer=name), vocab_only=True) as llama:
            assert not llama.adds_bos, name  # the post-processor adds none, whatever the name's default
            assert llama.tokenize("Hello  there") == own.encode("Hello  there").ids, name


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [
        {"SpecialToken": {"id": "<|begin|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|begin|>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
}
WITH_EOS = TEMPLATE | {"single": [*TEMPLATE["single"], {"SpecialToken": {"id": "<|end|>", "type_id": 0}}], "pair": []}
SPECIALS = {
    "none": (None, {}, {}),
    "bos": (TEMPLATE, {}, {}),
    "llama3": ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, {}, {"pad_token_id": 2}),
    "bos and eos": (WITH_EOS, {}, {}),
    "flag off": (TEMPLATE, {"add_bos_token": False}, {}),
    "flag on": (None, {"add_bos_token": True, "add_eos_token": True}, {}),
    "prefix": (None, {"add_prefix_space": False}, {}),
    "objects": (None, {"bos_token": {"content": "<|end|>", "special": True}, "pad_token": "<|end|>"}, {}),
    "from config": (None, {"bos_token": None, "eos_token": None}, {"bos_token_id": 5, "eos_token_id": 6}),
    "end differs": (WITH_EOS, {"eos_token": "<|begin|>"}, {}),
}


@pytest.mark.parametrize("name", SPECIALS)
def test_special_tokens_as_gguf_py_reads_them(name, tmp_path):
    """gguf.SpecialVocab is what llama.cpp's converter uses; ours says in addition when no BOS is added."""
    post, tokenizer_config, config = SPECIALS[name]
    directory = checkpoints.byte_level(tmp_path, 300, post_processor=post)
    base = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    checkpoints.save(directory, "tokenizer_config.json", base | tokenizer_config)
    checkpoints.save(directory, "config.json", config)
    theirs = gguf.SpecialVocab(directory, load_merges=True)
    keys = tokenizer.metadata(directory, config)
    k = gguf.Keys.Tokenizer
    ids = {"bos": k.BOS_ID, "eos": k.EOS_ID, "unk": k.UNK_ID, "pad": k.PAD_ID, "sep": k.SEP_ID, "eot": k.EOT_ID}
    adds = {"bos": k.ADD_BOS, "eos": k.ADD_EOS, "sep": k.ADD_SEP}
    assert {n: keys[i] for n, i in ids.items() if i in keys} == theirs.special_token_ids
    assert {n: keys[i] for n, i in adds.items() if i in keys} == theirs.add_special_token
    assert keys[k.MERGES] == theirs.merges
    assert keys.get(k.ADD_PREFIX) == tokenizer_config.get("add_prefix_space")


@pytest.mark.parametrize("post", [None, TEMPLATE, WITH_EOS], ids=["none", "bos", "bos and eos"])
@pytest.mark.parametrize("regex", [LLAMA3, QWEN2], ids=["llama3", "qwen2"])
def test_special_tokens_are_added_as_the_tokenizer_does(post, regex, tmp_path):
    parts = {"model": {"ignore_merges": regex == LLAMA3}, "post_processor": post}
    if post is WITH_EOS:
        tokens = {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in enumerate(("<|begin|>", "<|end|>"))}
        parts["post_processor"] = post | {"special_tokens": tokens}
    directory = checkpoints.byte_level(tmp_path, 300, isolated(regex), **parts)
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert llama.tokenize("Hello there", add_special=True) == own.encode("Hello there").ids


@pytest.mark.parametrize("extra", [["<named>"], [{"content": "<named>"}], {"some_token": "<named>"}], ids=str)
def test_token_types_and_padding(extra, tmp_path, caplog):
    directory = checkpoints.byte_level(tmp_path, 300)
    content = json.loads((directory / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [
        added | {"id": 300, "content": "<tool>", "special": False},
        added | {"id": 301, "content": "<|odd|>", "special": False},
        added | {"id": 302, "content": "▁▁", "special": False},
        added | {"id": 303, "content": "<named>", "special": False},
    ]
    checkpoints.save(directory, "tokenizer.json", content)
    checkpoints.save(directory, "tokenizer_config.json", {"bos_token": "<|begin|>", "extra_special_tokens": extra})
    keys = tokenizer.metadata(directory, {"vocab_size": 306})
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert types.dtype == np.int32 and len(types) == len(tokens) == 306
    assert tokens[300:] == ["<tool>", "<|odd|>", "  ", "<named>", "[PAD304]", "[PAD305]"]
    assert types[300:].tolist() == [4, 3, 4, 3, 5, 5]
    assert types[:3].tolist() == [3, 3, 1]
    own = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    path = checkpoints.vocab_gguf(directory, {"vocab_size": 306})
    with Llama(path, vocab_only=True) as llama:
        text = "a<tool>b <|odd|> c<named>d<|end|>"
        assert llama.tokenize(text, special=True) == own.encode(text, add_special_tokens=False).ids
    short = tokenizer.metadata(directory, {"vocab_size": 303})
    assert len(short["tokenizer.ggml.tokens"]) == 303
    assert "1 added tokens have no row in the embedding of 303 and are left out: '<named>'" in caplog.text
    with pytest.raises(FormatError, match="token id 299 is outside of the model's vocab_size 299"):
        tokenizer.metadata(directory, {"vocab_size": 299})


def test_sentencepiece_padding_types_and_added_tokens(tmp_path):
    directory = checkpoints.sentencepiece(tmp_path, 500)
    decoder = {"500": {"content": "<|turn|>", "special": True}, "502": {"content": "<tool>", "special": False}}
    checkpoints.save(directory, "tokenizer_config.json", {"added_tokens_decoder": decoder, "pad_token": "<unk>"})
    keys = tokenizer.metadata(directory, {"vocab_size": 504, "bos_token_id": 1, "eos_token_id": [2, 500]})
    own = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    assert keys["tokenizer.ggml.tokens"][:500] == [own.IdToPiece(i) for i in range(500)]
    assert keys["tokenizer.ggml.tokens"][500:] == ["<|turn|>", "[PAD501]", "<tool>", "[PAD503]"]
    np.testing.assert_array_equal(keys["tokenizer.ggml.scores"][:500], np.float32([own.GetScore(i) for i in range(500)]))
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4].tolist() == [2, 3, 3, 6] and types[500:].tolist() == [3, 5, 4, 5]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.padding_token_id"] == 0


def test_unigram_model_is_refused(tmp_path):
    checkpoints.sentencepiece(tmp_path, 500, model_type="unigram")
    with pytest.raises(UnsupportedError, match="unigram"):
        tokenizer.metadata(tmp_path, {})


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("config", "files", "default", "named"),
    [
        ({"chat_template": CHAT}, {}, CHAT, {}),
        (
            {"chat_template": [{"name": "default", "template": CHAT}, {"name": "tool use", "template": "T"}]},
            {},
            CHAT,
            {"tool_use": "T"},
        ),
        ({}, {"chat_template.jinja": CHAT}, CHAT, {}),
        ({"chat_template": "stale"}, {"chat_template.jinja": CHAT}, CHAT, {}),
        (
            {"chat_template": "stale"},
            {"chat_template.jinja": CHAT, "additional_chat_templates/rag.jinja": "R"},
            CHAT,
            {"rag": "R"},
        ),
        ({}, {"chat_template.jinja": CHAT, "additional_chat_templates/rag.jinja": "R"}, CHAT, {"rag": "R"}),
        ({}, {"chat_template.json": json.dumps({"chat_template": CHAT})}, CHAT, {}),
        ({}, {}, None, {}),
    ],
)
def test_chat_templates_are_carried_over_as_text(config, files, default, named, tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    checkpoints.save(directory, "tokenizer_config.json", config)
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    keys = tokenizer.metadata(directory, {})
    assert keys.get("tokenizer.chat_templates", []) == list(named)
    with Llama(checkpoints.vocab_gguf(directory), vocab_only=True) as llama:
        assert llama.chat_template() == default
        assert all(llama.chat_template(n) == t for n, t in named.items())


def test_both_spellings_of_merges(tmp_path):
    directory = checkpoints.byte_level(tmp_path, 560)
    content = json.loads((directory / "tokenizer.json").read_text())
    before = tokenizer.metadata(directory, {})["tokenizer.ggml.merges"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
    for merges in (pairs, [" ".join(p) for p in pairs]):
        content["model"]["merges"] = merges
        checkpoints.save(directory, "tokenizer.json", content)
        assert tokenizer.metadata(directory, {})["tokenizer.ggml.merges"] == before


def test_broken_sentencepiece_models_are_clear_errors(tmp_path):
    path = checkpoints.sentencepiece(tmp_path, 400) / "tokenizer.model"
    data = path.read_bytes()
    rng = random.Random(1)
    broken = [data[:cut] for cut in [0, 1, 2, 3, *(rng.randrange(len(data)) for _ in range(50))]]
    for _ in range(50):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        broken.append(bytes(flipped))
    messages = []
    for content in broken:
        path.write_bytes(content)
        try:
            tokenizer.metadata(tmp_path, {})
        except QuantForgeError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("tokenizer.model" in m and "\n" not in m for m in messages)


def nested(depth):
    step = {"type": "Nothing"}
    for _ in range(depth):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("model"),
        lambda c: c.update(model=[]),
        lambda c: c["model"].update(vocab=[1, 2]),
        lambda c: c["model"].update(vocab={"a": "b"}),
        lambda c: c["model"].update(vocab={"a": 1, "b": 1}),
        lambda c: c["model"].update(vocab={"a": 10**12}),
        lambda c: c["model"].update(vocab={"\ud800": 400}),
        lambda c: c["model"].update(merges=[1]),
        lambda c: c["model"].update(merges=["a"]),
        lambda c: c["model"].update(merges=[["a", "b", "c"]]),
        lambda c: c["model"].update(merges=[]),
        lambda c: c["model"].update(type="WordPiece"),
        lambda c: c.update(added_tokens=[{"content": "x"}]),
        lambda c: c.update(added_tokens=7),
        lambda c: c.update(pre_tokenizer="ByteLevel"),
        lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}),
        lambda c: c.update(pre_tokenizer=nested(400)),
        lambda c: c.update(normalizer=[1]),
        lambda c: c.update(post_processor={"type": "TemplateProcessing", "single": [1, 2]}),
        lambda c: c.update(post_processor={"type": "RobertaProcessing"}),
    ],
)
def test_malformed_tokenizer_json_is_one_clear_error(change, tmp_path):
    directory = checkpoints.byte_level(tmp_path, 300)
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(QuantForgeError) as e:
        tokenizer.metadata(directory, {})
    assert "tokenizer.json" in str(e.value) or str(directory) in str(e.value)
    assert "\n" not in str(e.value)


def test_files_that_are_not_there_or_not_json(tmp_path):
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        tokenizer.metadata(tmp_path, {})
    checkpoints.byte_level(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FormatError, match="tokenizer_config"):
        tokenizer.metadata(tmp_path, {})


def test_shipped_tokenizer():
    directory = checkpoints.TEXT.parents[1] / "demo-model"
    keys = tokenizer.metadata(directory, json.loads((directory / "config.json").read_text()))
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert len(keys["tokenizer.ggml.tokens"]) == 4096
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["tokenizer.ggml.add_bos_token"] is True
