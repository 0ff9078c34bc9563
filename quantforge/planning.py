"""Plan a conversion from headers alone: which tensor gets which codec, the metadata, the exact size."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from . import archs, codecs, formats, recipes, tokenizer
from .archs.base import Weight
from .arrays import F32
from .codecs import Codec
from .codecs.plain import PlainCodec
from .errors import CalibrationError, FormatError, RecipeError, ShapeError, UnsupportedError
from .formats import Format, Header, Source, Stored
from .importance import Importance
from .importance import read as read_importance

log = logging.getLogger(__name__)

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
class Plan:
    """Everything about a conversion that is known before a tensor is read."""

    source: Source
    format: Format
    header: Header
    tensors: Sequence[PlannedTensor]
    importance: Mapping[str, F32]
    recipe: str
    warnings: Sequence[str] = ()

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
    recipe: str | Path | recipes.Recipe = "Q4_K_M",
    importance: str | Path | Importance | None = None,
    *,
    allow_requantize: bool = False,
    pre_tokenizer: str | None = None,
) -> Plan:
    """Decide everything about a conversion from headers alone.

    model: a directory, a .safetensors or .gguf file, or an open Source. out: a path; `.gguf` means
    GGUF, anything else a directory of safetensors. importance: an imatrix file. Raises FormatError,
    UnsupportedError, RecipeError, ShapeError, CalibrationError.
    """
    source = model if isinstance(model, Source) else formats.open_path(model)
    target = formats.get("gguf" if Path(out).suffix == ".gguf" else "safetensors")
    rules = recipe if isinstance(recipe, recipes.Recipe) else recipes.get(str(recipe))
    weights, metadata, files = _model(source, target.name, pre_tokenizer)
    stored = {w.name: source.weights[w.sources[0]].codec if w.sources else codecs.get("F32") for w in weights}
    imatrix = read_importance(importance) if isinstance(importance, str | Path) else importance
    table = _check_importance(imatrix, weights)
    choices = rules.assign(weights, metadata, stored, importance=table.keys())

    tensors: list[PlannedTensor] = []
    for w in weights:
        codec, have, note = choices[w.name].codec, stored[w.name], choices[w.name].note
        if codec is not have and not isinstance(have, PlainCodec) and not allow_requantize:
            raise RecipeError(
                f"{w.name}: the source is already quantized ({have.name}); quantizing it again to {codec.name} "
                "loses more than quantizing the original would: use that, or --allow-requantize"
            )
        if target.name == "gguf":
            if codec.ggml_type is None:
                raise UnsupportedError(
                    f"{w.name}: GGUF cannot hold {codec.name}; give a directory as output to write safetensors"
                )
            tensors.append(PlannedTensor(w.name, w, codec, have, note))
        else:  # the checkpoint's own names and numbers
            for name in w.sources:
                tensors.append(PlannedTensor(name, Weight(w.name, source.weights[name].shape, (name,)), codec, have, note))
    for t in tensors:
        try:
            t.codec.layout(t.shape)
        except ShapeError as e:
            raise ShapeError(f"{t.name}: {e}") from None

    warnings = []
    blind = sorted({choices[w.name].codec.name for w in weights if choices[w.name].lacks_importance})
    if blind:
        warnings.append(
            f"{', '.join(blind)} without calibrated importance for every tensor: a data-free estimate stands in; "
            "an imatrix of the model (--imatrix) gives a clearly better file"
        )
    if target.name == "gguf":
        metadata = {**metadata, **_quantization_metadata(rules, imatrix)}
    header = Header(metadata, {t.name: Stored(t.codec, t.shape) for t in tensors}, files)
    return Plan(source, target, header, tensors, table, rules.name, warnings)


def _model(source: Source, target: str, pre_tokenizer: str | None) -> tuple[list[Weight], dict[str, Any], dict[str, bytes]]:
    """The model's weights, the output's metadata and its extra files."""
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    if source.format == "gguf":
        if target != "gguf":
            raise UnsupportedError(f"{source.path}: a GGUF file can only be converted to GGUF so far; name the output *.gguf")
        weights = [Weight(name, shape, (name,)) for name, shape in shapes.items()]
        return weights, {k: v for k, v in source.config.items() if not k.startswith("split.")}, {}

    directory = source.path if source.path.is_dir() else source.path.parent
    if target != "gguf":
        try:
            weights = archs.find(source.config).weights(source.config, shapes)
        except UnsupportedError as e:
            log.warning("%s; every tensor keeps its name and only --type and --tensor-type decide", e)
            weights = [Weight(name, shape, (name,)) for name, shape in shapes.items()]
        files = {
            f.name: f.read_bytes()
            for f in sorted(directory.iterdir())
            if f.suffix in (".json", ".model", ".jinja", ".txt", ".md")
            and f.name != "config.json"
            and ".safetensors" not in f.name
        }
        return weights, dict(source.config), files
    arch = archs.find(source.config)
    weights = arch.weights(source.config, shapes)
    generation = _json(directory / "generation_config.json")
    metadata = {
        **arch.metadata(source.config, generation),
        **_general(directory, weights),
        **tokenizer.metadata(directory, source.config, pre_tokenizer=pre_tokenizer),
    }
    return weights, metadata, {}


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


def _quantization_metadata(rules: recipes.Recipe, imatrix: Importance | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        gguf.Keys.General.QUANTIZATION_VERSION: QUANTIZATION_VERSION,
        gguf.Keys.General.FILE_TYPE: rules.file_type,
    }
    if imatrix is not None:
        values["quantize.imatrix.file"] = imatrix.path.name
        values["quantize.imatrix.dataset"] = ", ".join(imatrix.datasets)
        values["quantize.imatrix.entries_count"] = len(imatrix)
        values["quantize.imatrix.chunks_count"] = imatrix.chunks
    return values


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
