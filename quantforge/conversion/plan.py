"""Plan a conversion from headers alone: which tensor gets which codec, the metadata, the exact size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from .. import backends, codecs, formats, layouts, methods, recipes
from ..archs.weight import Weight
from ..arrays import F32, Parts
from ..calibration.importance import Importance
from ..calibration.importance import read as read_importance
from ..codecs import Codec, Encoded, repack, repacks
from ..codecs.fp4 import NVFP4
from ..codecs.integers import IntegerCodec
from ..codecs.plain import PlainCodec, as_floats, prevailing
from ..errors import CalibrationError, RecipeError, ShapeError, UnsupportedError, nearest
from ..formats import Format, Header, Source, Stored
from ..formats.rows import codec_of
from ..layouts import Layout
from ..methods import Method
from ..recipes import linears
from ..recipes.linears import choose_scheme
from .contents import contents, provenance, quantization_metadata, stated_dtype

if TYPE_CHECKING:
    from ..backends import Library

CALIBRATION_CHUNKS = 128
"""Windows of calibration text that a method sees by default."""


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

    def to_json(self) -> dict[str, Any]:
        """As in `convert --dry-run --json`."""
        row: dict[str, Any] = {"name": self.name, "type": self.codec.name, "shape": list(self.shape), "bytes": self.nbytes}
        row["source_type"] = self.source_codec.name
        if self.note:
            row["note"] = self.note
        return row


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibrated method for the blocks' matrices, and the text it sees."""

    method: Method
    text: str | Path
    chunks: int
    """Windows, spread over the text."""
    ctx: int | None
    """Tokens of each; None: 512, or less if the model's context is."""
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
    calibrated: Calibration | None = None
    device: str = "cpu"
    """Where tensors are encoded."""
    finish: Callable[[Path], Plan] | None = None
    """Where a library quantizes: the plan for the checkpoint that it left; this one is what that should come to."""
    adopt: bool = False
    """The library's checkpoint is the output as it is."""

    @property
    def total_bytes(self) -> int:
        """Exact size of the output."""
        return self.format.size(self.header)

    @property
    def bpw(self) -> float:
        """Stored bits per weight over all tensors."""
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, sum(prod(t.shape) for t in self.tensors))

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


def plan(
    model: str | Path | Source,
    out: str | Path,
    recipe: str | Path | recipes.Recipe | None = None,
    importance: str | Path | Importance | None = None,
    *,
    format: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    max_shard_size: int | None = None,
    tensor_types: Sequence[str | tuple[str, str]] = (),
    allow_requantize: bool = False,
    pre_tokenizer: str | None = None,
    method: str | Method | None = None,
    backend: str | None = None,
    backend_python: str | Path | None = None,
    calibration: str | Path = "builtin",
    calibration_chunks: int | None = None,
    calibration_ctx: int | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    damping: float | None = None,
    clip: bool | None = None,
    device: str = "cpu",
    **layout_options: Any,
) -> Plan:
    """Decide everything about a conversion from headers alone.

    model: a directory, a .safetensors or .gguf file, or an open Source. out: a path; `.gguf` means
    GGUF, anything else a directory of safetensors. recipe: Q4_K_M, or what the format usually has.
    importance: an imatrix file. format: "gguf", "safetensors", or a layout of `layouts`, in which
    the linear layers of the blocks are quantized and nothing else; so they are where bits (and
    group_size: -1 for rows; symmetric) are given instead of a recipe. max_shard_size: bytes. tensor_types: "REGEX=TYPE"
    for some of the tensors, by GGUF's or the checkpoint's name; the first match wins.
    method: "rtn", "gptq", "awq", "awq+gptq" or an object of `quantforge.methods`, for the matrices of the model's
    blocks. calibration: the text it sees, a file or "builtin"; calibration_chunks: windows of it, default 128;
    calibration_ctx: tokens of each, default min(512, the model's). act_order, static_groups, damping: as in
    `methods.GPTQ`; clip: as in `methods.AWQ`. backend: the library of `backends` that quantizes instead, method: one that
    it has; backend_python: the interpreter that has it. device: where tensors are encoded and methods run, cpu or cuda.
    layout_options: of that layout,
    such as version="gptq_v2". Raises FormatError, UnsupportedError, RecipeError, ShapeError, CalibrationError, BackendError.
    """
    if backend is not None:
        if not isinstance(method, str | None):
            raise RecipeError(f"--backend {backend}: give the method by its name")
        if clip is not None:
            raise RecipeError("--clip belongs to the built-in AWQ: leave it out, or --backend")
        library = backends.get(backend, method, backend_python, device)
        library = replace(library, act_order=act_order, static_groups=static_groups, damping=damping)
        calibrate = {"calibration": calibration, "calibration_chunks": calibration_chunks, "calibration_ctx": calibration_ctx}
        write = {"max_shard_size": max_shard_size, "tensor_types": tensor_types, "pre_tokenizer": pre_tokenizer, **layout_options}
        return _plan_library(
            library,
            model,
            Path(out),
            recipe,
            importance,
            format,
            (bits, group_size, symmetric),
            calibrate | {"device": device},
            write,
        )
    if backend_python is not None:
        raise RecipeError("--backend-python goes with --backend")
    source = model if isinstance(model, Source) else formats.open_path(model)
    target, layout = _target(Path(out), format, layout_options)
    to_gguf = target.name == "gguf"
    held = contents(source, target.name, pre_tokenizer)
    weights, outputs = held.weights, held.outputs
    stored = {w.name: codec_of(source, w) for w in weights}
    imatrix = read_importance(importance) if isinstance(importance, str | Path) else importance
    table = _check_importance(imatrix, weights)
    warnings: list[str] = []
    options = {"act_order": act_order, "static_groups": static_groups, "damping": damping, "clip": clip}
    how = _calibration(method or "rtn", options, calibration, calibration_chunks, calibration_ctx, device)
    seen = {w.name for w in weights if w.layer is not None} if how else set()
    file_type = int(gguf.LlamaFileType.GUESSED)
    if layout is not None or bits is not None:
        dtype, settings = prevailing((s.codec, s.shape) for s in source.weights.values()), how.method.settings() if how else None
        layout, codec, rules = choose_scheme(layout, recipe, bits, group_size, symmetric, tensor_types, dtype, settings)
        choices, name = linears.assign(weights, outputs, stored, codec, rules, to_gguf), codec.name
        if layout is not None:
            named = {n.removesuffix(".weight"): choices[w.name].codec for w in weights for n, _ in outputs[w.name]}
            warnings = layout.warnings({n: c for n, c in named.items() if not isinstance(c, PlainCodec)})
    elif group_size is not None or symmetric is not None:
        raise RecipeError("--group-size and --sym go with --bits, or with --format gptq, awq or compressed-tensors")
    elif recipe is None and not to_gguf and how is None and (source.format == "gguf" or not _all_floats(stored.values())):
        choices, name = {w.name: recipes.Choice(as_floats(stored[w.name])) for w in weights}, "floats"
    else:
        preset = recipe if isinstance(recipe, recipes.Recipe) else recipes.get(str(recipe or "Q4_K_M"))
        preset = preset.with_rules(tensor_types) if tensor_types else preset
        choices, name = preset.assign(weights, held.metadata, stored, importance=table.keys() | seen), preset.name
        file_type = preset.file_type

    tensors: list[PlannedTensor] = []
    for w in weights:
        have = stored[w.name]
        if how and w.layer is not None and not isinstance(have, PlainCodec) and not allow_requantize:
            raise RecipeError(
                f"{w.name}: the source is already quantized ({have.name}); --method chooses codes for the original "
                "model's weights: use that, or --allow-requantize"
            )
        unchanged = all(made.by_row for _, made in outputs[w.name])
        codec, via, note = _written_as(w, choices[w.name], have, unchanged, to_gguf, allow_requantize)
        tensors += [PlannedTensor(n, made, codec, have, note, via) for n, made in outputs[w.name]]
    if layout is not None:
        modules = {t.name.removesuffix(".weight"): t.codec for t in tensors}
        mates = {f"{m}.weight": tuple(f"{n}.weight" for n in group) for group in layout.sharing(modules) for m in group}
        tensors = [replace(t, mates=mates.get(t.name, ())) for t in tensors]
    for t in tensors:
        try:
            t.codec.layout(t.shape)
        except ShapeError as e:
            raise ShapeError(f"{t.name}: {e}") from None

    blind = sorted({choices[w.name].codec.name for w in weights if choices[w.name].lacks_importance})
    if blind:
        warnings.append(
            f"{', '.join(blind)} without calibrated importance for every tensor: a data-free estimate stands in; "
            "an imatrix of the model (--imatrix) gives a clearly better file"
        )
    if how:
        inside = {choices[w.name].codec for w in weights if w.layer is not None}
        warnings += _check_method(how.method, {c for c in inside if not isinstance(c, PlainCodec)})
    metadata = dict(held.metadata)
    if to_gguf:
        metadata |= quantization_metadata(file_type, imatrix)
    else:
        metadata |= stated_dtype(metadata, source, ((t.codec, t.shape) for t in tensors))
    seen_text = calibration if how and how.method.needs else None
    metadata |= provenance(source, imatrix, how.method.name if how else None, seen_text)
    header = Header(metadata, {t.name: Stored(t.codec, t.shape) for t in tensors}, held.files, layout)
    if max_shard_size is not None:
        header = replace(header, max_shard_size=max_shard_size)
    return Plan(source, target, header, tensors, _by_output(table, weights, outputs), name, warnings, how, device)


def _written_as(
    w: Weight, choice: recipes.Choice, have: Codec, unchanged: bool, to_gguf: bool, allow_requantize: bool
) -> tuple[Codec, Codec | None, str | None]:
    """`codec`, `via` and `note` of the tensors that a weight becomes.

    have: what it is in the source; unchanged: its numbers are the output's, whatever the order of rows. Raises
    UnsupportedError for what GGUF cannot hold, RecipeError for what would be quantized twice.
    """
    codec, via, note = choice.codec, None, choice.note
    if to_gguf and codec.ggml_type is None:
        holder = _ggml_holder(codec, w.shape)
        if holder is None:
            raise UnsupportedError(
                f"{w.name}: GGUF cannot hold {codec.name}; "
                + ("of integers it holds symmetric ones and asymmetric ones of at most 5 bits; " if codec.integers else "")
                + "give a directory as output to write safetensors"
            )
        via, codec = (None if codec is have else codec), holder
        note = f"{(via or have).name} as {codec.name}, {_exactness(via or have, codec)}"
    if via is not None or codec is have or isinstance(have, PlainCodec):
        return codec, via, note
    if unchanged and repacks(have, codec, w.shape):
        return codec, None, f"the integers of {have.name}, {_exactness(have, codec)}"
    if not isinstance(codec, PlainCodec) and not allow_requantize:
        same = _ggml_holder(have, w.shape) if to_gguf else _integer_holder(have, w.shape)
        raise RecipeError(
            f"{w.name}: the source is already quantized ({have.name}); quantizing it again to {codec.name} "
            f"loses more than quantizing the original would: use that, or --allow-requantize"
            + (f" ({same.name} takes it over as it is)" if same else "")
        )
    return codec, None, note


def _plan_library(
    library: Library,
    model: str | Path | Source,
    out: Path,
    recipe: str | Path | recipes.Recipe | None,
    importance: str | Path | Importance | None,
    format: str | None,
    wanted: tuple[int | None, int | None, bool | None],
    calibrate: Mapping[str, Any],
    write: Mapping[str, Any],
) -> Plan:
    """What a library will be told, and what its checkpoint becomes; see `plan`."""
    source = model if isinstance(model, Source) else formats.open_path(model)
    if not (source.path / "config.json").is_file() or source.format == "gguf":
        raise UnsupportedError(
            f"{source.path}: --backend needs a checkpoint directory as transformers loads it; "
            "`quantforge convert MODEL DIR --type BF16` makes one"
        )
    if not _all_floats(s.codec for s in source.weights.values()):
        raise UnsupportedError(f"{source.path}: quantized already; --backend quantizes the original model")
    bits, group_size, symmetric = wanted
    schemes, written_in = library.known.schemes, library.known.methods[library.method]
    kind = schemes.get(str(recipe).upper())
    target = None if kind else recipe
    if target is not None and wanted == (None, None, None) and not isinstance(target, recipes.Recipe):
        with suppress(UnsupportedError):  # what stands on even steps the library can make as well
            grid = codecs.get(str(target)).integers
            if grid is not None and not grid.whole:
                bits, group_size, symmetric = grid.hi.bit_length(), grid.group or -1, grid.zero is not None
    usual = "awq" if symmetric is False and "awq" in written_in and bits in (None, 4) else written_in[0]
    layout = format if format in written_in else usual
    _, codec = layouts.get(layout).choose(
        kind, bits, group_size, symmetric, prevailing((s.codec, s.shape) for s in source.weights.values())
    )
    even: dict[str, Any] = {}
    if isinstance(codec, IntegerCodec):
        even = {"bits": codec.bits, "group_size": codec.group or -1, "symmetric": codec.symmetric}
    library = replace(library, layout=layout, scheme=str(recipe).upper() if kind else None, **even)

    to_gguf = out.suffix == ".gguf"
    how: dict[str, Any]
    if target is not None:
        how = {"recipe": target, "format": format}
    elif to_gguf:
        how = even or {"recipe": codec.name}
    else:
        how = {"format": format or layout, **({"recipe": kind} if kind else even)}
    if library.act_order and not library.static_groups and layout == "gptq" and (to_gguf or how.get("format") != "gptq"):
        raise RecipeError("--act-order scatters groups over the columns, which only GPTQ files can say: add --static-groups")
    as_is = target is None and (to_gguf or format in (None, layout, "safetensors"))
    adopt = as_is and not to_gguf and format != "safetensors" and not any(write.values())
    first = plan(source, out, importance=importance, method=library, **how, **calibrate, **write)
    then: dict[str, Any] = {"recipe": recipes.AS_STORED} if as_is and (adopt or to_gguf or format == "safetensors") else how
    finish = partial(plan, out=out, importance=importance, allow_requantize=True, **then, **write)
    return replace(first, finish=finish, adopt=adopt, recipe=f"{first.recipe}, {library.name}")


def _calibration(
    method: str | Method, options: Mapping[str, Any], text: str | Path, chunks: int | None, ctx: int | None, device: str
) -> Calibration | None:
    """What a method needs; None for plain rounding, which runs without torch."""
    if method == "rtn" and not any(v is not None for v in options.values()):
        return None
    return Calibration(methods.get(method, **options), text, chunks or CALIBRATION_CHUNKS, ctx, device)


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


def _all_floats(used: Iterable[Codec]) -> bool:
    return all(isinstance(c, PlainCodec) for c in used)


def _target(out: Path, format: str | None, options: Mapping[str, Any]) -> tuple[Format, Layout | None]:
    """The format that is written and, for a checkpoint directory, its layout."""
    is_gguf = out.suffix == ".gguf"
    known = ("gguf", "safetensors", *layouts.names())
    if format is not None and format not in known:
        raise RecipeError(f"unknown format {format}{nearest(format, known)}; known: {', '.join(known)}")
    if format is not None and is_gguf != (format == "gguf"):
        raise RecipeError(f"{out}: a {format} output is {'a file named *.gguf' if format == 'gguf' else 'a directory'}")
    if format in layouts.names():
        try:
            return formats.get("safetensors"), layouts.get(format, **options)
        except TypeError:
            raise RecipeError(f"--format {format} has no option {', '.join(options)}") from None
    if options:
        raise RecipeError(f"{', '.join(options)}: only with the --format that has it")
    return formats.get("gguf" if is_gguf else "safetensors"), None


_HOLDERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _ggml_holder(codec: Codec, shape: tuple[int, ...]) -> Codec | None:
    """The smallest ggml type that can take over the integers of `codec`, or None."""
    return next((c for c in map(codecs.get, _HOLDERS) if repacks(codec, c, shape)), None)


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
    found = {w.name: imatrix.of(w.name, w.shape) for w in weights}
    table = {name: q for name, q in found.items() if q is not None}
    if not table:
        first = next(iter(imatrix), "it is empty")
        raise CalibrationError(f"{imatrix.path}: no entry is named like a tensor of this model ({first}, ...)")
    return table


def _by_output(
    table: Mapping[str, F32], weights: Sequence[Weight], outputs: Mapping[str, Sequence[tuple[str, Weight]]]
) -> dict[str, F32]:
    """Importance of the output's tensors: each expert that stands alone there gets its own row."""
    found = {}
    for w in weights:
        if (q := table.get(w.name)) is not None:
            for expert, (name, made) in enumerate(outputs[w.name]):
                found[name] = q[expert] if len(made.shape) < len(w.shape) else q
    return found
