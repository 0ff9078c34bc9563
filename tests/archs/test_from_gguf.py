"""GGUF files as checkpoint directories: the numbers of the file, config.json that transformers takes, the same token ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import quantforge as qf
from quantforge import archs, codecs, tokenizer
from quantforge.archs import from_gguf as checkpoint
from quantforge.archs.rope import llama3_rope_factors
from quantforge.calibration.importance import Importance
from quantforge.demo import MODEL
from quantforge.formats import Header
from quantforge.runtime import Model
from quantforge.tokenizer import pretokenizers
from tests import checkpoints
from tests.checkpoints import LLAMA3, NASTY, QWEN2, isolated
from tests.clients.test_llama_cpp import MODELS
from tests.llama_cpp import Llama

MODELS = MODELS | {
    "yarn-mscale": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
            | {"original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5}
        },
    )
}


def weights(path: Path) -> dict[str, np.ndarray]:
    with qf.open(path) as source:
        return {k: source.read(k).decode() for k in source.weights}


def logits(path: Path, dtype: str = "float32") -> Any:
    import torch
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        return model, model(torch.tensor([[int(i) for i in np.random.default_rng(5).integers(0, 300, 120)]])).logits


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Every number, and everything in config.json that changes logits."""
    kind, changes = MODELS[name]
    original = checkpoints.model(tmp_path / "m", kind, **changes)
    qf.convert(original, tmp_path / "m.gguf", "F32")
    qf.convert(tmp_path / "m.gguf", tmp_path / "back", threads=2)
    before, after = weights(original), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for k, w in before.items():
        np.testing.assert_array_equal(after[k], w)
    (model, ours), (_, theirs) = logits(tmp_path / "back"), logits(original)
    exact = "yarn" not in name and "llama3" not in name  # their numbers went through f32
    np.testing.assert_allclose(ours, theirs, atol=0 if exact else 2e-4 * float(theirs.abs().max()))
    assert type(model).__name__ == ("Llama" if kind == "Mistral" else kind) + "ForCausalLM"
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("kind", "options", "stored"),
    [
        ("F16", {}, "F16 F32"),
        ("BF16", {}, "BF16 F32"),
        ("Q8_0", {"recipe": "F32"}, "F32"),
        ("Q8_0", {}, "BF16 F32"),
        ("Q4_K_M", {"recipe": "F16", "max_shard_size": 1_000_000}, "F16 F32"),
    ],
    ids=str,
)
def test_types(kind: str, options: dict[str, Any], stored: str, tmp_path: Path) -> None:
    """Floats stay what they are, quantized tensors become bf16 or what --type says; logits are the GGUF file's own."""
    qf.convert(MODEL, tmp_path / "m.gguf", kind)
    qf.convert(tmp_path / "m.gguf", tmp_path / "m", format="safetensors", **options)
    with qf.open(tmp_path / "m") as source:
        assert {s.codec.name for s in source.weights.values()} == set(stored.split())
        main = next(s.codec.name for k, s in source.weights.items() if "q_proj" in k)
    said = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[main]
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] == said
    rounding = {"F16": "float16", "F32": "float32"}.get(main, qf.arrays.BF16)
    with qf.open(tmp_path / "m.gguf") as source:
        model = Model(source, "m")
        for k, w in weights(tmp_path / "m").items():
            np.testing.assert_array_equal(w, model.decode(k).astype(rounding if w.ndim > 1 else "float32").astype(np.float32))
        if said == "float32":
            import torch

            ids = torch.tensor([[int(i) for i in np.random.default_rng(5).integers(0, 300, 120)]])
            with torch.no_grad(), model.resident() as module:
                np.testing.assert_array_equal(logits(tmp_path / "m")[1], module(ids).logits)
    made, _ = logits(tmp_path / "m", said)
    assert made.generation_config.eos_token_id == 1 and made.generation_config.bos_token_id == 0


def test_names_and_model_types_are_those_of_transformers() -> None:
    import transformers

    for name, arch in archs.supported().items():
        cls = getattr(transformers, name, None)
        if cls is not None and name == arch.hf[0]:
            assert cls.config_class.model_type in (arch.model_type or arch.name, "mistral")
    assert checkpoint.find_arch({"general.architecture": "llama"}, Path()).hf[0] == "LlamaForCausalLM"


def test_experts_come_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    original = checkpoints.model(tmp_path / "m", "Qwen3Moe", **sizes)
    qf.convert(original, tmp_path / "m.gguf", "F32")
    qf.convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = weights(original), weights(tmp_path / "back")
    assert before.keys() == after.keys() and sum(".experts.3." in k for k in after) == 6
    for k, w in before.items():
        np.testing.assert_array_equal(after[k], w)
    np.testing.assert_array_equal(logits(tmp_path / "back")[1], logits(original)[1])

    # quantized experts, and the router left alone
    qf.convert(original, tmp_path / "q.gguf", "Q4_0")
    report = qf.convert(tmp_path / "q.gguf", tmp_path / "gptq", format="gptq", group_size=32)
    kinds = {t.name: t.type for t in report.tensors}
    assert (
        kinds["model.layers.0.mlp.experts.3.up_proj.weight"] == "int4-g32-sym"
        and kinds["model.layers.0.mlp.gate.weight"] == "F32"
    )
    with qf.open(tmp_path / "gptq") as a, qf.open(tmp_path / "q.gguf") as b:
        stacked = b.read("blk.1.ffn_down_exps.weight").decode()
        for e in range(4):
            np.testing.assert_array_equal(a.read(f"model.layers.1.mlp.experts.{e}.down_proj.weight").decode(), stacked[e])
    qf.convert(tmp_path / "m.gguf", tmp_path / "m4", format="gptq", group_size=32, method="gptq", calibration_chunks=4)
    qf.convert(original, tmp_path / "m4-original", format="gptq", group_size=32, method="gptq", calibration_chunks=4)
    expected = weights(tmp_path / "m4-original")
    for k, w in weights(tmp_path / "m4").items():
        np.testing.assert_array_equal(w, expected[k])


def test_experts_have_their_own_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that stand alone in the output are encoded as in the stacked tensor, from either kind of source."""
    sizes = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    original = checkpoints.model(tmp_path / "m", "Qwen3Moe", **sizes)
    qf.convert(original, tmp_path / "m.gguf", "F32")
    draw = np.random.default_rng(5)
    with qf.open(tmp_path / "m.gguf") as source:
        shapes = {k: (*w.shape[:-2], w.shape[-1]) for k, w in source.weights.items() if len(w.shape) > 1}
    importance = Importance({k: draw.lognormal(sigma=2, size=s).astype(np.float32) for k, s in shapes.items()})
    qf.convert(original, tmp_path / "stacked.gguf", "Q4_0", importance)
    qf.convert(original, tmp_path / "alone", "Q4_0", importance)
    qf.convert(tmp_path / "m.gguf", tmp_path / "apart", "Q4_0", importance)
    with qf.open(tmp_path / "stacked.gguf") as a, qf.open(tmp_path / "alone") as b, qf.open(tmp_path / "apart") as c:
        for role, name in (("ffn_down", "down_proj"), ("ffn_up", "up_proj")):
            stacked, q = a.read(f"blk.1.{role}_exps.weight"), importance[f"blk.1.{role}_exps.weight"]
            for e in range(4):
                alone = b.read(f"model.layers.1.mlp.experts.{e}.{name}.weight")
                np.testing.assert_array_equal(alone.parts["data"], stacked.parts["data"][e])
                np.testing.assert_array_equal(c.read(f"model.layers.1.mlp.experts.{e}.{name}.weight").decode(), alone.decode())
                w = weights(original)[f"model.layers.1.mlp.experts.{e}.{name}.weight"]
                np.testing.assert_array_equal(alone.decode(), codecs.quantize(w, "Q4_0", importance=q[e]).decode())


# ---- quantized checkpoints


@pytest.mark.parametrize(
    ("kind", "format", "options", "lossless"),
    [
        ("Q4_0", "gptq", {"group_size": 32}, True),
        ("Q4_0", "gptq", {"group_size": 32, "version": "gptq_v2"}, True),
        ("Q4_0", "gptq", {"bits": 8, "group_size": 32}, True),
        ("Q8_0", "gptq", {"bits": 8, "group_size": 32}, True),
        ("Q4_0", "awq", {"group_size": 32, "symmetric": True}, True),
        ("Q4_0", "awq", {"group_size": 32}, True),
        ("Q4_0", "compressed-tensors", {"bits": 4, "group_size": 32}, False),
        ("Q8_0", "compressed-tensors", {"bits": 8, "group_size": 32}, False),
    ],
    ids=str,
)
def test_integers_are_taken_over(kind: str, format: str, options: dict[str, Any], lossless: bool, tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", kind)
    report = qf.convert(tmp_path / "m.gguf", tmp_path / "m", format=format, measure=True, **options)
    rows = [t for t in report.tensors if t.type.startswith("int")]
    assert len(rows) == 42 and all(t.note and ("lossless" in t.note) == lossless for t in rows)
    if lossless:
        with qf.open(tmp_path / "m.gguf") as source:
            model, made = Model(source, "m"), weights(tmp_path / "m")
            for t in rows:
                np.testing.assert_array_equal(made[t.name], model.decode(t.name))
    assert max(t.rel_rmse or 0 for t in rows) <= (0 if lossless else 2.0**-8)


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_the_way_through_gguf_changes_nothing(format: str, tmp_path: Path) -> None:
    """Original -> format, and original -> BF16 GGUF -> format, with and without a method."""
    original = checkpoints.model(tmp_path / "m", "Llama", hidden_size=128, intermediate_size=128, num_key_value_heads=4)
    qf.convert(original, tmp_path / "gguf.gguf", "F32")
    for method in ("rtn", "gptq") if format == "gptq" else ("rtn",):
        made = []
        for source in (original, tmp_path / "gguf.gguf"):
            out = tmp_path / f"{method}-{source.stem}"
            qf.convert(source, out, format=format, method=method, calibration_chunks=4)
            made.append(weights(out))
        assert made[0].keys() == made[1].keys()
        for k, w in made[0].items():
            np.testing.assert_array_equal(made[1][k], w)


def test_what_takes_the_integers_over_is_named(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0")
    with pytest.raises(qf.RecipeError, match=r"already quantized \(Q4_0\).*int4-g32-sym takes it over"):
        qf.convert(tmp_path / "m.gguf", tmp_path / "m", format="gptq")
    qf.convert(tmp_path / "m.gguf", tmp_path / "m", format="gptq", allow_requantize=True)


# ---- tokenizers


def same_ids(directory: Path, tmp_path: Path, texts: list[str] = [NASTY, "a", "", " b", "1234567 <|end|> x</s>y"]) -> Any:  # noqa: B006
    """The tokenizer of a directory, and the one rebuilt from its GGUF metadata, both by transformers."""
    import transformers

    metadata = tokenizer.metadata(directory, {})
    out = tmp_path / "rebuilt"
    out.mkdir()
    for name, content in tokenizer.files(metadata, {"max_position_embeddings": 4096}, directory).items():
        (out / name).write_bytes(content)
    for d in (directory, out):
        checkpoints.save(d, "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(d) for d in (out, directory))
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours) == len(theirs)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
    return ours


BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
}


def test_tokenizer_like_llama_3(tmp_path: Path) -> None:
    parts = {"post_processor": BOS_FIRST, "model": {"ignore_merges": True}}
    directory = checkpoints.byte_level(tmp_path, 700, isolated(LLAMA3), **parts)
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoints.save(directory, "tokenizer_config.json", named | {"chat_template": chat})
    assert same_ids(directory, tmp_path).chat_template == chat


def test_tokenizer_like_qwen_2(tmp_path: Path) -> None:
    directory = checkpoints.byte_level(tmp_path, 700, isolated(QWEN2))
    named = {"bos_token": None, "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoints.save(directory, "tokenizer_config.json", named)
    same_ids(directory, tmp_path)


def test_tokenizer_like_llama_2(tmp_path: Path) -> None:
    directory = checkpoints.llama_json(tmp_path)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    checkpoints.save(directory, "tokenizer_config.json", named)
    same_ids(directory, tmp_path)


def test_tokenizer_of_a_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    directory = checkpoints.sentencepiece(tmp_path)
    own = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    ours = tokenizers.Tokenizer.from_str(tokenizer.to_json(tokenizer.metadata(directory, {}), directory))
    text = NASTY.replace("\0", "").replace("</s>", "")
    assert ours.encode(text, add_special_tokens=False).ids == own.EncodeAsIds(text)
    assert ours.encode(text).ids == [1, *own.EncodeAsIds(text)]


def test_tokenizer_that_is_shipped(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((MODEL / name).read_bytes())
    same_ids(directory, tmp_path, [NASTY, checkpoints.TEXT.read_text()[:50_000]])


@pytest.mark.parametrize("name", [n for n, k in pretokenizers.BY_NAME.items() if n != k.name])
def test_pre_tokenizers_under_other_names_split_as_llama_cpp(name: str, tmp_path: Path) -> None:
    kind = pretokenizers.BY_NAME[name]
    directory = checkpoints.byte_level(tmp_path, 600, isolated(*kind.splits))
    metadata = tokenizer.metadata(directory, {}, pre_tokenizer=name)
    ours = tokenizers.Tokenizer.from_str(tokenizer.to_json(metadata, directory))
    with Llama(checkpoints.vocab_gguf(directory, pre_tokenizer=name), vocab_only=True) as llama:
        text = re.sub(kind.apart, "", NASTY) if kind.apart else NASTY
        assert llama.tokenize(text) == ours.encode(text, add_special_tokens=False).ids


def test_generation_settings(tmp_path: Path) -> None:
    metadata = tokenizer.metadata(checkpoints.byte_level(tmp_path, 300), {}) | {
        "tokenizer.ggml.eot_token_id": 5,
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": np.int32(20),
        "general.sampling.top_p": float(np.float32(0.95)),
    }
    made = json.loads(tokenizer.files(metadata, {}, tmp_path)["generation_config.json"])
    assert made == {"bos_token_id": 0, "eos_token_id": [1, 5], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    metadata["general.sampling.temp"] = 0.0
    made = json.loads(tokenizer.files(metadata, {}, tmp_path)["generation_config.json"])
    assert made == {"bos_token_id": 0, "eos_token_id": [1, 5]}  # greedy: nothing to sample


# ---- what has no inverse


@pytest.mark.parametrize("context", [8192, 4096, 64])
@pytest.mark.parametrize("high", [4.0, 8.0])
@pytest.mark.parametrize(("dim", "theta"), [(128, 500000.0), (64, 500000.0), (16, 10000.0), (8, 10000.0)])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_have_an_inverse(context: int, high: float, dim: int, theta: float, factor: float) -> None:
    rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": context}
    factors = llama3_rope_factors(rope | {"rope_theta": theta}, dim)
    found = checkpoint.llama3_scaling(factors, theta, Path("m"))
    if dim == 128:
        assert found == {"rope_type": "llama3"} | rope
    np.testing.assert_allclose(llama3_rope_factors(found | {"rope_theta": theta}, dim), factors, rtol=2e-4)


def test_factors_of_no_llama3(tmp_path: Path) -> None:
    with pytest.raises(qf.UnsupportedError, match="not the factors of Llama 3"):
        checkpoint.llama3_scaling(np.array([1, 8, 2, 5], np.float32), 1e4, tmp_path)


REFUSED = [
    ({"general.architecture": "mamba9"}, "architecture 'mamba9' is not known"),
    ({"tokenizer.ggml.pre": "kimi-k9"}, "pre-tokenizer 'kimi-k9'"),
    ({"tokenizer.ggml.model": "rwkv"}, "tokenizer model 'rwkv'"),
    ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
    ({"tokenizer.ggml.eos_token_id": 99999}, "99999"),
    ({"llama.block_count": 5}, "no place for"),
    ({"llama.block_count": 7}, "lacks tensors"),
    ({"llama.embedding_length": 128}, "metadata make it"),
    ({"llama.attention.head_count": "eight"}, "no number"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q8_0")
    with qf.open(tmp_path / "m.gguf") as source:
        changed = {k: v for k, v in ({**source.config, **changes}).items() if v is not None}
        with qf.formats.get("gguf").create(tmp_path / "x.gguf", Header(changed, dict(source.weights))) as sink:
            for name in source.weights:
                sink.write(name, source.read(name).parts)
            sink.commit()
    with pytest.raises(qf.QuantForgeError, match=message) as e:
        qf.convert(tmp_path / "x.gguf", tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    if "kimi-k2" in message:
        qf.convert(tmp_path / "x.gguf", tmp_path / "out", pre_tokenizer="gpt-2")
        assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize(("kind", "message"), [("adapter", "LoRA.*--lora"), ("imatrix", "--imatrix"), ("mmproj", "--mmproj")])
def test_files_that_are_no_models_are_named(kind: str, message: str) -> None:
    metadata = {"general.type": kind, "general.architecture": "llama"}
    with pytest.raises(qf.UnsupportedError, match=f"x.gguf: .*{message}"):
        checkpoint.find_arch(metadata, Path("x.gguf"))
    checkpoint.check_is_model(metadata | {"general.type": "model"}, Path("x.gguf"))
    checkpoint.check_is_model(metadata | {"general.type": "mmproj"}, Path("x.gguf"), whole=False)  # it may be quantized
