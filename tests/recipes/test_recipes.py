"""Presets against llama-quantize's own choices; rules, fallbacks and recipe files."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import quantforge
from quantforge import codecs, recipes
from quantforge.archs.base import Weight
from quantforge.codecs import base
from quantforge.codecs.base import Codec, GgmlCodec, register
from quantforge.errors import RecipeError
from quantforge.recipes import Choice
from quantforge.recipes.presets import PRESETS
from tests.archs import models
from tests.data import llama_rules

HERE = Path(__file__).parents[1]
DEMO = Path(quantforge.__file__).parent / "data" / "demo-model"
REFERENCE = json.loads((DEMO / "llama.cpp.json").read_text())["presets"]

ROLES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def demo_weights() -> Iterator[Weight]:
    with safe_open(DEMO / "model.safetensors", "numpy") as f:
        for name in f.keys():  # noqa: SIM118 - not a dict
            stem = name.removesuffix(".weight")
            if stem.startswith("model.layers."):
                _, _, layer, rest = stem.split(".", 3)
                gguf_name = f"blk.{layer}.{ROLES[rest]}.weight"
            else:
                gguf_name = f"{ROLES[stem]}.weight"
            yield Weight(gguf_name, tuple(f.get_slice(name).get_shape()), (name,))


def demo_metadata() -> dict[str, Any]:
    config = json.loads((DEMO / "config.json").read_text())
    return {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
    }


def all_in(weights: list[Weight], codec: str = "BF16") -> dict[str, Codec]:
    return {w.name: codecs.get(codec) for w in weights}


@pytest.fixture(scope="module", autouse=True)
def every_type() -> Iterator[None]:
    """Presets speak of types whose codecs may not be in this build: give those stand-ins with the shape rules."""
    wanted = {t for p in PRESETS.values() for t in (p.base, p.output, p.embedding or p.base, *(row[2] for row in p.rows))}
    missing = sorted((wanted | {"IQ4_NL", "MXFP4"}) - set(codecs.names()))
    for name in missing:
        register(GgmlCodec(name, size={"Q2_0": (42, 64, 18)}.get(name)))
    yield
    for name in missing:
        del base._registry.all()[name]


@pytest.mark.parametrize("importance", ["plain", "imatrix"])
@pytest.mark.parametrize("preset", REFERENCE)
def test_shipped_model_gets_the_types_llama_quantize_chose(preset: str, importance: str) -> None:
    expected = REFERENCE[preset].get(importance)
    if not expected:
        pytest.skip("llama-quantize refuses this preset without importance")
    weights = list(demo_weights())
    names = [w.name for w in weights] if importance == "imatrix" else []
    choices = recipes.get(preset).assign(weights, demo_metadata(), all_in(weights), names)
    got = {n: c.codec.name for n, c in choices.items()}
    assert {n: t for n, t in got.items() if n in expected} == {n: t for n, (t, _) in expected.items()}
    assert {t for n, t in got.items() if n not in expected} == {"F32"}


def _generator() -> Any:
    """The module that measured llama_quantize.json, for its table format."""
    spec = importlib.util.spec_from_file_location("llama_quantize", HERE / "data" / "llama_quantize.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LQ = _generator()
MEASURED = json.loads((HERE / "data" / "llama_quantize.json").read_text())


def measured_model(title: str) -> tuple[list[Weight], dict[str, Any], dict[str, Codec]]:
    """Weights, metadata and stored types of a model of llama_quantize.json."""
    spec = MEASURED["models"][title]
    weights = [Weight(name, shape, ()) for name, shape in LQ.tensors(spec)]
    metadata = {"general.architecture": spec["arch"]} | {f"{spec['arch']}.{k}": v for k, v in spec["metadata"].items()}
    return weights, metadata, {w.name: codecs.get(LQ.floats(w.name, w.shape)) for w in weights}


def types(choices: dict[str, Choice]) -> dict[str, str]:
    return {n: c.codec.name for n, c in choices.items()}


@pytest.mark.parametrize("title", MEASURED["models"])
def test_presets_choose_what_llama_quantize_chooses(title: str) -> None:
    weights, metadata, stored = measured_model(title)
    for preset, tables in MEASURED["types"][title].items():
        for importance, table in zip([(), ("x",)], [tables[0], tables[-1]], strict=True):
            got = types(recipes.get(preset).assign(weights, metadata, stored, importance))
            if isinstance(table, str):  # llama-quantize stops where ours goes on: see the fallbacks below
                assert "no tensor type fallback" in table
                continue
            expected = LQ.expand(table, MEASURED["models"][title])
            if preset == "F16":  # what is not quantized was BF16 in the file; convert_hf_to_gguf --outtype f16 makes it F16
                expected = {n: "F16" if t == "BF16" else t for n, t in expected.items()}
            assert got == expected, (preset, importance)


RULES = json.loads(llama_rules.TABLE.read_text())


def test_every_registered_architecture_has_been_measured() -> None:
    """A new architecture is one file: until someone who has llama.cpp's library measures it, this says so."""
    missing = {n for n, _ in models.names()} - {title.split(" ")[0] for title in RULES["models"]}
    if missing:
        pytest.skip(f"not measured yet, run tests/data/llama_rules.py: {', '.join(sorted(missing))}")


@pytest.mark.parametrize("title", RULES["models"])
def test_architectures_get_the_types_of_llama_quantize(title: str) -> None:
    """All presets on all samples of the registry, tensor by tensor, against llama.cpp's own function."""
    spec = RULES["models"][title]
    tensors = list(llama_rules.expand(spec["tensors"]))
    rows = [row.split(" ") for row in RULES["rows"]]
    weights = [Weight(name, shape, ()) for name, _, shape in tensors]
    stored = {w.name: codecs.get(llama_rules.stored(w)) for w in weights}
    for i, column in enumerate(RULES["columns"]):
        preset, _, importance = column.partition(" ")
        got = types(
            recipes.get(preset).assign(weights, spec["metadata"], stored, [w.name for w in weights] if importance else [])
        )
        assert got == {name: rows[row][i] for name, row, _ in tensors}, column


OPTIONS: dict[str, dict[str, Any]] = {
    "--pure": {"pure": True},
    "--leave-output-tensor": {"keep_output": True},
    "--output-tensor-type": {"output_tensor_type": "Q8_0"},
    "--token-embedding-type": {"token_embedding_type": "Q5_1"},
    "--tensor-type": {"tensor_types": ["blk.[01].attn_v=Q8_0", "ffn_down=Q5_K", ("attn_v", "Q4_0")]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_choose_what_llama_quantize_chooses(option: str) -> None:
    for title, tables in MEASURED["options"][option].items():
        weights, metadata, stored = measured_model(title)
        for preset, table in tables.items():
            expected = LQ.expand(table, MEASURED["models"][title])
            if option == "--leave-output-tensor" and "output.weight" not in expected:
                expected["token_embd.weight"] = "BF16"  # tied: ours keeps the matrix that is the output
            got = recipes.get(preset).with_rules(**OPTIONS[option]).assign(weights, metadata, stored)
            assert types(got) == expected, (title, preset)


def dense(n: int = 256, layers: int = 4, *, tied: bool = False) -> list[Weight]:
    """A small llama with rows of n."""
    outside = ["token_embd.weight", *([] if tied else ["output.weight"])]
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = [Weight(f"blk.{i}.{r}.weight", (2, n), ()) for i in range(layers) for r in roles]
    norms = [Weight(f"blk.{i}.attn_norm.weight", (n,), ()) for i in range(layers)]
    return [Weight(name, (2, n), ()) for name in outside] + blocks + norms


def assign(
    recipe: recipes.Recipe, weights: list[Weight], stored: str = "BF16", importance: tuple[str, ...] = ()
) -> dict[str, Any]:
    return recipe.assign(weights, {"general.architecture": "llama"}, all_in(weights, stored), importance)


def test_order_of_weights_does_not_matter_and_is_kept() -> None:
    weights = dense(layers=20)
    forward = assign(recipes.get("Q4_K_M"), weights)
    backward = assign(recipes.get("Q4_K_M"), weights[::-1])
    assert forward == backward
    assert list(forward) == list(backward)[::-1] == [w.name for w in weights]


@pytest.mark.parametrize(
    ("type", "n", "got"),
    [
        ("Q4_K", 384, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 896, "Q8_0"),
        ("Q3_K", 576, "Q4_0"),
        ("TQ2_0", 576, "Q4_0"),
        ("IQ4_XS", 576, "IQ4_NL"),
        ("IQ2_XXS", 100, "F16"),
        ("Q4_K", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("Q1_0", 576, "Q4_0"),
        ("NVFP4", 96, "MXFP4"),
        ("NVFP4", 100, "F16"),
    ],
)
def test_rows_that_are_no_multiple_of_the_block(type: str, n: int, got: str) -> None:
    weights = dense(n)
    choices = assign(recipes.get(type).with_rules(pure=True), weights)
    choice = choices["blk.1.attn_q.weight"]
    assert choice.codec.name == got
    assert choice.note == f"{n} columns are no multiple of {codecs.get(type).block_size}: {got} instead of {type}"
    assert choices["blk.1.attn_norm.weight"] == Choice(codecs.get("F32"))
    by_rule = assign(recipes.get("F16").with_rules([("attn_q", type)]), weights)
    assert by_rule["blk.1.attn_q.weight"] == choice


def test_no_note_where_the_shape_fits() -> None:
    assert {c.note for c in assign(recipes.get("Q4_K_M"), dense()).values()} == {None}


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "F64", "F8_E4M3"])
def test_float_presets_are_what_convert_hf_to_gguf_writes(stored: str) -> None:
    weights = [*dense(100), Weight("blk.0.ffn_gate_inp.weight", (8, 100), ()), Weight("blk.0.exp_probs_b.bias", (8, 2), ())]
    for preset in ("F32", "F16", "BF16"):
        choices = assign(recipes.get(preset), weights, stored)
        assert {n for n, c in choices.items() if c.codec.name != preset} <= {
            "blk.0.ffn_gate_inp.weight",
            "blk.0.exp_probs_b.bias",
            *(w.name for w in weights if len(w.shape) == 1),
        }
        assert choices["blk.0.ffn_gate_inp.weight"].codec.name == "F32"
        assert choices["blk.0.attn_norm.weight"].codec.name == "F32"
        assert {c.note for c in choices.values()} == {None}


@pytest.mark.parametrize(
    ("stored", "got"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("F8_E4M3", "BF16"), ("F64", "F32")]
)
def test_what_is_not_quantized_keeps_the_checkpoints_type(stored: str, got: str) -> None:
    weights = [*dense(), Weight("blk.0.time_mix_w0.weight", (8, 256), ())]
    choices = assign(recipes.get("Q4_K_M").with_rules(keep_output=True), weights, stored)
    assert choices["output.weight"].codec.name == got
    assert choices["blk.0.time_mix_w0.weight"].codec.name == got
    assert choices["blk.0.attn_norm.weight"].codec.name == "F32"
    assert choices["blk.0.attn_q.weight"].codec.name == "Q4_K"


def test_quantized_input_keeps_what_is_not_quantized_again() -> None:
    weights = [*dense(), Weight("blk.0.time_mix_w0.weight", (8, 256), ())]
    stored = all_in(weights, "Q8_0")
    choices = recipes.get("F16").assign(weights, {}, stored)
    assert choices["blk.0.time_mix_w0.weight"].codec.name == "Q8_0"
    assert choices["blk.0.attn_q.weight"].codec.name == "F16"


def test_first_rule_wins() -> None:
    recipe = recipes.get("Q4_K_M").with_rules([(r"blk\.0\.ffn_down", "Q8_0"), ("ffn_down", "Q6_K"), (r"blk\.1\.", "Q5_K")])
    got = types(assign(recipe, dense()))
    assert got["blk.0.ffn_down.weight"] == "Q8_0"
    assert got["blk.1.ffn_down.weight"] == "Q6_K"
    assert got["blk.1.attn_q.weight"] == "Q5_K"
    assert got["blk.2.attn_q.weight"] == "Q4_K"
    later = recipe.with_rules(["ffn_down=Q2_K"])  # new rules come before old ones
    assert types(assign(later, dense()))["blk.0.ffn_down.weight"] == "Q2_K"


def test_types_in_any_case_and_pattern_with_equals_sign() -> None:
    recipe = recipes.get("q4_k_m").with_rules(["(?=blk)ATTN_Q|attn_q=q8_0"])
    assert types(assign(recipe, dense()))["blk.0.attn_q.weight"] == "Q8_0"


def test_embedding_and_output_types_beat_rules() -> None:
    recipe = recipes.get("Q4_K_M").with_rules([(".", "Q2_K")], output_tensor_type="Q8_0", token_embedding_type="Q5_0")
    untied, tied = types(assign(recipe, dense())), types(assign(recipe, dense(tied=True)))
    assert (untied["output.weight"], untied["token_embd.weight"], untied["blk.0.attn_q.weight"]) == ("Q8_0", "Q5_0", "Q2_K")
    assert tied["token_embd.weight"] == "Q5_0"
    only_output = recipes.get("Q4_K_M").with_rules(output_tensor_type="Q8_0")
    assert types(assign(only_output, dense(tied=True)))["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize("name", ["Q5_K", "nf4", "MXFP4"])
def test_pure(name: str) -> None:
    if name not in codecs.names():
        pytest.skip(f"no codec {name}")
    recipe = recipes.get(name).with_rules(pure=True)
    assert {c.codec.name for n, c in assign(recipe, dense()).items() if "norm" not in n} == {name}


def test_presets_win_over_codecs_of_the_same_name() -> None:
    assert recipes.get("Q4_K").name == "Q4_K_M"
    assert recipes.get("MXFP4").pure and not recipes.get("MXFP4_MOE").pure
    assert [recipes.get(a).name for a in ("q3_k", "q5_k", "iq4_xs")] == ["Q3_K_M", "Q5_K_M", "IQ4_XS"]


def test_file_types_are_llama_cpps() -> None:
    import gguf

    known = {t.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(t) for t in gguf.LlamaFileType}
    ours = {n: recipes.get(n).file_type for n in recipes.names()}
    assert {n: t for n, t in ours.items() if n in known} == {n: known[n] for n in ours if n in known}
    assert set(ours) - set(known) <= {"Q2_0"}
    assert len(set(ours.values())) == len(ours)
    assert recipes.get("F64").file_type == 1024


def test_says_what_lacks_importance() -> None:
    weights = dense()
    without = assign(recipes.get("IQ2_XS"), weights)
    assert {n for n, c in without.items() if c.lacks_importance} == {n for n, c in without.items() if c.codec.name == "IQ2_XS"}
    have = tuple(w.name for w in weights)
    assert not any(c.lacks_importance for c in assign(recipes.get("IQ2_XS"), weights, importance=have).values())
    part = assign(recipes.get("IQ2_XS"), weights, importance=have[:-8])
    assert any(c.lacks_importance for c in part.values())
    assert any(c.lacks_importance for c in assign(recipes.get("Q2_K_S"), weights).values())
    assert not any(c.lacks_importance for c in assign(recipes.get("Q2_K"), weights).values())


def test_layer_counts_per_layer_and_missing_metadata() -> None:
    weights, metadata, stored = measured_model("llama, 32 layers, 4 query heads per kv head")
    expected = recipes.get("Q2_K").assign(weights, metadata, stored)
    lists = metadata | {"llama.attention.head_count": [32] * 32, "llama.attention.head_count_kv": [8] * 32}
    assert recipes.get("Q2_K").assign(weights, lists, stored) == expected
    del metadata["llama.block_count"]
    assert recipes.get("Q2_K").assign(weights, metadata, stored) == expected


# --- errors ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Q4_K_N", r"unknown type or recipe Q4_K_N \(did you mean .*Q4_K_M"),
        ("", "unknown type or recipe"),
        ("missing.toml", "missing.toml: cannot read the recipe: No such file"),
        (".", "unknown type or recipe"),
        ("i8", "I8 holds integers, not weights"),
    ],
)
def test_unknown_recipes(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.get(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_types": ["ffn_dwn=Q6_K"]},
            r"--tensor-type ffn_dwn=Q6_K matches no tensor \(did you mean blk\.0\.ffn_down\.weight",
        ),
        (
            {"tensor_types": ["model.layers.0.mlp=Q6_K"]},
            r"matches no tensor; names are like token_embd\.weight, output\.weight, blk",
        ),
        ({"tensor_types": ["attn_norm=Q6_K"]}, "matches only tensors that are never quantized, like blk.0.attn_norm.weight"),
        ({"tensor_types": ["ffn_down=Q6_J"]}, r"--tensor-type ffn_down=Q6_J: unknown type Q6_J \(did you mean Q6_K"),
        ({"tensor_types": ["ffn_(down=Q6_K"]}, "bad regular expression"),
        ({"tensor_types": ["ffn_down"]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["=Q6_K"]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["ffn_down="]}, "expected REGEX=TYPE"),
        ({"tensor_types": ["ffn_down=I32"]}, "I32 holds integers, not weights"),
        ({"output_tensor_type": "Q4_K_M"}, r"--output-tensor-type: unknown type Q4_K_M \(did you mean Q4_K"),
        ({"token_embedding_type": "Q9"}, "--token-embedding-type: unknown type Q9"),
        ({"output_tensor_type": "Q8_0", "keep_output": True}, "contradict"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as e:
        assign(recipes.get("Q4_K_M").with_rules(**options), dense())
    assert "\n" not in str(e.value)


def test_options_for_tensors_that_the_model_lacks() -> None:
    headless = [w for w in dense() if w.name.startswith("blk.")]
    with pytest.raises(RecipeError, match="--token-embedding-type: the model has no token_embd"):
        assign(recipes.get("Q4_K_M").with_rules(token_embedding_type="Q8_0"), headless)
    with pytest.raises(RecipeError, match="--keep-output: the model has neither"):
        assign(recipes.get("Q4_K_M").with_rules(keep_output=True), headless)


# --- rows that do not fit ---


@pytest.mark.parametrize("rows", [2880, 96, 100, 1856])
def test_the_nearest_type_in_size_takes_rows_that_do_not_fit(rows: int) -> None:
    """gpt-oss has rows of 2880, Nemotron-H of 1856."""
    general = [c for c in map(codecs.get, ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0", "F16")) if rows % c.block_size == 0]
    for wanted in (c for c in map(codecs.get, codecs.names()) if isinstance(c, GgmlCodec) and rows % c.block_size):
        choice = assign(recipes.Recipe(wanted.name, wanted, pure=True, fallback="nearest"), dense(rows))["blk.0.attn_q.weight"]

        def distance(c: Codec, wanted: Codec = wanted) -> float:
            return abs(
                8 * c.nbytes((1, c.block_size)) / c.block_size - 8 * wanted.nbytes((1, wanted.block_size)) / wanted.block_size
            )

        assert distance(choice.codec) == min(map(distance, general)), wanted
        assert (
            choice.note == f"{rows} columns are no multiple of {wanted.block_size}: {choice.codec.name} instead of {wanted.name}"
        )


def test_nearest_keeps_the_size_of_a_preset() -> None:
    def bits(fallback: str | None) -> float:
        weights = dense(2880)
        choices = assign(recipes.get("Q4_K_S").with_rules(fallback=fallback), weights)
        weights = [w for w in weights if "ffn_up" in w.name]
        return 8 * sum(choices[w.name].codec.nbytes(w.shape) for w in weights) / sum(math.prod(w.shape) for w in weights)

    assert bits("nearest") < 5 < bits(None) == bits("llama-quantize")


def test_fallbacks_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "Q4_K_M"\nfallback = "nearest"')
    assert recipes.get(path).fallback == "nearest"
    path.write_text('base = "Q4_K_M"\nfallback = "neares"')
    with pytest.raises(RecipeError, match=r"mine.toml: fallback: unknown fallback neares \(did you mean nearest\?\)"):
        recipes.get(path)
    with pytest.raises(RecipeError, match="there are llama-quantize and nearest"):
        recipes.get("Q4_0").with_rules(fallback="x")


# --- recipe files ---


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        base = "Q4_K_M"
        output_tensor_type = "Q8_0"
        token_embedding_type = "Q5_K"

        [[rules]]
        tensors = "attn_(k|v)"
        type = "Q8_0"

        [[rules]]
        tensors = "ffn_down"
        layers = [":2", -1, 3]
        type = "Q6_K"

        [[rules]]
        layers = "2:5:2"
        type = "Q3_K"
        """
    )
    recipe = recipes.get(path)
    assert recipe.file_type == recipes.get("Q4_K_M").file_type
    got = types(assign(recipe, dense(layers=8)))
    assert (got["output.weight"], got["token_embd.weight"], got["blk.4.attn_k.weight"]) == ("Q8_0", "Q5_K", "Q8_0")
    assert {i for i in range(8) if got[f"blk.{i}.ffn_down.weight"] == "Q6_K"} >= {0, 1, 3, 7}
    assert {i for i in range(8) if got[f"blk.{i}.ffn_up.weight"] == "Q3_K"} == {2, 4}
    over = types(assign(recipes.get(str(path)).with_rules(["attn_k=F16"], keep_output=True), dense(layers=8)))
    assert (over["output.weight"], over["blk.4.attn_k.weight"], over["blk.4.attn_v.weight"]) == ("BF16", "F16", "Q8_0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pure = true\nbase = 4_K", "not TOML: .*line 2"),
        ("\xff", "not TOML"),
        ("", "key base is missing"),
        ('base = "Q4_K_X"', "base: unknown type or recipe Q4_K_X"),
        ('base = "other.toml"', "base must be a preset"),
        ("base = 4", "base must be a string, not 4"),
        ('base = "Q4_0"\noutput = "Q8_0"', r"unknown key output \(did you mean .*output_tensor_type"),
        ('base = "Q4_0"\npure = "yes"', "pure must be true or false"),
        ('base = "Q4_0"\nkeep_output = true\noutput_tensor_type = "Q8_0"', "contradict"),
        ('base = "Q4_0"\noutput_tensor_type = "Q8_1K"', "output_tensor_type: unknown type"),
        ('base = "Q4_0"\nrules = "ffn"', "rules must be an array of tables"),
        ('base = "Q4_0"\nrules = [1]', r"rules\[0\] must be a table"),
        ('base = "Q4_0"\n[[rules]]\ntensors = "ffn"', r"rules\[0\]: a rule needs type"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"', r"rules\[0\]: a rule needs type, and tensors or layers"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\ntensor = "ffn"', r"rules\[0\]: unknown key tensor \(did you mean tensors"),
        ('base = "Q4_0"\n[[rules]]\ntype = 8\ntensors = "ffn"', r"rules\[0\].type must be a string"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\ntensors = "ffn["', "bad regular expression"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\nlayers = "0-3"', r"rules\[0\].layers: '0-3' is no layer number"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\nlayers = "::0"', "is no layer number"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\nlayers = true', "True is no layer number"),
        ('base = "Q4_0"\n[[rules]]\ntype = "Q8_0"\nlayers = []', r"rules\[0\].layers: no layers"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=message) as e:
        recipes.get(path)
    assert str(e.value).startswith(str(path)) and "\n" not in str(e.value)


def test_recipe_file_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text('base = "Q8_0"')
    assert recipes.get(str(path)).name == "Q8_0"


def test_rule_of_a_file_that_matches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('base = "Q4_0"\n[[rules]]\ntensors = "attn_q"\nlayers = "30:"\ntype = "Q8_0"')
    with pytest.raises(
        RecipeError, match=r"r.toml: rules\[0\]: attn_q=Q8_0 matches no tensor in those layers; the model has layers 0 to 3"
    ):
        assign(recipes.get(path), dense())


# --- docs/recipes.md ---

DOCS = HERE.parent / "docs" / "recipes.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)


def llama_3_8b() -> list[Weight]:
    shapes = {
        "attn_q": (4096, 4096),
        "attn_k": (1024, 4096),
        "attn_v": (1024, 4096),
        "attn_output": (4096, 4096),
        "ffn_gate": (14336, 4096),
        "ffn_up": (14336, 4096),
        "ffn_down": (4096, 14336),
        "attn_norm": (4096,),
        "ffn_norm": (4096,),
    }
    outside = {"token_embd": (128256, 4096), "output": (128256, 4096), "output_norm": (4096,)}
    found = [Weight(f"{role}.weight", shape, ()) for role, shape in outside.items()]
    return found + [Weight(f"blk.{i}.{role}.weight", shape, ()) for i in range(32) for role, shape in shapes.items()]


def row(preset: str) -> str:
    """The preset's row of the table in docs/recipes.md."""
    weights = llama_3_8b()
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
    }
    n = sum(math.prod(w.shape) for w in weights)
    recipe = recipes.get(preset)
    without, choices = (recipe.assign(weights, metadata, all_in(weights), i) for i in ([], [w.name for w in weights]))
    sizes = [f"{8 * sum(c[w.name].codec.nbytes(w.shape) for w in weights) / n:.2f}" for c in (choices, without)]
    matrices = [w for w in weights if w.layer is not None and len(w.shape) > 1]
    others = Counter((w.role, t) for w in matrices if (t := choices[w.name].codec.name) != recipe.base.name)
    shown = [f"{role} {t}" + (f" ×{k}" if k < 32 else "") for (role, t), k in others.items()]
    if len(shown) == 7:
        shown = [f"all {next(iter(others))[1]}"]
    blind = "yes" if any(c.lacks_importance for c in without.values()) else ""
    cells = (
        preset,
        recipe.base.name,
        sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]} ({sizes[1]} without)",
        choices["output.weight"].codec.name,
        choices["token_embd.weight"].codec.name,
        ", ".join(shown),
        blind,
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


@pytest.mark.parametrize("preset", recipes.names())
def test_documented_presets(preset: str) -> None:
    assert row(preset) in DOCS.read_text().splitlines()


def test_documented_recipe_file(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "mine.toml"
    path.write_text(text)
    got = types(assign(recipes.get(path), dense(layers=32)))
    assert [i for i in range(32) if got[f"blk.{i}.ffn_up.weight"] == "Q3_K"] == list(range(8, 24, 2))
    assert {got[f"blk.{i}.ffn_down.weight"] for i in (0, 1, 30, 31)} == {"Q6_K"}
    assert (got["output.weight"], got["token_embd.weight"], got["blk.8.attn_k.weight"]) == ("Q8_0", "Q6_K", "Q8_0")


@pytest.mark.parametrize("code", blocks("python"))
def test_documented_code(code: str) -> None:
    exec(compile(code, str(DOCS), "exec"), {})


def test_documented_fallbacks() -> None:
    table = DOCS.read_text().split("### Rows that do not fit")[1].split("## Rules on top")[0]
    for left, right in re.findall(r"^\| ([A-Z0-9_, ]+) \| (\w+) \|$", table, re.MULTILINE):
        for type in left.split(", "):
            choice = assign(recipes.get(type).with_rules(pure=True), dense(96 if type != "Q1_0" else 192))["blk.0.attn_q.weight"]
            assert choice.codec.name == right, type
    message = re.search(r"^--tensor-type ffn_dwn.*$", DOCS.read_text(), re.MULTILINE)
    assert message
    with pytest.raises(RecipeError) as e:
        assign(recipes.get("Q4_K_M").with_rules(["ffn_dwn=Q6_K"]), dense(layers=1))
    assert str(e.value) == message[0]
