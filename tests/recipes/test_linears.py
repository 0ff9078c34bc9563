"""One scheme for the linear layers of the blocks: which tensors these are, and what rules change."""

from __future__ import annotations

import pytest

from quantforge import codecs, layouts
from quantforge.archs.weight import Weight
from quantforge.errors import RecipeError, UnsupportedError
from quantforge.recipes import Recipe
from quantforge.recipes import get as recipe
from quantforge.recipes.linears import Scheme, assign, choose_scheme

NAMES = {
    "model.embed_tokens.weight": ("token_embd.weight", (100, 64)),
    "model.layers.0.self_attn.q_proj.weight": ("blk.0.attn_q.weight", (64, 64)),
    "model.layers.0.input_layernorm.weight": ("blk.0.attn_norm.weight", (64,)),
    "model.layers.0.mlp.gate.weight": ("blk.0.ffn_gate_inp.weight", (4, 64)),
    "model.layers.0.mlp.gate_proj.weight": ("blk.0.ffn_gate.weight", (96, 64)),
    "model.layers.1.mlp.gate_proj.weight": ("blk.1.ffn_gate.weight", (96, 64)),
    "lm_head.weight": ("output.weight", (100, 64)),
}
WEIGHTS = [Weight.of(ours, shape, theirs) for theirs, (ours, shape) in NAMES.items()]
OUTPUTS = {w.name: [(w.sources[0], w)] for w in WEIGHTS}
STORED = {w.name: codecs.get("BF16") for w in WEIGHTS}


def chosen(gguf_names: bool = False, tensor_types: tuple[str, ...] = (), base: Recipe | None = None) -> dict[str, str]:
    _, codec, rules = choose_scheme(layouts.get("gptq"), base, Scheme(None if base else 4, 32), tensor_types, "bf16", None)
    choices = assign(WEIGHTS, OUTPUTS, STORED, codec, rules, gguf_names)
    return {name: choice.codec.name for name, choice in choices.items()}


@pytest.mark.parametrize("gguf_names", [False, True])
def test_only_linear_layers_of_blocks(gguf_names: bool) -> None:
    quantized = {n for n, codec in chosen(gguf_names).items() if codec.startswith("int4")}
    assert quantized == {"blk.0.attn_q.weight", "blk.0.ffn_gate.weight", "blk.1.ffn_gate.weight"}


def test_rules_go_by_either_name_and_the_first_wins() -> None:
    found = chosen(tensor_types=(r"layers\.1\.mlp=BF16", "ffn_gate=F16"))
    assert (found["blk.1.ffn_gate.weight"], found["blk.0.ffn_gate.weight"]) == ("BF16", "F16")
    assert found["blk.0.attn_q.weight"].startswith("int4-g32")


def test_a_rule_that_says_nothing() -> None:
    with pytest.raises(RecipeError, match="norm=F16 matches no linear layer"):
        chosen(tensor_types=("norm=F16",))


def test_what_is_none_is_the_layouts_own() -> None:
    layout, codec, _ = choose_scheme(layouts.get("awq"), None, Scheme(), (), "f16", None)
    assert layout is not None and codec == layouts.get("awq").choose(None, None, None, None, "f16")[1]


def test_a_type_and_bits_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        choose_scheme(layouts.get("gptq"), recipe("Q4_0"), Scheme(4), (), "bf16", None)


def test_without_blocks_there_is_nothing_to_quantize() -> None:
    with pytest.raises(UnsupportedError, match="no linear layers in numbered blocks"):
        assign(WEIGHTS[:1], OUTPUTS, STORED, codecs.get("int4-g32-sym"), [], False)


def test_what_a_layout_cannot_hold_stays_in_floats() -> None:
    """But not where a rule asks for it, and not all of it."""
    odd = Weight.of("blk.0.ssm_dt.weight", (64, 7), "model.layers.0.mixer.dt_proj.weight")
    weights, outputs = [*WEIGHTS, odd], OUTPUTS | {odd.name: [(odd.sources[0], odd)]}
    stored = STORED | {odd.name: codecs.get("BF16")}
    for name, held in {"gptq": "32 rows and of 32", "awq": "8 rows and of 8", "compressed-tensors": "1 rows and of 8"}.items():
        layout, codec, rules = choose_scheme(layouts.get(name), None, Scheme(4, 32, name != "awq"), (), "bf16", None)
        choices = assign(weights, outputs, stored, codec, rules, False, layout)
        assert choices[odd.name].codec.name == "BF16" and f"multiples of {held} columns" in str(choices[odd.name].note)
        assert choices["blk.0.attn_q.weight"].codec.name.startswith("int4-g32")
        layout, codec, rules = choose_scheme(layouts.get(name), None, Scheme(4, 32), ("dt_proj=int4-g32-sym",), "bf16", None)
        assert assign(weights, outputs, stored, codec, rules, False, layout)[odd.name].codec is rules[0].codec
        with pytest.raises(UnsupportedError, match=f"no linear layer of the blocks can be quantized: {name} holds multiples of"):
            assign([odd], outputs, stored, codec, [], False, layout)
