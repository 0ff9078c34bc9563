"""What an output holds beside its numbers: the tensors' names, the metadata, the files beside the weights."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from .. import __version__, archs, tokenizer
from ..archs import from_gguf
from ..archs.weight import Shape, Weight
from ..calibration import overlap
from ..calibration.importance import Importance
from ..codecs import Codec
from ..codecs.plain import prevailing
from ..errors import UnsupportedError
from ..formats import Format, Source
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
    weights, outputs = matched(source, target)
    config = source.config if source.gguf_names and target.gguf_names else source.checkpoint_config()
    if source.gguf_names:
        if target.gguf_names:
            metadata = {k: v for k, v in config.items() if not k.startswith("split.")}
            return Contents(weights, outputs, metadata)
        metadata = {**source.config, **({gguf.Keys.Tokenizer.PRE: pre_tokenizer} if pre_tokenizer else {})}
        return Contents(weights, outputs, config, tokenizer.files(metadata, config, source.path))
    directory = source.directory
    if not target.gguf_names:
        files = {
            f.name: f.read_bytes()
            for f in sorted(directory.iterdir())
            if f.suffix in (".json", ".model", ".jinja", ".txt", ".md")
            and f.name not in ("config.json", "quantize_config.json")
            and ".safetensors" not in f.name
        }
        return Contents(weights, outputs, config, files)
    metadata = {
        **settings(source),
        **_general(directory, weights),
        **tokenizer.metadata(directory, config, pre_tokenizer=pre_tokenizer),
    }
    return Contents(weights, outputs, metadata)


def matched(source: Source, target: Format) -> tuple[list[Weight], dict[str, list[tuple[str, Weight]]]]:
    """`weights` and `outputs` of `Contents`: which tensors there are, and what each is made of.

    Raises FormatError, ShapeError, UnsupportedError.
    """
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    outputs: dict[str, list[tuple[str, Weight]]] = {}
    if source.gguf_names:
        weights = [Weight.of(name, shape) for name, shape in shapes.items()]
        if target.gguf_names:
            return weights, {w.name: [(w.name, w)] for w in weights}
        config = source.checkpoint_config()
        for name, made in from_gguf.find_arch(source.config, source.path, shapes).checkpoint(config, shapes).items():
            outputs.setdefault(made.name, []).append((name, made))
        return [w for w in weights if w.name in outputs], outputs
    config = source.checkpoint_config()
    if target.gguf_names:
        weights = archs.find(config).weights(config, shapes, source.optional)
        return weights, {w.name: [(w.name, w)] for w in weights}
    try:
        weights = archs.find(config).weights(config, shapes, source.optional, graph=False)
    except UnsupportedError as e:
        log.warning("%s; every tensor keeps its name and only --type and --tensor-type decide", e)
        weights = [Weight.of(name, shape) for name, shape in shapes.items()]
    outputs = {w.name: [] for w in weights}
    taken: set[str] = set()
    for w in weights:  # a tensor that several are made of goes by the first one
        outputs[w.name] = [(s, Weight.of(w.name, shapes[s], s)) for s in w.sources if s not in taken]
        taken.update(w.sources)
    return weights, outputs


def settings(source: Source) -> dict[str, Any]:
    """GGUF's metadata that follow from a model's config: the architecture's hyperparameters, and how to sample.

    Raises FormatError, UnsupportedError.
    """
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    config = source.checkpoint_config()
    if source.gguf_names:
        arch = from_gguf.find_arch(source.config, source.path, shapes)
        said = {k: v for k, v in source.config.items() if k.startswith(f"{arch.name}.")}
        return {**arch.metadata(config), **said}
    return archs.find(config).metadata(config, read_json(source.directory / "generation_config.json"), shapes)


def _general(directory: Path, weights: Sequence[Weight]) -> dict[str, Any]:
    """general.*: name, size label, licence, authors and the like, from the model card and the directory's name."""
    sizes = [math.prod(w.shape) for w in weights]
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


VERSION, RECIPE, METHOD = "quantforge.version", "quantforge.recipe", "quantforge.method"
SOURCE_NAME, SOURCE_DIGEST = "quantforge.source.name", "quantforge.source.sha256"
IMATRIX_DIGEST = "quantforge.imatrix.sha256"
_OF_ONE_RUN = (VERSION, RECIPE, SOURCE_NAME, SOURCE_DIGEST, IMATRIX_DIGEST)
PENDING = "0" * 64
"""In a plan, which reads no tensors, the place of `Source.digest`."""


def origin(source: Source, recipe: str, imatrix: Importance | None, first_hand: bool) -> dict[str, Any]:
    """What a file says of the model and the recipe that made it: names and digests, no paths and no times.

    first_hand: no tensor is quantized in the source and changed here. A source that says where it is from is then only on the
    way: the file is of the model that it names, and the same as if it had been made of that at once.
    """
    values = {VERSION: __version__, RECIPE: recipe, SOURCE_NAME: source.path.absolute().name, SOURCE_DIGEST: PENDING}
    before = {k: source.config[k] for k in (SOURCE_NAME, SOURCE_DIGEST) if isinstance(source.config.get(k), str)}
    if first_hand and len(before) == 2:
        values |= before
    if imatrix is not None and imatrix.path.is_file():
        values[IMATRIX_DIGEST] = hashlib.sha256(imatrix.path.read_bytes()).hexdigest()
    return values


def provenance(source: Source, imatrix: Importance | None, method: str | None, text: str | Path | None) -> dict[str, Any]:
    """What a file says of the method and of all texts that it, its importance or its source was calibrated with.

    text: what the method saw; None: nothing.
    """
    texts = {s.sha256: s for s in (*overlap.remembered(source.config), *(imatrix.texts if imatrix else ()))}
    values: dict[str, Any] = {}
    if method is not None:
        values[METHOD] = method
    if text is not None:
        from ..calibration.gather import sketch

        mine = sketch(text)
        texts[mine.sha256] = mine
    return values | overlap.metadata(list(texts.values()))


def history(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of how it came about, by short names; empty where it says nothing."""
    keys = {
        "version": VERSION,
        "source": SOURCE_NAME,
        "source_sha256": SOURCE_DIGEST,
        "recipe": RECIPE,
        "method": METHOD,
        "imatrix": "quantize.imatrix.file",
        "imatrix_sha256": IMATRIX_DIGEST,
    }
    said = {name: str(metadata[key]) for name, key in keys.items() if key in metadata}
    texts = [{"name": s.name, "sha256": s.sha256} for s in overlap.remembered(metadata)]
    return said | ({"calibration": texts} if texts else {})


def without_history(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without what the source says of the run that made it."""
    return {k: v for k, v in metadata.items() if k not in _OF_ONE_RUN}


_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def stated_dtype(config: Mapping[str, Any], source: Source, tensors: Iterable[tuple[Codec, Shape]]) -> dict[str, str]:
    """config.json's dtype, where it is not what it was: from_pretrained turns every tensor into it."""
    before, now = prevailing((s.codec, s.shape) for s in source.weights.values()), prevailing(tensors)
    if not source.gguf_names and now == before:
        return {}
    return {"dtype" if "dtype" in config else "torch_dtype": _DTYPES[now]}  # every version of transformers reads the older name
