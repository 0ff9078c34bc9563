"""What an output holds beside its numbers: the tensors' names, the metadata, the files beside the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import gguf

from .. import archs, tokenizer
from ..archs import from_gguf
from ..archs.weight import Shape, Weight
from ..calibration import overlap
from ..calibration.importance import Importance
from ..codecs import Codec
from ..codecs.plain import prevailing
from ..errors import UnsupportedError
from ..formats import Format, Source
from ..formats.rows import check_numbers
from ..tokenizer.files import read_json

log = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2
"""general.quantization_version: ggml's GGML_QNT_VERSION, the layout of its block types."""


@dataclass(frozen=True, slots=True)
class Contents:
    """A model as an output of some format has it, but for the types of its tensors."""

    weights: Sequence[Weight]
    """By GGUF's names, which recipes and importance go by."""
    outputs: Mapping[str, Sequence[tuple[str, Weight]]]
    """Name of a weight -> what it becomes: name and origin of each tensor. Several are its experts, in order."""
    metadata: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


def contents(source: Source, target: Format, pre_tokenizer: str | None) -> Contents:
    """What a file of format `target` made from this source holds.

    pre_tokenizer: as in `tokenizer.metadata`. Raises FormatError, ShapeError, UnsupportedError.
    """
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    if source.gguf_names:
        weights = [Weight.of(name, shape) for name, shape in shapes.items()]
        from_gguf.check_is_model(source.config, source.path, whole=not target.gguf_names)
        if target.gguf_names:
            metadata = {k: v for k, v in source.config.items() if not k.startswith("split.")}
            return Contents(weights, {w.name: [(w.name, w)] for w in weights}, metadata)
        return _from_gguf(source, weights, pre_tokenizer)

    directory, config = source.directory, source.checkpoint_config()
    if not target.gguf_names:
        try:
            weights = archs.find(config).weights(config, shapes, source.optional, graph=False)
            check_numbers(source, weights)
        except UnsupportedError as e:
            log.warning("%s; every tensor keeps its name and only --type and --tensor-type decide", e)
            weights = [Weight.of(name, shape) for name, shape in shapes.items()]
        files = {
            f.name: f.read_bytes()
            for f in sorted(directory.iterdir())
            if f.suffix in (".json", ".model", ".jinja", ".txt", ".md")
            and f.name not in ("config.json", "quantize_config.json")
            and ".safetensors" not in f.name
        }
        outputs: dict[str, list[tuple[str, Weight]]] = {w.name: [] for w in weights}
        taken: set[str] = set()
        for w in weights:  # a tensor that several are made of goes by the first one
            outputs[w.name] = [(s, Weight.of(w.name, shapes[s], s)) for s in w.sources if s not in taken]
            taken.update(w.sources)
        return Contents(weights, outputs, config, files)
    arch = archs.find(config)
    weights = arch.weights(config, shapes, source.optional)
    check_numbers(source, weights)
    metadata = {
        **arch.metadata(config, read_json(directory / "generation_config.json"), shapes),
        **_general(directory, config, weights),
        **tokenizer.metadata(directory, config, pre_tokenizer=pre_tokenizer),
    }
    return Contents(weights, {w.name: [(w.name, w)] for w in weights}, metadata)


def _from_gguf(source: Source, weights: Sequence[Weight], pre_tokenizer: str | None) -> Contents:
    """A GGUF file as a from_gguf."""
    shapes = {w.name: w.shape for w in weights}
    config = source.checkpoint_config()
    outputs: dict[str, list[tuple[str, Weight]]] = {}
    for name, made in from_gguf.find_arch(source.config, source.path, shapes).checkpoint(config, shapes).items():
        outputs.setdefault(made.name, []).append((name, made))
    metadata = {**source.config, **({gguf.Keys.Tokenizer.PRE: pre_tokenizer} if pre_tokenizer else {})}
    files = tokenizer.files(metadata, config, source.path)
    return Contents([w for w in weights if w.name in outputs], outputs, config, files)


def _texts(value: Any) -> Any:
    """A value of a model card with dates and numbers as the texts that they were meant to be."""
    if isinstance(value, Mapping):
        return {str(k): _texts(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_texts(v) for v in value]
    return value if isinstance(value, str) or value is None else str(value)


def _described(directory: Path, config: Mapping[str, Any], total: int) -> gguf.Metadata:
    """Name, licence and so on by config.json, the directory's name and the model card, where that can be read."""
    try:
        card = _texts(gguf.Metadata.load_model_card(directory))
        known = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, dict(config), directory, total)
        for f in fields(known):
            if str(f.type) == "Optional[str]" and not isinstance(getattr(known, f.name), str):  # a list where one is expected
                setattr(known, f.name, None)
        return known
    except Exception as e:  # whatever a YAML reader raises on text that people wrote
        log.warning("%s: its model card is not read: %s", directory / "README.md", str(e).split("\n")[0])
        return gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, {}, directory, total)


def _general(directory: Path, config: Mapping[str, Any], weights: Sequence[Weight]) -> dict[str, Any]:
    """general.*: name, size label, licence, authors and the like, from the model card and the directory's name."""
    sizes = [math.prod(w.shape) for w in weights]
    expert = sum(n for w, n in zip(weights, sizes, strict=True) if len(w.shape) == 3)
    experts = max((w.shape[0] for w in weights if len(w.shape) == 3), default=0)
    total = sum(sizes)
    known = _described(directory.resolve(), config, total)
    known.name = known.name or directory.resolve().name
    known.size_label = gguf.size_label(total, total - expert, expert // max(1, experts), experts)
    recorder = gguf.GGUFWriter(None, "")
    recorder.add_type(gguf.GGUFType.MODEL)
    known.set_gguf_meta_model(recorder)
    skipped = (gguf.Keys.General.ARCHITECTURE, "general.sampling.")  # the arch's part
    return {k: v.value for k, v in recorder.kv_data[0].items() if not k.startswith(skipped)}


def quantization_metadata(file_type: int, imatrix: Importance | None) -> dict[str, Any]:
    """What llama-quantize says of a GGUF file's types and importance. file_type: of `gguf.LlamaFileType`."""
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


def provenance(source: Source, imatrix: Importance | None, method: str | None, text: str | Path | None) -> dict[str, Any]:
    """What a file says of the method and of all texts that it, its importance or its source was calibrated with.

    text: what the method saw; None: nothing.
    """
    texts = {s.sha256: s for s in (*overlap.remembered(source.config), *(imatrix.texts if imatrix else ()))}
    values = {}
    if method is not None:
        values["quantforge.method"] = method
    if text is not None:
        from ..calibration.gather import sketch

        mine = sketch(text)
        texts[mine.sha256] = mine
    return values | overlap.metadata(list(texts.values()))


_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def stated_dtype(config: Mapping[str, Any], source: Source, tensors: Iterable[tuple[Codec, Shape]]) -> dict[str, str]:
    """config.json's dtype, where it is not what it was: from_pretrained turns every tensor into it."""
    before, now = prevailing((s.codec, s.shape) for s in source.weights.values()), prevailing(tensors)
    if not source.gguf_names and now == before:
        return {}
    return {"dtype" if "dtype" in config else "torch_dtype": _DTYPES[now]}  # every version of transformers reads the older name
