"""Plan a conversion from headers alone: which tensor gets which codec, the metadata, the exact size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .. import codecs, layouts, methods, recipes
from ..archs.weight import Weight
from ..arrays import F32, Parts
from ..calibration.importance import Importance, floored
from ..codecs import Codec, Encoded, repack, repacks
from ..codecs.base import GgmlCodec
from ..codecs.fp4 import NVFP4
from ..codecs.plain import PlainCodec, as_floats, prevailing
from ..codecs.spoken import meant
from ..errors import CalibrationError, RecipeError, ShapeError, UnsupportedError
from ..formats import Format, Header, Source, Stored
from ..formats.rows import codec_of
from ..layouts import Layout
from ..methods import Method
from ..recipes import linears
from ..recipes.linears import Scheme, choose_scheme
from . import lattices
from .contents import Contents, contents, origin, provenance, quantization_metadata, stated_dtype, without_history
from .options import Calibration, Options


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output: where it comes from and how it will be stored."""

    name: str
    weight: Weight
    codec: Codec
    source_codec: Codec
    note: str | None = None
    via: Codec | None = None
    """The codec that is quantized to, where `codec` then takes over its integers."""
    mates: tuple[str, ...] = ()
    """Tensors, this one among them, that share one scale."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., out, in]."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.codec.nbytes(self.shape)

    @property
    def target(self) -> Codec:
        """The codec that its numbers are rounded to: `via`, or `codec`."""
        return self.via or self.codec

    def sharing(self, largest: Callable[[str], float]) -> Codec:
        """`target` with the scale that it shares with its `mates`. largest: magnitude in a tensor of the output, by its name."""
        if not isinstance(self.target, NVFP4) or not self.mates:
            return self.target
        return self.target.sharing(max(map(largest, self.mates)))

    def stored(self, rounded: Encoded) -> Parts:
        """Parts of `codec` from rows of `target`."""
        return rounded.parts if self.via is None else repack(rounded, self.codec).parts

    def falling_back(self, codec: Codec, reason: str) -> PlannedTensor:
        """This tensor in another type, and why. Raises ShapeError where it does not fit either."""
        codec.layout(self.shape)
        return replace(self, codec=codec, via=None, mates=(), note=f"{reason}: {codec.name} instead")

    def to_json(self) -> dict[str, Any]:
        """As in `convert --dry-run --json`."""
        row: dict[str, Any] = {"name": self.name, "type": self.codec.name, "shape": list(self.shape), "bytes": self.nbytes}
        row["source_type"] = self.source_codec.name
        if self.note:
            row["note"] = self.note
        return row


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A method for the blocks' matrices, and what it sees."""

    method: Method
    calibration: Calibration
    device: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a conversion that is known before a tensor is read."""

    source: Source
    format: Format
    header: Header
    tensors: Sequence[PlannedTensor]
    importance: Mapping[str, F32]
    """Tensor of the output -> mean x²: f32[in], or f32[experts, in] where they are stacked."""
    recipe: str
    warnings: Sequence[str] = ()
    calibrated: Calibrated | None = None
    device: str = "cpu"
    """Where tensors are encoded."""
    finish: Callable[[Path], Plan] | None = None
    """Where a library quantizes: the plan for the checkpoint that it left; this one is what that should come to."""
    adopt: bool = False
    """The library's checkpoint is the output as it is."""
    fallback: Codec | None = None
    """Instead of an error: the type of tensors whose values theirs cannot hold."""

    @property
    def total_bytes(self) -> int:
        """Exact size of the output."""
        return self.format.size(self.header)

    @property
    def bpw(self) -> float:
        """Stored bits per weight over all tensors."""
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, sum(prod(t.shape) for t in self.tensors))

    def falling_back(self, reasons: Mapping[str, str]) -> Plan:
        """This plan with `fallback` for some tensors; reasons: why, by name of the tensor."""
        assert self.fallback is not None
        tensors = [t.falling_back(self.fallback, reasons[t.name]) if t.name in reasons else t for t in self.tensors]
        stored = {t.name: Stored(t.codec, t.shape) for t in tensors}
        return replace(self, tensors=tensors, header=replace(self.header, tensors=stored))

    def to_json(self) -> dict[str, Any]:
        """{"metadata", "total_bytes", "tensors", ...}, ready for json.dumps."""
        return {
            "metadata": {k: plain(v) for k, v in self.header.metadata.items()},
            "total_bytes": self.total_bytes,
            "tensors": [t.to_json() for t in self.tensors],
            "warnings": list(self.warnings),
        }


def plain(value: Any) -> Any:
    """A metadata value as JSON types."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def decide(source: Source, options: Options) -> Plan:
    """Decide everything about a conversion from headers alone.

    Raises FormatError, UnsupportedError, RecipeError, ShapeError, CalibrationError.
    """
    target, layout = options.target()
    if options.vocab_only and not target.gguf_names:
        raise RecipeError(f"{options.out}: --vocab-only writes a GGUF file: give it a name that ends in .gguf")
    held = contents(source, target, options.pre_tokenizer, mtp=options.mtp, vocab_only=options.vocab_only)
    weights, outputs = held.weights, held.outputs
    stored = {w.name: codec_of(source, w) for w in weights}
    table = _check_importance(options.importance, weights)
    how = None if options.method is None else Calibrated(options.method, options.calibration, options.device)
    chosen = _choose(source, options, target, layout, held, stored, table)
    choices, layout, warnings = chosen.choices, chosen.layout, list(chosen.warnings)

    tensors: list[PlannedTensor] = []
    for w in weights:
        have = stored[w.name]
        if how and w.layer is not None and not isinstance(have, PlainCodec) and not options.allow_requantize:
            raise RecipeError(
                f"{w.name}: the source is already quantized ({have.name}); --method chooses codes for the original "
                "model's weights: use that, or --allow-requantize"
            )
        unchanged = all(made.by_row for _, made in outputs[w.name])
        codec, via, note = _written_as(w, choices[w.name], have, unchanged, target, options.allow_requantize)
        tensors += [PlannedTensor(n, made, codec, have, note, via) for n, made in outputs[w.name]]
    if layout is not None:
        modules = {t.name.removesuffix(".weight"): t.codec for t in tensors}
        mates = {f"{m}.weight": tuple(f"{n}.weight" for n in group) for group in layout.sharing(modules) for m in group}
        tensors = [replace(t, mates=mates.get(t.name, ())) for t in tensors]
    fallback = _fallback_type(options, target)
    for i, t in enumerate(tensors):
        try:
            t.codec.layout(t.shape)
            if layout is not None and not isinstance(t.codec, PlainCodec):
                layout.arrays(t.codec, t.shape)
        except ShapeError as e:
            if fallback is None:
                raise ShapeError(f"{t.name}: {e}") from None
            tensors[i] = t.falling_back(fallback, f"{t.codec.name} cannot hold shape {list(t.shape)}")
    tensors, lost = _on_lattices(source, tensors)
    warnings += lost

    blind = sorted({choices[w.name].codec.name for w in weights if choices[w.name].lacks_importance})
    if blind:
        warnings.append(
            f"{', '.join(blind)} without calibrated importance for every tensor: a data-free estimate stands in; "
            "an imatrix of the model (--imatrix) gives a clearly better file"
        )
    if how:
        inside = {choices[w.name].codec for w in weights if w.layer is not None}
        warnings += _check_method(how.method, {c for c in inside if not isinstance(c, PlainCodec)})
    metadata = without_history(held.metadata)
    if target.gguf_names:
        metadata |= quantization_metadata(chosen.file_type, options.importance)
    else:
        metadata |= stated_dtype(metadata, source, ((t.codec, t.shape) for t in tensors))
    seen_text = options.calibration.text if how and how.method.needs else None
    metadata |= provenance(source, options.importance, how.method.name if how else None, seen_text)
    if options.provenance and tensors:
        rounded_here = all(isinstance(t.source_codec, PlainCodec) or t.source_codec is t.codec for t in tensors)
        metadata |= origin(source, chosen.recipe, options.importance, rounded_here)
    stored_as = {t.name: Stored(t.codec, t.shape) for t in tensors}
    header = Header(metadata, stored_as, held.files, layout, options.max_shard_size)
    warnings += target.warnings(header)
    importance, unused = _as_encoded(_by_output(table, weights, outputs), tensors)
    told, name = [*warnings, *unused], chosen.recipe
    return Plan(source, target, header, tensors, importance, name, told, how, options.device, fallback=fallback)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What the recipe, or the scheme for the blocks' linear layers, comes to."""

    recipe: str
    choices: Mapping[str, recipes.Choice]
    file_type: int = int(gguf.LlamaFileType.GUESSED)
    layout: Layout | None = None
    warnings: Sequence[str] = ()


def _choose(
    source: Source,
    options: Options,
    target: Format,
    layout: Layout | None,
    held: Contents,
    stored: Mapping[str, Codec],
    table: Mapping[str, F32],
) -> _Chosen:
    """A codec for each weight. stored: what it is in the source; table: importance that there is."""
    recipe, scheme, method = options.recipe, options.scheme, options.method
    if layout is not None or scheme.bits is not None:
        if options.fallback is not None:
            raise RecipeError("--fallback is for presets and types of blocks; here --fallback-type takes what does not fit")
        dtype, settings = prevailing((s.codec, s.shape) for s in source.weights.values()), method.settings() if method else None
        layout, codec, rules = choose_scheme(layout, recipe, scheme, options.tensor_types, dtype, settings)
        choices = linears.assign(held.weights, held.outputs, stored, codec, rules, target.gguf_names, layout)
        warnings: list[str] = []
        if layout is not None:
            named = {n.removesuffix(".weight"): choices[w.name].codec for w in held.weights for n, _ in held.outputs[w.name]}
            warnings += layout.warnings({n: c for n, c in named.items() if not isinstance(c, PlainCodec)})
            left = [(n, choices[w.name].note) for w in held.weights for n, _ in held.outputs[w.name] if choices[w.name].note]
            warnings += [f"{len(left)} matrices stay in floats, {left[0][0]} among them: {left[0][1]}"] if left else []
        return _Chosen(codec.name, choices, layout=layout, warnings=warnings)
    if scheme != Scheme():
        raise RecipeError(f"--group-size and --sym go with --bits, or with --format {', '.join(layouts.names())}")
    kept = source.gguf_names or not all_floats(stored.values())
    if recipe is None and not target.gguf_names and method is None and kept:
        return _Chosen("floats", {w.name: recipes.Choice(as_floats(stored[w.name])) for w in held.weights})
    default = "F16" if options.vocab_only else "Q4_K_M"
    preset = recipe if isinstance(recipe, recipes.Recipe) else recipes.get(str(recipe or default))
    preset = preset.with_rules(options.tensor_types, fallback=options.fallback)
    seen = {w.name for w in held.weights if w.layer is not None} if method else set()
    choices = preset.assign(held.weights, held.metadata, stored, importance=table.keys() | seen)
    return _Chosen(preset.name, _joined(choices, held), preset.file_type)


def _joined(choices: Mapping[str, recipes.Choice], held: Contents) -> dict[str, recipes.Choice]:
    """The choices, where a tensor of the output is several weights: the largest type that one of these has."""
    shapes = {w.name: w.shape for w in held.weights}
    result = dict(choices)
    for first, parts in held.joined.items():
        fitting = [p for p in parts if choices[p].note is None] or parts  # others are what they are for the shape of that part
        widest = max(fitting, key=lambda p: choices[p].codec.nbytes(shapes[p]) / prod(shapes[p]))
        if choices[widest].codec is not choices[first].codec:
            codec = choices[widest].codec
            result[first] = replace(choices[widest], note=f"{codec.name} as {widest}, which is a part of it")
    return result


def _written_as(
    w: Weight, choice: recipes.Choice, have: Codec, unchanged: bool, target: Format, allow_requantize: bool
) -> tuple[Codec, Codec | None, str | None]:
    """`codec`, `via` and `note` of the tensors that a weight becomes.

    have: what it is in the source; unchanged: its numbers are the output's, whatever the order of rows. Raises
    UnsupportedError for what the format cannot hold, RecipeError for what would be quantized twice.
    """
    codec, via, note = choice.codec, None, choice.note
    if not target.holds(codec):
        holder = _holder(target, codec, w.shape)
        if holder is None:
            raise UnsupportedError(f"{w.name}: {_cannot_hold(target, codec)}")
        via, codec = (None if codec is have else codec), holder
        note = f"{(via or have).name} as {codec.name}, {_exactness(via or have, codec)}"
    if via is not None or codec is have or isinstance(have, PlainCodec):
        return codec, via, note
    if unchanged and repacks(have, codec, w.shape):
        return codec, None, f"the integers of {have.name}, {_exactness(have, codec)}"
    if not isinstance(codec, PlainCodec) and not allow_requantize:
        same = _holder(target, have, w.shape) if target.gguf_names else _integer_holder(have, w.shape)
        raise RecipeError(
            f"{w.name}: the source is already quantized ({have.name}); quantizing it again to {codec.name} "
            f"loses more than quantizing the original would: use that, or --allow-requantize"
            + (f" ({same.name} takes it over as it is)" if same else "")
        )
    return codec, None, note


def _on_lattices(source: Source, tensors: Sequence[PlannedTensor]) -> tuple[list[PlannedTensor], list[str]]:
    """The tensors, those on a lattice that their type can keep with a codec that keeps it; warnings of those that lose it."""
    planned, lost = [], dict[tuple[int, str, str], list[str]]()
    for t in tensors:
        lattice = None if t.via else lattices.look(source, t.weight, t.codec)
        if lattice and lattice.kept:
            notes = [*([t.note] if t.note else []), f"on a lattice of {lattice.bits} bits: kept"]
            t = replace(t, codec=lattice.kept, note="; ".join(notes))
        elif lattice and lattice.keeper:
            lost.setdefault((lattice.bits, t.codec.name, lattice.keeper), []).append(t.name)
        planned.append(t)
    return planned, [
        f"{len(names)} tensors ({names[0]}, ...) are on a lattice of {bits} bits, which {type} loses; {keeper} keeps it: "
        f"--type {keeper}, or --tensor-type for them"
        for (bits, type, keeper), names in lost.items()
    ]


def _fallback_type(options: Options, target: Format) -> Codec | None:
    """What --fallback-type names. Raises RecipeError, UnsupportedError."""
    if options.fallback_type is None:
        return None
    try:
        codec = codecs.get(options.fallback_type)
    except UnsupportedError as e:
        raise RecipeError(f"--fallback-type: {e}") from None
    if not target.holds(codec):
        raise UnsupportedError(f"--fallback-type: {_cannot_hold(target, codec)}")
    return codec


def _check_method(method: Method, codecs: set[Codec]) -> list[str]:
    """Warnings about the types of the blocks' matrices. Raises UnsupportedError where the method can choose no codes."""
    if not codecs:
        return ["no matrix in the model's blocks is quantized: --method has nothing to do"]
    others = ", ".join(sorted(c.name for c in codecs if not method.takes(c)))
    if not any(method.takes(c) for c in codecs):
        fitting = [m for m in methods.names() if all(methods.get(m).takes(c) for c in codecs)]
        raise UnsupportedError(
            f"{others}: --method {method.name} cannot choose its codes; here use --method {' or '.join(fitting)}"
        )
    return [f"{others}: rounded as usual, --method {method.name} cannot choose its codes"] if others else []


def all_floats(used: Iterable[Codec]) -> bool:
    """True if nothing is quantized."""
    return all(isinstance(c, PlainCodec) for c in used)


_HOLDERS = ("TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _holder(target: Format, codec: Codec, shape: tuple[int, ...]) -> Codec | None:
    """The smallest ggml type of that format that can take over the integers of `codec`, or None."""
    return next((c for c in map(codecs.get, _HOLDERS) if target.holds(c) and repacks(codec, c, shape)), None)


def _cannot_hold(target: Format, codec: Codec) -> str:
    """Why, and what instead."""
    if any(map(target.holds, map(codecs.get, _HOLDERS))):  # they take integers over
        of_integers = "of integers it holds symmetric ones and asymmetric ones of at most 5 bits; " if codec.integers else ""
        return (
            f"{target.name} files cannot hold {codec.name}{meant(codec.name)}; {of_integers}give a directory as output to write "
            "safetensors"
        )
    held = [name for name in codecs.names() if target.holds(codecs.get(name))]
    shown = f"{', '.join(held[:12])}{', ...' if len(held) > 12 else ''}" if held else "none that is known"
    return f"{target.name} files cannot hold {codec.name}; types that it holds, for --type and --tensor-type: {shown}"


def _integer_holder(codec: Codec, shape: tuple[int, ...]) -> Codec | None:
    """The codec of checkpoints that can take over the integers of `codec`, or None."""
    grid = codec.integers
    if grid is None or grid.real:
        return None
    per, zero = f"g{grid.group}" if grid.group else "channel", "asym" if grid.zero is None else "sym"
    same = codecs.get(f"int{grid.hi.bit_length()}-{per}-{zero}")
    return same if repacks(codec, same, shape) else None


def _exactness(have: Codec, codec: Codec) -> str:
    """What is not equal after `repack`."""
    a, b = have.integers, codec.integers
    assert a is not None and b is not None
    inexact = [f"scales rounded to {b.step}"] if b.step not in (a.step, "f32") else []
    inexact += ["mins rounded to f16"] if b.real else []
    return " and ".join(inexact) or "lossless"


def _check_importance(imatrix: Importance | None, weights: Sequence[Weight]) -> Mapping[str, F32]:
    """The entries that belong to this model. Raises CalibrationError where it is another model's."""
    if imatrix is None:
        return {}
    importance = {w.name: imatrix.of(w.name, w.shape) for w in weights}
    table = {name: q for name, q in importance.items() if q is not None}
    if not table:
        first = next(iter(imatrix), "it is empty")
        raise CalibrationError(f"{imatrix.path}: no entry is named like a tensor of this model ({first}, ...)")
    return table


def importance_of(
    imatrix: Importance | None, weights: Sequence[Weight], outputs: Mapping[str, Sequence[tuple[str, Weight]]]
) -> dict[str, F32]:
    """`Plan.importance`. Raises CalibrationError where the imatrix is another model's."""
    return _by_output(_check_importance(imatrix, weights), weights, outputs)


def _by_output(
    table: Mapping[str, F32], weights: Sequence[Weight], outputs: Mapping[str, Sequence[tuple[str, Weight]]]
) -> dict[str, F32]:
    """Importance of the output's tensors: each expert that stands alone there gets its own row."""
    by_name = {}
    for w in weights:
        if (q := table.get(w.name)) is not None:
            for expert, (name, made) in enumerate(outputs[w.name]):
                by_name[name] = q[expert] if len(made.shape) < len(w.shape) else q
    return by_name


def _as_encoded(importance: Mapping[str, F32], tensors: Sequence[PlannedTensor]) -> tuple[dict[str, F32], list[str]]:
    """Importance as codecs get it, and a warning where zeros are kept because bytes are to be llama-quantize's."""
    changed, kept = dict(importance), []
    for t in tensors:
        q = changed.get(t.name)
        if q is None or q.all():
            continue
        if not t.target.ggml_bytes:
            changed[t.name] = floored(q)
        elif isinstance(t.target, GgmlCodec) and t.target.takes_importance:
            kept.append((t, int((q == 0).sum()), q.size))
    if not kept:
        return changed, []
    first, zeros, of = kept[0]
    others = f" and {len(kept) - 1} more tensors" if kept[1:] else ""
    return changed, [
        f"the imatrix gives no importance to {zeros} of {of} columns of {first.name}{others}; as in llama-quantize, "
        f"{first.target.name} may store their weights as 0: make it with more text, or keep these in BF16 (--tensor-type)"
    ]
