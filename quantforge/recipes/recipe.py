"""Recipes: which tensor gets which codec.

A recipe is one of llama.cpp's presets, or one codec for everything, with the user's rules on
top. It knows names, shapes and metadata; it never sees a model file or a weight.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf

from .. import codecs
from ..archs.weight import Weight
from ..codecs.base import Codec
from ..codecs.spoken import meant
from ..errors import RecipeError, UnsupportedError, nearest
from .presets import (
    ALIASES,
    BLIND,
    EMBEDDING,
    FALLBACKS,
    FLOATS,
    OUTPUT,
    PRESETS,
    Model,
    Preset,
    category_of,
    fit,
    kept,
    mixture,
    quantizable,
)

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under its old name
    import tomli as tomllib

# --- recipes ------------------------------------------------------------------------------------


_INTEGERS = ("I8", "I16", "I32", "I64")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a recipe decided for a tensor."""

    codec: Codec
    note: str | None = None
    """Why it is not what the rules say: "384 columns are no multiple of 256: Q4_0 instead of Q3_K"."""
    lacks_importance: bool = False
    """True where quality suffers for want of importance: llama-quantize refuses such a tensor."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors whose GGUF name contains a match of `pattern` (any case), in `layers`, get `codec`."""

    pattern: str
    codec: Codec
    layers: tuple[slice, ...] | None = None
    """Layer numbers as slices of range(block_count); None: everywhere."""
    origin: str = ""
    """How messages name this rule."""

    def matches(self, name: str, layer: int | None, n_layers: int) -> bool:
        """True if this rule speaks about the tensor."""
        if self.layers is not None and (layer is None or not any(layer in range(n_layers)[s] for s in self.layers)):
            return False
        return re.search(self.pattern, name, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Recipe:
    """A preset, or one codec for every matrix, with the user's rules on top.

    Precedence: `token_embedding_type` and `output_tensor_type`, `keep_output`, `rules` (first
    match wins), the preset. In a model with tied embeddings the output matrix is `token_embd.weight`.
    """

    name: str
    base: Codec
    """The preset's main type; with `pure`, the type of every matrix."""
    rules: tuple[Rule, ...] = ()
    output_tensor_type: Codec | None = None
    token_embedding_type: Codec | None = None
    pure: bool = False
    keep_output: bool = False
    fallback: str = FALLBACKS[0]
    """What replaces a type whose blocks do not divide a tensor's rows, of `presets.FALLBACKS`."""
    _preset: Preset | None = field(default=None, repr=False)

    @property
    def file_type(self) -> int:
        """`general.file_type` of the GGUF file: the preset's, or 1024 ("guessed") for a lone codec."""
        if self._preset is not None:
            return self._preset.file_type
        return PRESETS["MXFP4_MOE"].file_type if self.base.name == "MXFP4" else int(gguf.LlamaFileType.GUESSED)

    def with_rules(
        self,
        tensor_types: Iterable[str | tuple[str, str | Codec]] = (),
        output_tensor_type: str | Codec | None = None,
        token_embedding_type: str | Codec | None = None,
        pure: bool = False,
        keep_output: bool = False,
        fallback: str | None = None,
    ) -> Recipe:
        """This recipe with more rules before its own.

        tensor_types: "REGEX=TYPE" or (regex, type); fallback: of `presets.FALLBACKS`. Raises RecipeError: unknown type or
        fallback, bad regex, contradiction.
        """
        rules = tuple(map(rule, tensor_types))
        if keep_output and output_tensor_type is not None:
            raise RecipeError("--keep-output and --output-tensor-type contradict each other: give one of them")
        output = None if keep_output else self.output_tensor_type
        if output_tensor_type is not None:
            output = _codec(output_tensor_type, "--output-tensor-type")
        embedding = self.token_embedding_type
        if token_embedding_type is not None:
            embedding = _codec(token_embedding_type, "--token-embedding-type")
        return replace(
            self,
            rules=rules + self.rules,
            output_tensor_type=output,
            token_embedding_type=embedding,
            pure=self.pure or pure,
            keep_output=keep_output or (self.keep_output and output_tensor_type is None),
            fallback=self.fallback if fallback is None else _fallback(fallback, "--fallback"),
        )

    def assign(
        self,
        weights: Sequence[Weight],
        metadata: Mapping[str, Any],
        stored: Mapping[str, Codec],
        importance: Collection[str] = (),
    ) -> dict[str, Choice]:
        """The codec of every tensor, in the order of `weights`.

        metadata: the model's GGUF key-values; stored: the codec each tensor has now, by GGUF name;
        importance: names of the tensors that have importance (none: as llama-quantize without --imatrix).
        Raises RecipeError for a rule that matches no tensor that is quantized.
        """
        names = [w.name for w in weights]
        model = Model.of(metadata, set(names), bool(importance))
        self._check_rules(weights, model)
        wanted = self._wanted(weights, model)
        choices = {}
        for w in weights:
            as_is = kept(w, stored.get(w.name), self.base.name)
            codec, note = fit(wanted[w.name], w, as_is, self.fallback) if w.name in wanted else (as_is, None)
            choices[w.name] = Choice(codec, note, self._lacks_importance(w.name, codec, importance))
        return choices

    def _wanted(self, weights: Sequence[Weight], model: Model) -> dict[str, Codec]:
        """The codec of each tensor to be quantized, whether or not its shape fits.

        llama-quantize walks the tensors in the order of `_place` and numbers those of a category
        that the preset itself decides; so rules of the user shift what the preset's count sees.
        """
        n_attn_v = sum(category_of(w.name) == "attn_v" for w in weights)
        seen: dict[str, int] = {}
        wanted: dict[str, Codec] = {}
        for w in sorted(weights, key=_place):
            if not quantizable(w):
                continue
            category = category_of(w.name)
            is_output = w.name == (EMBEDDING if model.tied else OUTPUT)
            rule = next((r for r in self.rules if r.matches(w.name, w.layer, model.layers)), None)
            if category == "token_embd" and self.token_embedding_type is not None:
                wanted[w.name] = self.token_embedding_type
            elif is_output and self.output_tensor_type is not None:
                wanted[w.name] = self.output_tensor_type
            elif is_output and self.keep_output:
                continue
            elif rule is not None:
                wanted[w.name] = rule.codec
            elif self.pure or self._preset is None or self.base.name in FLOATS:
                wanted[w.name] = self.base
            else:
                i = seen[category] = seen.get(category, -1) + 1
                if category.startswith("ffn_") and model.experts > 1 and w.layer is not None and not self._preset.low_bit:
                    i = w.layer  # a layer of experts may hold several tensors of a category
                n = n_attn_v if category == "attn_v" else model.layers
                wanted[w.name] = codecs.get(mixture(self._preset, model, w, category, i, n))
        return wanted

    def _lacks_importance(self, name: str, codec: Codec, importance: Collection[str]) -> bool:
        blind = codec.name in BLIND or (codec.name == "Q2_K" and self.name == "Q2_K_S")
        return blind and name not in importance and category_of(name) not in ("output", "token_embd")

    def _check_rules(self, weights: Sequence[Weight], model: Model) -> None:
        """Raise RecipeError for a rule that would have no effect."""
        matrices = [w for w in weights if quantizable(w)]
        for rule in self.rules:
            if any(rule.matches(w.name, w.layer, model.layers) for w in matrices):
                continue
            for w in weights:
                if rule.matches(w.name, w.layer, model.layers):
                    raise RecipeError(f"{rule.origin} matches only tensors that are never quantized, like {w.name}; leave it out")
            raise RecipeError(f"{rule.origin} matches no tensor{_nearest_tensors(rule, matrices, model)}")
        present = {w.name for w in matrices}
        if self.token_embedding_type is not None and EMBEDDING not in present:
            raise RecipeError(f"--token-embedding-type: the model has no {EMBEDDING}; leave it out")
        if (self.output_tensor_type is not None or self.keep_output) and not {OUTPUT, EMBEDDING} & present:
            option = "--keep-output" if self.keep_output else "--output-tensor-type"
            raise RecipeError(f"{option}: the model has neither {OUTPUT} nor {EMBEDDING}; leave it out")


def _place(w: Weight) -> tuple[int, str]:
    """By layer, then name; to llama-quantize, the blocks of an encoder and a decoder (enc.blk.0) are no layers."""
    return (-1 if w.layer is None or not w.name.startswith("blk.") else w.layer, w.name)


@dataclass(frozen=True)
class AsStored(Recipe):
    """What is quantized stays as it is; GGUF takes its integers over. The rest is kept in floats."""

    def assign(
        self,
        weights: Sequence[Weight],
        metadata: Mapping[str, Any],
        stored: Mapping[str, Codec],
        importance: Collection[str] = (),
    ) -> dict[str, Choice]:
        """See `Recipe.assign`."""
        floats = (*FLOATS, "F64")
        return {w.name: Choice(kept(w, have, self.name) if (have := stored[w.name]).name in floats else have) for w in weights}


AS_STORED = AsStored("as stored", codecs.get("F32"))


def _codec(name: str | Codec, where: str) -> Codec:
    try:
        codec = codecs.get(name)
    except UnsupportedError as e:
        raise RecipeError(f"{where}: {e}") from None
    if codec.name in _INTEGERS:
        raise RecipeError(f"{where}: {codec.name} holds integers, not weights; the type of 8 bits for weights is Q8_0")
    return codec


def _fallback(name: str, where: str) -> str:
    if name not in FALLBACKS:
        raise RecipeError(f"{where}: unknown fallback {name}{nearest(name, FALLBACKS)}; there are {' and '.join(FALLBACKS)}")
    return name


def rule(text: str | tuple[str, str | Codec], find: Callable[[str | Codec, str], Codec] = _codec) -> Rule:
    """The rule that "REGEX=TYPE" or (regex, type) says; find: (type, how messages name it) -> codec. Raises RecipeError."""
    return _rule(*_split(text), option="--tensor-type", find=find)


def _split(text: str | tuple[str, str | Codec]) -> tuple[str, str | Codec]:
    if not isinstance(text, str):
        return text
    pattern, equals, type = text.rpartition("=")
    if not (pattern and equals and type):
        raise RecipeError(f"--tensor-type {text}: expected REGEX=TYPE, like ffn_down=Q6_K")
    return pattern, type


def _rule(
    pattern: str,
    type: str | Codec,
    layers: tuple[slice, ...] | None = None,
    option: str = "rule",
    find: Callable[[str | Codec, str], Codec] = _codec,
) -> Rule:
    origin = f"{option} {pattern}={type.name if isinstance(type, Codec) else type}"
    try:
        re.compile(pattern)
    except re.error as e:
        raise RecipeError(f"{origin}: bad regular expression: {e}") from None
    return Rule(pattern, find(type, origin), layers, origin)


def _nearest_tensors(rule: Rule, weights: Sequence[Weight], model: Model) -> str:
    """A hint for a rule that matched nothing: its layers are wrong, or the names nearest to its pattern."""
    if rule.layers is not None and any(replace(rule, layers=None).matches(w.name, w.layer, model.layers) for w in weights):
        return f" in those layers; the model has layers 0 to {model.layers - 1}"
    plain = re.sub(r"\\[a-zA-Z]|[^a-z0-9_.]", "", rule.pattern.lower()).strip(".")
    examples: dict[str, str] = {}
    for w in weights:
        examples.setdefault(w.role, w.name)
        examples.setdefault(f"{w.role}.weight", w.name)
        examples.setdefault(w.name, w.name)
    hint = nearest(plain, examples)
    if not hint:
        return f"; names are like {', '.join(dict.fromkeys(list(examples.values())[:9]))}"
    near = hint.removeprefix(" (did you mean ").removesuffix("?)").split(", ")
    return f" (did you mean {', '.join(dict.fromkeys(examples[f] for f in near))}?)"


# --- by name or from a file ---------------------------------------------------------------------


def names() -> list[str]:
    """Names of all presets, from the largest type to the smallest."""
    return list(PRESETS)


def get(name: str | Path | Recipe) -> Recipe:
    """The recipe of that preset name (any case), codec name (that codec for every matrix) or a recipe file.

    Raises RecipeError naming the nearest names.
    """
    if isinstance(name, Recipe):
        return name
    text = str(name)
    if isinstance(name, Path) or text.lower().endswith(".toml"):
        return read(name)
    upper = text.upper()
    upper = ALIASES.get(upper, upper)
    if upper in PRESETS:
        preset = PRESETS[upper]
        return Recipe(upper, _codec(preset.base, upper), _preset=preset)
    with suppress(UnsupportedError):
        return Recipe(codecs.get(text).name, _codec(text, "type"), pure=True)
    if Path(os.path.expanduser(text)).is_file():
        return read(text)
    known = [*PRESETS, *ALIASES, *codecs.names()]
    raise RecipeError(f"unknown type or recipe {text}{meant(text) or nearest(text, known)}; `quantforge types` lists all")


_KEYS: dict[str, type] = {
    "base": str,
    "rules": list,
    "output_tensor_type": str,
    "token_embedding_type": str,
    "pure": bool,
    "keep_output": bool,
    "fallback": str,
}
_RULE_KEYS = ("tensors", "layers", "type")


def read(path: str | Path) -> Recipe:
    """A recipe file: TOML with the keys of docs/recipes.md.

    Raises RecipeError naming the line or key.
    """
    try:
        with open(os.path.expanduser(path), "rb") as f:
            table = tomllib.load(f)
    except OSError as e:
        raise RecipeError(f"{path}: cannot read the recipe: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path}: not TOML: {e}") from None
    for key, value in table.items():
        if key not in _KEYS:
            raise RecipeError(f"{path}: unknown key {key}{nearest(key, _KEYS)}; known: {', '.join(_KEYS)}")
        _expect(path, key, value, _KEYS[key])
    if "base" not in table:
        raise RecipeError(f'{path}: key base is missing; name the preset to start from, like base = "Q4_K_M"')
    if table["base"].lower().endswith(".toml"):
        raise RecipeError(f"{path}: base must be a preset or type, not another file")
    if table.get("keep_output") and "output_tensor_type" in table:
        raise RecipeError(f"{path}: keep_output and output_tensor_type contradict each other: give one of them")
    try:
        base = get(table["base"])
    except RecipeError as e:
        raise RecipeError(f"{path}: base: {e}") from None
    types = {k: _codec(table[k], f"{path}: {k}") for k in ("output_tensor_type", "token_embedding_type") if k in table}
    return replace(
        base,
        rules=tuple(_read_rule(path, f"rules[{i}]", r) for i, r in enumerate(table.get("rules", []))),
        pure=base.pure or table.get("pure", False),
        keep_output=table.get("keep_output", False),
        fallback=_fallback(table.get("fallback", base.fallback), f"{path}: fallback"),
        output_tensor_type=types.get("output_tensor_type"),
        token_embedding_type=types.get("token_embedding_type"),
    )


def _read_rule(path: str | Path, where: str, table: Any) -> Rule:
    _expect(path, where, table, dict)
    for key in table:
        if key not in _RULE_KEYS:
            raise RecipeError(f"{path}: {where}: unknown key {key}{nearest(key, _RULE_KEYS)}; known: {', '.join(_RULE_KEYS)}")
    if "type" not in table or not {"tensors", "layers"} & set(table):
        raise RecipeError(f"{path}: {where}: a rule needs type, and tensors or layers or both")
    pattern = table.get("tensors", "")
    for key in ("tensors", "type"):
        _expect(path, f"{where}.{key}", table.get(key, ""), str)
    layers = _layers(path, f"{where}.layers", table["layers"]) if "layers" in table else None
    return _rule(pattern, table["type"], layers, option=f"{path}: {where}:")


def _layers(path: str | Path, where: str, value: Any) -> tuple[slice, ...]:
    """Layers from a number, a Python slice like "-4:", or a list of those."""
    slices = []
    for item in value if isinstance(value, list) else [value]:
        match = re.fullmatch(r"(-?\d+)|(-?\d*):(-?\d*)(?::(\d*))?", str(item)) if type(item) in (int, str) else None
        if match is None or match[4] == "0":
            raise RecipeError(f'{path}: {where}: {item!r} is no layer number and no range like "0:4", "-4:" or "::2"')
        if match[1]:
            at = int(match[1])
            slices.append(slice(at, at + 1 or None))
        else:
            slices.append(slice(*(int(g) if g else None for g in match.group(2, 3, 4))))
    if not slices:
        raise RecipeError(f"{path}: {where}: no layers; leave the key out for all layers")
    return tuple(slices)


def _expect(path: str | Path, key: str, value: Any, kind: type) -> None:
    words = {str: "a string", list: "an array of tables", bool: "true or false", dict: "a table"}
    if not isinstance(value, kind):
        raise RecipeError(f"{path}: {key} must be {words[kind]}, not {value!r}")
