"""verify: what is right passes, whatever chose the codes; every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import codecs, formats
from quantforge.arrays import Parts
from quantforge.codecs import Encoded
from quantforge.demo import MODEL
from quantforge.errors import RecipeError
from quantforge.formats import Header
from quantforge.verification.report import Verification
from tests.archs import models

Change = Callable[[dict[str, Encoded]], None]


def rewritten(path: Path, out: Path, change: Change = lambda tensors: None, **metadata: Any) -> Path:
    """A GGUF file with other tensors or metadata."""
    with formats.open_path(path) as source:
        tensors = {name: source.read(name) for name in source.weights}
        change(tensors)
        config = {**source.config, **{k.replace("__", "."): v for k, v in metadata.items()}}
        gguf = formats.get("gguf")
        header = Header(config, {k: formats.Stored(e.codec, e.shape) for k, e in tensors.items()})
        with gguf.create(out, header) as sink:
            for name, e in tensors.items():
                sink.write(name, e.parts)
            sink.commit()
    return out


def status(v: Verification) -> dict[str, str]:
    return {c.name: c.status for c in v.checks}


def wrong(v: Verification) -> list[str]:
    return [t.name for t in v.tensors if t.status != "ok"]


# ---- what is right


OUTPUTS: list[dict[str, Any]] = [
    {"recipe": "Q4_K_M"},
    {"recipe": "NVFP4"},
    {"recipe": "TQ2_0"},
    {"recipe": "int4-g128-sym"},
    {"format": "safetensors", "recipe": "Q3_K_S"},
    {"format": "gptq", "bits": 3},
    {"format": "awq"},
    *({"format": "compressed-tensors", "recipe": r} for r in ("W4A16_ASYM", "FP8_BLOCK", "NVFP4A16")),
    {"format": "bitsandbytes", "recipe": "nf4-dq"},
]


@pytest.mark.parametrize("options", OUTPUTS, ids=lambda o: " ".join(map(str, o.values())))
def test_what_convert_writes_is_right_and_derived(options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / ("m" if "format" in options else "m.gguf")
    qf.convert(MODEL, out, **options)
    v = qf.verify(out, MODEL, derived_from=MODEL, fast=True)
    assert v.code == 0, v.checks
    expected = ["structure", "tensors", "derived", "settings", "tokenizer", "provenance"]
    assert status(v) == dict.fromkeys(expected, "ok") and all(t.equal for t in v.tensors)


def test_from_gguf_and_from_what_is_quantized(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "q8.gguf", "Q8_0")
    qf.convert(tmp_path / "q8.gguf", tmp_path / "back")
    qf.convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow_requantize=True)
    for made in ("back", "q4.gguf"):
        v = qf.verify(tmp_path / made, tmp_path / "q8.gguf", derived_from=tmp_path / "q8.gguf", fast=True)
        assert v.code == 0, v.checks
    assert status(qf.verify(tmp_path / "q4.gguf", derived_from=MODEL, fast=True))["derived"] == "differs"


@pytest.mark.parametrize(("method", "format"), [("gptq", "gptq"), ("awq", "gguf"), ("awq+gptq", "gptq")])
def test_chosen_codes_and_moved_scales_are_right(method: str, format: str, tmp_path: Path) -> None:
    model = models.make(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=2)  # two heads of queries to each of values
    out = tmp_path / ("m.gguf" if format == "gguf" else "m")
    options: dict[str, Any] = {"recipe": "Q4_0"} if format == "gguf" else {"format": "gptq", "group_size": 32}
    qf.convert(model, out, method=method, calibration_chunks=4, calibration_ctx=16, **options)
    v = qf.verify(out, model, derived_from=model)
    assert {k: s for k, s in status(v).items() if s != "ok"} == {"derived": "unknown"}, v.checks
    moved = [t.name for t in v.tensors if t.detail.startswith("scaled")]
    assert bool(moved) == ("awq" in method)


def test_importance_is_needed_to_tell_bit_by_bit(tmp_path: Path) -> None:
    qf.calibrate(MODEL, tmp_path / "imatrix.gguf", chunks=2, ctx=32)
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_S", tmp_path / "imatrix.gguf")
    v = qf.verify(tmp_path / "m.gguf", MODEL, derived_from=MODEL, fast=True)
    assert v.code == 2 and status(v)["derived"] == "unknown" and status(v)["tensors"] == "ok"
    v = qf.verify(tmp_path / "m.gguf", MODEL, derived_from=MODEL, fast=True, importance=tmp_path / "imatrix.gguf")
    assert v.code == 0 and all(t.equal for t in v.tensors)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_architectures_that_change_order_and_numbers(name: str, tmp_path: Path) -> None:
    model = models.make(tmp_path / "model", name, num_hidden_layers=1)
    qf.convert(model, tmp_path / "m.gguf", "Q8_0")
    qf.convert(tmp_path / "m.gguf", tmp_path / "back")
    for out, base in (("m.gguf", model), ("back", tmp_path / "m.gguf")):
        v = qf.verify(tmp_path / out, base, fast=name == "GPT2LMHeadModel")
        assert v.code == 0, v.checks
    assert status(qf.verify(tmp_path / "back", model, fast=True))["tensors"] == "differs"  # Q8_0's numbers are not bf16's


# ---- what is wrong


def swapped(tensors: dict[str, Encoded]) -> None:
    a, b = "blk.1.ffn_up.weight", "blk.3.ffn_up.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def changed(name: str, how: Callable[[Encoded], Parts]) -> Change:
    def change(tensors: dict[str, Encoded]) -> None:
        e = tensors[name]
        tensors[name] = Encoded(e.codec, e.shape, how(e))

    return change


def data(how: Callable[[np.ndarray], None]) -> Callable[[Encoded], Parts]:
    def parts(e: Encoded) -> Parts:
        d = e.parts["data"].copy()
        how(d)
        return {**e.parts, "data": d}

    return parts


def headless(tensors: dict[str, Encoded]) -> None:
    del tensors["output.weight"]


def halves_as_pairs(d: np.ndarray) -> None:
    heads = d.reshape(-1, 32, d.shape[-1])
    d[:] = heads.reshape(-1, 2, 16, d.shape[-1]).swapaxes(1, 2).reshape(d.shape)


def two_rows(d: np.ndarray) -> None:
    d[[5, 9]] = d[[9, 5]]


def last_block(e: Encoded) -> Parts:
    d = e.parts["data"].copy()
    d[-1, -e.codec.type_size :] = 0  # type: ignore[attr-defined]
    return {**e.parts, "data": d}


def larger(e: Encoded) -> Parts:
    return e.codec.encode(e.decode() * np.float32(1.5))


def one_row_larger(e: Encoded) -> Parts:
    w = e.decode()
    w[7] *= 2
    return e.codec.encode(w)


Q, UP, DOWN = "blk.2.attn_q.weight", "blk.1.ffn_up.weight", "blk.4.ffn_down.weight"
DAMAGE: dict[str, tuple[Change, list[str]]] = {
    "swapped": (swapped, ["blk.1.ffn_up.weight", "blk.3.ffn_up.weight"]),
    "not permuted": (changed(Q, data(halves_as_pairs)), [Q]),
    "two rows": (changed(UP, data(two_rows)), [UP]),
    "truncated": (changed(DOWN, last_block), [DOWN]),
    "scale": (changed(UP, larger), [UP]),
    "scale of a row": (changed(UP, one_row_larger), [UP]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("made")

    def make(recipe: str) -> Path:
        path = directory / f"{recipe}.gguf"
        if not path.exists():
            qf.convert(MODEL, path, qf.Recipe(recipe, codecs.get(recipe)))
        return path

    return make


def seen(recipe: str, damage: str) -> bool:
    """Ternary rounding of numbers that are not ternary is off by nearly their size: no factor can be told from that."""
    return not (recipe == "TQ2_0" and damage.startswith("scale"))


RECIPES = ["Q8_0", "Q4_0", "Q4_K", "Q3_K", "Q2_K", "IQ2_S", "TQ2_0"]


@pytest.mark.parametrize(("recipe", "damage"), [(r, d) for r in RECIPES for d in DAMAGE if seen(r, d)])
def test_damage_is_found(recipe: str, damage: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    change, names = DAMAGE[damage]
    v = qf.verify(rewritten(made(recipe), tmp_path / "m.gguf", change), MODEL, fast=True)
    assert v.code == 1 and status(v)["tensors"] == "differs" and wrong(v) == names, v.checks


def test_not_finite_missing_and_foreign(made: Callable[[str], Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, Encoded]) -> None:
        changed(DOWN, data(lambda d: d[3].view(np.float16)[:1].fill(np.nan)))(tensors)
        del tensors["blk.0.attn_v.weight"]
        tensors["blk.9.attn_v.weight"] = tensors["blk.1.attn_v.weight"]
        tensors["blk.1.attn_k.weight"] = tensors["blk.1.attn_q.weight"]

    v = qf.verify(rewritten(made("Q8_0"), tmp_path / "m.gguf", change), MODEL, fast=True)
    said = {c.name: c.detail for c in v.checks}
    assert v.code == 1 and wrong(v) == [DOWN] and "weight [3, 0] is nan" in said["tensors"]
    assert (
        "blk.0.attn_v.weight is missing" in said["structure"] and "blk.9.attn_v.weight is not of the model" in said["structure"]
    )
    assert "blk.1.attn_k.weight is [256, 256], it should be [" in said["structure"]


def test_checkpoints_with_other_names_heads_and_gaps(tmp_path: Path) -> None:
    model = models.make(tmp_path / "model", "LlamaForCausalLM", num_hidden_layers=1, tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]

    def variant(name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], tied: bool = True) -> Path:
        shutil.copytree(model, tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        save_file(change(dict(tensors)), tmp_path / name / "model.safetensors")
        return tmp_path / name

    wrapped = variant("wrapped", lambda t: {f"_orig_mod.{k}": v for k, v in t.items()})
    twice = variant("twice", lambda t: {**t, "lm_head.weight": embedding})
    other = variant("other", lambda t: {**t, "lm_head.weight": embedding[::-1].copy()}, tied=False)
    gap = variant("gap", lambda t: {k: v for k, v in t.items() if "q_proj" not in k})
    assert [qf.verify(p, model, fast=True).code for p in (wrapped, twice, other, gap)] == [0, 0, 1, 1]
    qf.convert(other, tmp_path / "other.gguf", "Q8_0")
    dropped = rewritten(tmp_path / "other.gguf", tmp_path / "dropped.gguf", headless)
    v = qf.verify(dropped, other, fast=True)  # the embedding takes the head's place, and is not that
    assert v.code == 1 and wrong(v) == ["token_embd.weight"]


def test_numbers_that_are_kept_have_to_be_equal(made: Callable[[str], Path], tmp_path: Path) -> None:
    norm = "blk.3.ffn_norm.weight"
    for factor in (2, 1.0001):
        change = changed(norm, data(partial(_multiply, factor=factor)))
        v = qf.verify(rewritten(made("Q8_0"), tmp_path / "m.gguf", change), MODEL, fast=True)
        assert wrong(v) == [norm]


def _multiply(d: np.ndarray, factor: float) -> None:
    d *= np.float32(factor)


def test_settings_and_tokenizer(made: Callable[[str], Path], tmp_path: Path) -> None:
    with formats.open_path(made("Q8_0")) as source:
        tokens = list(source.config["tokenizer.ggml.tokens"])
    tokens[300], tokens[301] = tokens[301], tokens[300]
    changes = {"llama__rope__freq_base": 5000.0, "llama__context_length": 99, "tokenizer__ggml__tokens": tokens}
    v = qf.verify(rewritten(made("Q8_0"), tmp_path / "m.gguf", **changes), MODEL)
    assert status(v)["settings"] == status(v)["tokenizer"] == "differs"
    said = {c.name: c.detail for c in v.checks}
    assert "rope.freq_base is 5000.0, it should be 10000.0" in said["settings"] and "context_length is 99" in said["settings"]


def test_logits_find_what_nothing_else_does(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantforge.verification.run._plain", lambda values: {})
    v = qf.verify(rewritten(made("Q8_0"), tmp_path / "m.gguf", llama__rope__freq_base=10.0), MODEL)
    assert status(v)["settings"] == "ok" and status(v)["logits"] == "differs" and v.code == 1


def test_what_cannot_be_read_or_told(made: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(made("Q8_0").read_bytes()[:-5000])
    v = qf.verify(tmp_path / "m.gguf", MODEL, fast=True)
    assert v.code == 1 and "truncated" in v.checks[0].detail
    v = qf.verify(made("Q8_0"), tmp_path / "nothing", fast=True)
    assert v.code == 2 and status(v) == {"reference": "unknown"}
    (tmp_path / "imatrix").write_text("no")
    v = qf.verify(made("Q8_0"), MODEL, fast=True, importance=tmp_path / "imatrix")
    assert v.code == 2 and status(v) == {"imatrix": "unknown"}
    with pytest.raises(RecipeError, match="--against"):
        qf.verify(made("Q8_0"))


def test_provenance_names_the_source(tmp_path: Path) -> None:
    model = models.make(tmp_path / "model", "LlamaForCausalLM")
    other = models.make(tmp_path / "other", "LlamaForCausalLM", initializer_range=0.1)
    qf.convert(model, tmp_path / "m.gguf", "Q8_0")
    qf.convert(model, tmp_path / "none.gguf", "Q8_0", provenance=False)
    (tmp_path / "moved").mkdir()
    model.rename(tmp_path / "moved" / "copy")
    copy = tmp_path / "moved" / "copy"
    seen = {p: status(qf.verify(tmp_path / "m.gguf", p, fast=True))["provenance"] for p in (copy, other)}
    assert seen == {copy: "ok", other: "note"}
    v = qf.verify(tmp_path / "none.gguf", copy, fast=True)
    assert status(v)["provenance"] == "note" and v.code == 0
    with formats.open_path(tmp_path / "none.gguf") as source:
        assert not [k for k in source.config if k.startswith("quantforge.")]


def test_command_without_torch(made: Callable[[str], Path], tmp_path: Path) -> None:
    hide = "import sys; sys.modules.update(torch=None, transformers=None); from quantforge.cli import main; main()"
    run = [sys.executable, "-c", hide, "verify", str(made("Q4_K")), "--against", str(MODEL)]
    done = subprocess.run([*run, "--fast"], capture_output=True, text=True)
    assert done.returncode == 0 and "tensors     ok" in done.stdout and not done.stderr
    done = subprocess.run([*run, "--json"], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == told["code"] == 2 and told["schema"] == "quantforge.verify/1"
    bad = rewritten(made("Q4_K"), tmp_path / "m.gguf", swapped)
    done = subprocess.run([*run[:4], str(bad), "--against", str(MODEL), "--fast"], capture_output=True, text=True)
    assert done.returncode == 1 and "blk.3.ffn_up.weight  Q4_K     DIFFERS" in done.stdout
