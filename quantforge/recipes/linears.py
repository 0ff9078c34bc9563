"""One scheme for the linear layers of a model's blocks, as --bits and the layouts of other libraries have it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import codecs, layouts
from ..archs.weight import Weight
from ..codecs import Codec
from ..codecs.plain import PlainCodec, as_floats
from ..errors import RecipeError, UnsupportedError
from ..layouts import Layout
from . import recipe as recipes
from .presets import kept


@dataclass(frozen=True, slots=True)
class Scheme:
    """Integers on even steps for the linear layers of a model's blocks. What is None is as the format usually has it."""

    bits: int | None = None
    """Of each weight."""
    group_size: int | None = None
    """Columns that share a scale; -1: a scale per row."""
    symmetric: bool | None = None
    """Without a zero point."""


def choose_scheme(
    layout: Layout | None,
    recipe: str | Path | recipes.Recipe | None,
    scheme: Scheme,
    tensor_types: Sequence[str | tuple[str, str]],
    dtype: str,
    settings: Mapping[str, Any] | None,
) -> tuple[Layout | None, Codec, list[recipes.Rule]]:
    """What --type and a scheme mean in a layout: the layout with its choices, the linear layers' codec, rules.

    layout: None where a ggml type will take the integers over. dtype: the model's, "bf16"; settings: `Method.settings`, if
    a method chooses the codes. Raises RecipeError, UnsupportedError.
    """
    if recipe is not None and scheme.bits is not None:
        raise RecipeError("--type and --bits exclude each other: give one of them")
    given: Sequence[recipes.Rule] = ()
    if isinstance(recipe, recipes.Recipe):
        given, recipe = recipe.rules, recipe.base.name
    chosen = layout or layouts.get("compressed-tensors")
    unordered = settings is not None and bool(settings.get("desc_act")) and not settings.get("static_groups")

    def choose(kind: str | None, scheme: Scheme = Scheme()) -> Codec:
        nonlocal chosen
        scale = dtype if layout else "f16"
        chosen, codec = chosen.choose(kind, scheme.bits, scheme.group_size, scheme.symmetric, scale)
        return chosen.ordered(codec) if layout and unordered else codec

    def find(kind: str | Codec, where: str) -> Codec:
        with suppress(UnsupportedError):
            if isinstance(known := codecs.get(kind), PlainCodec):
                return known
        return choose(str(kind) if isinstance(kind, str) else kind.name)

    codec = choose(None if recipe is None else str(recipe), scheme)
    rules = [recipes.rule(t, find) for t in tensor_types]
    rules += [replace(r, codec=find(r.codec, r.origin)) for r in given]
    if layout is None:
        return None, codec, rules
    return chosen if settings is None else chosen.calibrated(settings), codec, rules


def assign(
    weights: Sequence[Weight],
    outputs: Mapping[str, Sequence[tuple[str, Weight]]],
    stored: Mapping[str, Codec],
    codec: Codec,
    rules: Sequence[recipes.Rule],
    gguf_names: bool,
    layout: Layout | None = None,
) -> dict[str, recipes.Choice]:
    """`codec`, or what a rule says, for the linear layers of the blocks; everything else stays, in floats, as do those that
    no rule names and `layout` cannot hold, with a note.

    outputs: as in `Contents`; stored: what each weight is in the source; gguf_names: of the output's format.
    Raises RecipeError, UnsupportedError.
    """
    choices = {}
    used: set[int] = set()
    layers = 1 + max((int(n) for w in weights for n in re.findall(r"\.(\d+)\.", w.name)[:1]), default=0)
    for w in weights:
        names = [(s, w.shape[-2:]) for s in w.sources] if gguf_names else [(n, made.shape) for n, made in outputs[w.name]]
        linear = bool(names) and all(_is_linear(*named) for named in names)
        as_is = kept(w, stored[w.name], codec.name) if gguf_names else as_floats(stored[w.name])
        if not linear:
            choices[w.name] = recipes.Choice(as_is)
            continue
        spelled = (w.name, *(n for n, _ in names))
        layer = int(re.findall(r"\.(\d+)\.", w.name)[0])
        fits = (i for i, r in enumerate(rules) if any(r.matches(n, layer, layers) for n in spelled))
        if (first := next(fits, None)) is not None:
            used.add(first)
        high, wide = (1, 1) if layout is None else layout.sides(codec)
        if layout is not None and first is None and any(shape[-2] % high or shape[-1] % wide for _, shape in names):
            note = f"{layout.name} holds multiples of {high} rows and of {wide} columns, not {list(names[0][1])}: {as_is.name}"
            choices[w.name] = recipes.Choice(as_is, note)
            continue
        choices[w.name] = recipes.Choice(codec if first is None else rules[first].codec)
    if unused := [r.origin for i, r in enumerate(rules) if i not in used]:
        raise RecipeError(f"{unused[0]} matches no linear layer of the blocks, or none that an earlier rule leaves")
    if all(isinstance(c.codec, PlainCodec) for c in choices.values()):
        if reason := next((c.note for c in choices.values() if c.note), None):
            raise UnsupportedError(f"no linear layer of the blocks can be quantized: {reason}")
        raise UnsupportedError("the model has no linear layers in numbered blocks, which are what --bits and --format quantize")
    return choices


_NO_LINEAR = re.compile(r"norm|embed|router|gate_inp|(^|[._])(gate|conv1d|wte|wpe)$|\bln_")


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    """True for the weight of a linear layer inside of a numbered block, going by a checkpoint's names."""
    stem = name.removesuffix(".weight")
    return len(shape) == 2 and stem != name and re.search(r"\.\d+\.", name) is not None and not _NO_LINEAR.search(stem)
