"""Plan a conversion from headers alone: which tensor gets which codec, the metadata, the exact size."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from . import archs, backends, checkpoint, codecs, formats, layouts, overlap, recipes, tokenizer
from .archs.base import Weight
from .arrays import F32
from .codecs import Codec, repacks
from .codecs.integers import IntegerCodec
from .codecs.plain import PlainCodec
from .errors import CalibrationError, FormatError, RecipeError, ShapeError, UnsupportedError, nearest
from .formats import Format, Header, Source, Stored
from .importance import Importance
from .importance import read as read_importance
from .layouts import Layout
from .presets import kept

if TYPE_CHECKING:
    from .backends import Library
    from .methods import Method

log = logging.getLogger(__name__)

CALIBRATION_CHUNKS = 128
"""Windows of calibration text that a method sees by default."""
QUANTIZATION_VERSION = 2
"""general.quantization_version: ggml's GGML_QNT_VERSION, the layout of its block types."""


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
        return 8 * sum(t.nbytes for t in self.tensors) / max(1, sum(count(t.shape) for t in self.tensors))

    def to_json(self) -> dict[str, Any]:
        """{"metadata", "total_bytes", "tensors", ...}, ready for json.dumps."""
        return {
            "metadata": {k: plain(v) for k, v in self.header.metadata.items()},
            "total_bytes": self.total_bytes,
            "tensors": [t.to_json() for t in self.tensors],
            "warnings": list(self.warnings),
        }


def count(shape: Sequence[int]) -> int:
    """Number of weights of a shape, in Python integers."""
    n = 1
    for dim in shape:
        n *= dim
    return n


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
    method = method or "rtn"
    source = model if isinstance(model, Source) else formats.open_path(model)
    target, layout = _target(Path(out), format, layout_options)
    weights, outputs, metadata, files = _model(source, target.name, pre_tokenizer)
    stored = {w.name: source.weights[w.sources[0]].codec if w.sources else codecs.get("F32") for w in weights}
    imatrix = read_importance(importance) if isinstance(importance, str | Path) else importance
    table = _check_importance(imatrix, weights)
    warnings: list[str] = []
    options = {"act_order": act_order, "static_groups": static_groups, "damping": damping, "clip": clip}
    how = _calibration(method, options, calibration, calibration_chunks, calibration_ctx, device)
    seen = {w.name for w in weights if w.layer is not None} if how else set()
    if layout is not None or bits is not None:
        layout, codec, rules = _schemes(layout, recipe, bits, group_size, symmetric, tensor_types, source, how)
        choices, name = _assign_linears(weights, outputs, stored, codec, rules, target.name == "gguf"), codec.name
        if layout is not None:
            named = {n.removesuffix(".weight"): choices[w.name].codec for w in weights for n, _ in outputs[w.name]}
            warnings = layout.warnings({n: c for n, c in named.items() if not isinstance(c, PlainCodec)})
        file_type = int(gguf.LlamaFileType.GUESSED)
    else:
        if group_size is not None or symmetric is not None:
            raise RecipeError("--group-size and --sym go with --bits, or with --format gptq, awq or compressed-tensors")
        known = source.format == "gguf" or not all(isinstance(c, PlainCodec) for c in stored.values())
        if recipe is None and known and target.name != "gguf" and how is None:
            choices, name = {w.name: recipes.Choice(_as_floats(stored[w.name])) for w in weights}, "floats"
            file_type = int(gguf.LlamaFileType.GUESSED)
        else:
            preset = recipe if isinstance(recipe, recipes.Recipe) else recipes.get(str(recipe or "Q4_K_M"))
            preset = preset.with_rules(tensor_types) if tensor_types else preset
            choices, name = preset.assign(weights, metadata, stored, importance=table.keys() | seen), preset.name
            file_type = preset.file_type

    tensors: list[PlannedTensor] = []
    for w in weights:
        codec, have, note = choices[w.name].codec, stored[w.name], choices[w.name].note
        if how and w.layer is not None and not isinstance(have, PlainCodec) and not allow_requantize:
            raise RecipeError(
                f"{w.name}: the source is already quantized ({have.name}); --method chooses codes for the original "
                "model's weights: use that, or --allow-requantize"
            )
        via = None
        if target.name == "gguf" and codec.ggml_type is None:
            holder = _ggml_holder(codec, w.shape)
            if holder is None:
                raise UnsupportedError(
                    f"{w.name}: GGUF cannot hold {codec.name}; "
                    + ("of integers it holds symmetric ones and asymmetric ones of at most 5 bits; " if codec.integers else "")
                    + "give a directory as output to write safetensors"
                )
            via, codec = (None if codec is have else codec), holder
            note = f"{(via or have).name} as {codec.name}, {_exactness(via or have, codec)}"
        if via is None and codec is not have and not isinstance(have, PlainCodec):
            if all(made.transform.value is None for _, made in outputs[w.name]) and repacks(have, codec, w.shape):
                note = _repack_note(have, codec)
            elif not isinstance(codec, PlainCodec) and not allow_requantize:
                same = _holder(have, w.shape, target.name)
                raise RecipeError(
                    f"{w.name}: the source is already quantized ({have.name}); quantizing it again to {codec.name} "
                    f"loses more than quantizing the original would: use that, or --allow-requantize"
                    + (f" ({same.name} takes it over as it is)" if same else "")
                )
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
    if target.name != "gguf":
        metadata = {**metadata, **_stated_dtype(metadata, source, tensors)}
    else:
        metadata = {**metadata, **_quantization_metadata(file_type, imatrix)}
    metadata = {**metadata, **_provenance(source, imatrix, how)}
    header = Header(metadata, {t.name: Stored(t.codec, t.shape) for t in tensors}, files, layout)
    if max_shard_size is not None:
        header = replace(header, max_shard_size=max_shard_size)
    return Plan(source, target, header, tensors, table, name, warnings, how, device)


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
    if any(not isinstance(s.codec, PlainCodec) for s in source.weights.values()):
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
        kind, bits, group_size, symmetric, _dtype((s.codec, s.shape) for s in source.weights.values())
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
    from . import methods

    return Calibration(methods.get(method, **options), text, chunks or CALIBRATION_CHUNKS, ctx, device)


def _check_method(method: Method, codecs: set[Codec]) -> list[str]:
    """Warnings about the types of the blocks' matrices. Raises UnsupportedError where the method can choose no codes."""
    if not codecs:
        return ["no matrix in the model's blocks is quantized: --method has nothing to do"]
    others = ", ".join(sorted(c.name for c in codecs if not method.takes(c)))
    if not any(method.takes(c) for c in codecs):
        raise UnsupportedError(
            f"{others}: --method {method.name} cannot choose its codes; it does for integers (--bits), Q4_0 to Q8_0, "
            "Q2_K to Q6_K and the IQ types; here use --method rtn or awq"
        )
    return [f"{others}: rounded as usual, --method {method.name} cannot choose its codes"] if others else []


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


def _as_floats(codec: Codec) -> Codec:
    """What a tensor is kept as where it is not quantized."""
    return codec if isinstance(codec, PlainCodec) else codecs.get("BF16")


def _dtype(tensors: Iterable[tuple[Codec, Sequence[int]]]) -> str:
    """What most weights of the float matrices are, as codecs call it: "bf16", "f16" or "f32"; bf16 where there are none."""
    sizes = {"BF16": 0, "F16": 0, "F32": 0}
    for codec, shape in tensors:
        if codec.name in sizes and len(shape) > 1:
            sizes[codec.name] += count(shape)
    return max(sizes, key=lambda k: sizes[k]).lower()


_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def _stated_dtype(config: Mapping[str, Any], source: Source, tensors: Sequence[PlannedTensor]) -> dict[str, str]:
    """config.json's dtype, where it is not what it was: from_pretrained turns every tensor into it."""
    before = _dtype((s.codec, s.shape) for s in source.weights.values())
    now = _dtype((t.codec, t.shape) for t in tensors)
    if source.format != "gguf" and now == before:
        return {}
    return {"dtype" if "dtype" in config else "torch_dtype": _DTYPES[now]}  # every version of transformers reads the older name


_NO_LINEAR = re.compile(r"norm|embed|router|gate_inp|(^|[._])(gate|conv1d|wte|wpe)$|\bln_")


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    """True for the weight of a linear layer inside of a numbered block, going by a checkpoint's names."""
    stem = name.removesuffix(".weight")
    return len(shape) == 2 and stem != name and re.search(r"\.\d+\.", name) is not None and not _NO_LINEAR.search(stem)


def _schemes(
    layout: Layout | None,
    recipe: str | Path | recipes.Recipe | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    tensor_types: Sequence[str | tuple[str, str]],
    source: Source,
    how: Calibration | None,
) -> tuple[Layout | None, Codec, list[recipes.Rule]]:
    """What --type, --bits and the like mean in a layout: the layout with its choices, the linear layers' codec, rules."""
    if recipe is not None and bits is not None:
        raise RecipeError("--type and --bits exclude each other: give one of them")
    given: Sequence[recipes.Rule] = ()
    if isinstance(recipe, recipes.Recipe):
        given, recipe = recipe.rules, recipe.base.name
    scheme = layout or layouts.get("compressed-tensors")
    dtype = _dtype((s.codec, s.shape) for s in source.weights.values()) if layout else "f16"
    settings = how.method.settings() if how else {}
    unordered = bool(settings.get("desc_act")) and not settings.get("static_groups")

    def choose(kind: str | None, bits: int | None = None, group_size: int | None = None, symmetric: bool | None = None) -> Codec:
        nonlocal scheme
        scheme, codec = scheme.choose(kind, bits, group_size, symmetric, dtype)
        return scheme.ordered(codec) if layout and unordered else codec

    def find(kind: str | Codec, where: str) -> Codec:
        with suppress(UnsupportedError):
            if isinstance(known := codecs.get(kind), PlainCodec):
                return known
        return choose(str(kind) if isinstance(kind, str) else kind.name)

    codec = choose(None if recipe is None else str(recipe), bits, group_size, symmetric)
    rules = [recipes.rule(t, find) for t in tensor_types]
    rules += [replace(r, codec=find(r.codec, r.origin)) for r in given]
    return (scheme.calibrated(settings) if how else scheme) if layout else None, codec, rules


Outputs = Mapping[str, Sequence[tuple[str, Weight]]]
"""Name of a weight -> the names that it has in the output, and how each comes about."""


def _assign_linears(
    weights: Sequence[Weight],
    outputs: Outputs,
    stored: Mapping[str, Codec],
    codec: Codec,
    rules: Sequence[recipes.Rule],
    gguf_rules: bool,
) -> dict[str, recipes.Choice]:
    """`codec`, or what a rule says, for the linear layers of the blocks; everything else stays, in floats."""
    choices = {}
    used: set[int] = set()
    layers = 1 + max((int(n) for w in weights for n in re.findall(r"\.(\d+)\.", w.name)[:1]), default=0)
    for w in weights:
        names = [(s, w.shape[-2:]) for s in w.sources] if gguf_rules else [(n, made.shape) for n, made in outputs[w.name]]
        linear = bool(names) and all(_is_linear(*named) for named in names)
        as_is = kept(w, stored[w.name], codec.name) if gguf_rules else _as_floats(stored[w.name])
        if not linear:
            choices[w.name] = recipes.Choice(as_is)
            continue
        spelled = (w.name, *(n for n, _ in names))
        layer = int(re.findall(r"\.(\d+)\.", w.name)[0])
        fits = (i for i, r in enumerate(rules) if any(r.matches(n, layer, layers) for n in spelled))
        if (first := next(fits, None)) is not None:
            used.add(first)
        choices[w.name] = recipes.Choice(codec if first is None else rules[first].codec)
    if unused := [r.origin for i, r in enumerate(rules) if i not in used]:
        raise RecipeError(f"{unused[0]} matches no linear layer of the blocks, or none that an earlier rule leaves")
    if all(isinstance(c.codec, PlainCodec) for c in choices.values()):
        raise UnsupportedError("the model has no linear layers in numbered blocks, which are what --bits and --format quantize")
    return choices


_HOLDERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def _ggml_holder(codec: Codec, shape: tuple[int, ...]) -> Codec | None:
    """The smallest ggml type that can take over the integers of `codec`, or None."""
    return next((c for c in map(codecs.get, _HOLDERS) if repacks(codec, c, shape)), None)


def _holder(codec: Codec, shape: tuple[int, ...], format: str) -> Codec | None:
    """A codec for this format that can take over the integers of `codec`, or None."""
    grid = codec.integers
    if format == "gguf" or grid is None or grid.real:
        return _ggml_holder(codec, shape) if format == "gguf" else None
    per, zero = f"g{grid.group}" if grid.group else "channel", "asym" if grid.zero is None else "sym"
    same = codecs.get(f"int{grid.hi.bit_length()}-{per}-{zero}")
    return same if repacks(codec, same, shape) else None


def _repack_note(have: Codec, codec: Codec) -> str:
    return f"the integers of {have.name}, {_exactness(have, codec)}"


def _exactness(have: Codec, codec: Codec) -> str:
    """What is not equal after `repack`."""
    a, b = have.integers, codec.integers
    assert a is not None and b is not None
    inexact = [f"scales rounded to {b.step}"] if b.step not in (a.step, "f32") else []
    inexact += ["mins rounded to f16"] if b.real else []
    return " and ".join(inexact) or "lossless"


def _model(
    source: Source, target: str, pre_tokenizer: str | None
) -> tuple[list[Weight], Outputs, dict[str, Any], dict[str, bytes]]:
    """The model's weights, what they are called in the output, the output's metadata and its extra files."""
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    if source.format == "gguf":
        weights = [Weight(name, shape, (name,)) for name, shape in shapes.items()]
        if target == "gguf":
            metadata = {k: v for k, v in source.config.items() if not k.startswith("split.")}
            return weights, {w.name: [(w.name, w)] for w in weights}, metadata, {}
        return _from_gguf(source, weights, pre_tokenizer)

    directory = source.path if source.path.is_dir() else source.path.parent
    if target != "gguf":
        try:
            weights = archs.find(source.config).weights(source.config, shapes, source.optional)
        except UnsupportedError as e:
            log.warning("%s; every tensor keeps its name and only --type and --tensor-type decide", e)
            weights = [Weight(name, shape, (name,)) for name, shape in shapes.items()]
        files = {
            f.name: f.read_bytes()
            for f in sorted(directory.iterdir())
            if f.suffix in (".json", ".model", ".jinja", ".txt", ".md")
            and f.name not in ("config.json", "quantize_config.json")
            and ".safetensors" not in f.name
        }
        outputs = {w.name: [(s, Weight(w.name, shapes[s], (s,))) for s in w.sources] for w in weights}
        return weights, outputs, dict(source.config), files
    arch = archs.find(source.config)
    weights = arch.weights(source.config, shapes, source.optional)
    generation = _json(directory / "generation_config.json")
    metadata = {
        **arch.metadata(source.config, generation),
        **_general(directory, weights),
        **tokenizer.metadata(directory, source.config, pre_tokenizer=pre_tokenizer),
    }
    return weights, {w.name: [(w.name, w)] for w in weights}, metadata, {}


def _from_gguf(
    source: Source, weights: list[Weight], pre_tokenizer: str | None
) -> tuple[list[Weight], Outputs, dict[str, Any], dict[str, bytes]]:
    """A GGUF file as a checkpoint."""
    shapes = {w.name: w.shape for w in weights}
    factors = source.read(checkpoint.ROPE_FREQS).decode().reshape(-1) if checkpoint.ROPE_FREQS in shapes else None
    config = checkpoint.config(source.config, shapes, source.path, factors)
    outputs: dict[str, list[tuple[str, Weight]]] = {}
    for name, made in checkpoint.find_arch(source.config, source.path).checkpoint(config, shapes).items():
        outputs.setdefault(made.name, []).append((name, made))
    metadata = {**source.config, **({gguf.Keys.Tokenizer.PRE: pre_tokenizer} if pre_tokenizer else {})}
    return [w for w in weights if w.name in outputs], outputs, config, checkpoint.files(metadata, config, source.path)


def _json(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise FormatError(path, f"not valid JSON: {e}") from None
    if not isinstance(value, Mapping):
        raise FormatError(path, "not a JSON object")
    return value


def _general(directory: Path, weights: Sequence[Weight]) -> dict[str, Any]:
    """general.*: name, size label, licence, authors and the like, from the model card and the directory's name."""
    sizes = [count(w.shape) for w in weights]
    expert = sum(n for w, n in zip(weights, sizes, strict=True) if len(w.shape) == 3)
    experts = max((w.shape[0] for w in weights if len(w.shape) == 3), default=0)
    total = sum(sizes)
    known = gguf.Metadata.load(None, directory.resolve(), None, total)
    known.name = known.name or directory.resolve().name
    known.size_label = gguf.size_label(total, total - expert, expert // max(1, experts), experts)
    recorder = gguf.GGUFWriter(None, "")
    recorder.add_type(gguf.GGUFType.MODEL)
    known.set_gguf_meta_model(recorder)
    skipped = (gguf.Keys.General.ARCHITECTURE, "general.sampling.")  # the arch's part
    return {k: v.value for k, v in recorder.kv_data[0].items() if not k.startswith(skipped)}


def _quantization_metadata(file_type: int, imatrix: Importance | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        gguf.Keys.General.QUANTIZATION_VERSION: QUANTIZATION_VERSION,
        gguf.Keys.General.FILE_TYPE: file_type,
    }
    if imatrix is not None:
        values["quantize.imatrix.file"] = imatrix.path.name
        values["quantize.imatrix.dataset"] = ", ".join(imatrix.datasets)
        values["quantize.imatrix.entries_count"] = len(imatrix)
        values["quantize.imatrix.chunks_count"] = imatrix.chunks
    return values


def _provenance(source: Source, imatrix: Importance | None, how: Calibration | None) -> dict[str, Any]:
    """What a file says of the method and of all texts that it, its importance or its source was calibrated with."""
    texts = {s.sha256: s for s in (*overlap.remembered(source.config), *(imatrix.texts if imatrix else ()))}
    values = {}
    if how:
        from .calibration import sketch

        values["quantforge.method"] = how.method.name
        mine = sketch(how.text)
        texts[mine.sha256] = mine
    return values | overlap.metadata(list(texts.values()))


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
