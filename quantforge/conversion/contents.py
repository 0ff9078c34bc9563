"""What an output holds beside its numbers: the tensors' names, the metadata, the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .. import __version__, archs, tokenizer
from ..archs import from_gguf, nextn
from ..archs.weight import Shape, Weight
from ..calibration import overlap
from ..calibration.importance import Importance
from ..codecs import Codec
from ..codecs.plain import prevailing
from ..errors import UnsupportedError
from ..formats import Format, Source
from ..formats.rows import check_numbers
from ..tokenizer.files import chat_templates, read_json
from .pooling import pooling_metadata

log = logging.getLogger(__name__)
_K = gguf.Keys.LLM

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
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name of a weight -> those, itself among them, that are parts of one tensor of the output, which is among its own."""


def contents(
    source: Source, target: Format, pre_tokenizer: str | None, *, mtp: bool = True, vocab_only: bool = False
) -> Contents:
    """What a file of format `target` made from this source holds.

    pre_tokenizer: as in `tokenizer.metadata`; mtp: with the layers that predict further tokens; vocab_only: without tensors.
    Raises FormatError, ShapeError, UnsupportedError.
    """
    if source.gguf_names and source.whole:
        from_gguf.check_is_model(source.config, source.path, whole=not target.gguf_names)
    weights, outputs, joined = ([], {}, {}) if vocab_only else matched(source, target, mtp=mtp)
    if source.gguf_names and target.gguf_names:
        metadata = {k: v for k, v in source.config.items() if not k.startswith("split.")}
        return Contents(weights, outputs, metadata if mtp else _without_prediction(metadata))
    config = source.checkpoint_config()
    config = config if mtp else _uncounted(config)
    if source.gguf_names:
        metadata = {**source.config, **({gguf.Keys.Tokenizer.PRE: pre_tokenizer} if pre_tokenizer else {})}
        return Contents(weights, outputs, config, tokenizer.files(metadata, config, source.path), joined)
    if not target.gguf_names:
        files = {
            f.name: f.read_bytes()
            for f in _beside(source)
            if f.suffix in (".json", ".model", ".jinja", ".txt", ".md")
            and f.name not in ("config.json", "quantize_config.json")
            and ".safetensors" not in f.name
        }
        return Contents(weights, outputs, config, files | _named_templates(source.tokenizer_directory, files), joined)
    metadata = {
        **settings(source, mtp=mtp),
        **_general(source.directory, config, weights),
        **tokenizer.metadata(source.tokenizer_directory, config, pre_tokenizer=pre_tokenizer),
    }
    return Contents(weights, outputs, metadata)


def _shapes(source: Source, mtp: bool) -> dict[str, Shape]:
    """The tensors that are wanted."""
    shapes = {name: stored.shape for name, stored in source.weights.items()}
    without = nextn.predicting(_layers(source), shapes) if not mtp else ()
    return {name: shape for name, shape in shapes.items() if name not in without}


def matched(
    source: Source, target: Format, *, mtp: bool = True
) -> tuple[list[Weight], dict[str, list[tuple[str, Weight]]], dict[str, Sequence[str]]]:
    """`weights`, `outputs` and `joined` of `Contents`: which tensors there are, and what each is made of.

    Raises FormatError, ShapeError, UnsupportedError.
    """
    shapes = _shapes(source, mtp)
    if source.gguf_names and target.gguf_names:
        weights = [Weight.of(name, shape) for name, shape in shapes.items()]
        return weights, {w.name: [(w.name, w)] for w in weights}, {}
    config = source.checkpoint_config()
    config = config if mtp else _uncounted(config)
    if source.gguf_names:
        return _from_gguf(source, config, shapes)
    if target.gguf_names:
        weights = archs.find(config).weights(config, shapes, source.optional)
        check_numbers(source, weights)
        return weights, {w.name: [(w.name, w)] for w in weights}, {}
    try:
        weights = archs.find(config).weights(config, shapes, source.optional, graph=False)
        check_numbers(source, weights)
    except UnsupportedError as e:
        log.warning("%s; every tensor keeps its name and only --type and --tensor-type decide", e)
        weights = [Weight.of(name, shape) for name, shape in shapes.items()]
    outputs: dict[str, list[tuple[str, Weight]]] = {w.name: [] for w in weights}
    parts: dict[str, list[str]] = {}
    for w in weights:
        for s in w.sources:
            if s not in parts:  # where several are made of it, it is the first one's
                outputs[w.name].append((s, Weight.of(w.name, shapes[s], s)))
            parts.setdefault(s, []).append(w.name)
    return weights, outputs, _several(parts.values())


def _from_gguf(
    source: Source, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> tuple[list[Weight], dict[str, list[tuple[str, Weight]]], dict[str, Sequence[str]]]:
    """A GGUF file as a checkpoint."""
    outputs: dict[str, list[tuple[str, Weight]]] = {}
    parts = []
    for name, made in from_gguf.find_arch(source.config, source.path, shapes).checkpoint(config, shapes).items():
        outputs.setdefault(made.name, []).append((name, made))
        parts.append(made.sources)
    used = {p for some in parts for p in some}
    weights = [Weight.of(name, shape) for name, shape in shapes.items() if name in used]
    return weights, {w.name: outputs.get(w.name, []) for w in weights}, _several(parts)


def settings(source: Source, *, mtp: bool = True) -> dict[str, Any]:
    """GGUF's metadata that follow from a model's config: the architecture's hyperparameters, and how to sample.

    Raises FormatError, UnsupportedError.
    """
    shapes, config = _shapes(source, mtp), source.checkpoint_config()
    config = config if mtp else _uncounted(config)
    if source.gguf_names:
        arch = from_gguf.find_arch(source.config, source.path, shapes)
        said = {k: v for k, v in source.config.items() if k.startswith(f"{arch.name}.")}
        return {**arch.metadata(config), **said}
    arch, directory = archs.find(config), source.directory
    pooling = pooling_metadata(directory, arch.name) if arch.pooled else {}
    return {**arch.metadata(config, read_json(directory / "generation_config.json"), shapes), **pooling}


def _named_templates(directory: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """tokenizer_config.json with the chat templates of a folder of their own, as what is written has no folders.

    Takes chat_template.jinja out of `files`: transformers would read nothing else.
    """
    if not any((directory / "additional_chat_templates").glob("*.jinja")):
        return {}
    settings = read_json(directory / "tokenizer_config.json")
    files.pop("chat_template.jinja", None)
    every = [{"name": name, "template": text} for name, text in chat_templates(directory, settings).items()]
    return {"tokenizer_config.json": (json.dumps(settings | {"chat_template": every}, indent=2) + "\n").encode()}


_OF_TOKENIZERS = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece|sentencepiece|tekken)")
"""How names of a tokenizer's files begin."""


def _beside(source: Source) -> list[Path]:
    """The files in the checkpoint's directory; a tokenizer's from where the model's is."""
    own, other = source.directory, source.tokenizer_directory
    files = [f for f in own.iterdir() if own == other or not _OF_TOKENIZERS.match(f.name)]
    return sorted(files + [f for f in other.iterdir() if own != other and _OF_TOKENIZERS.match(f.name)])


def _layers(source: Source) -> int:
    """How many layers the model has without those that predict further tokens."""
    if not source.gguf_names:
        config = source.checkpoint_config()
        return int(archs.find(config).hyperparameters(config, graph=False)["num_hidden_layers"])
    arch = source.config.get(gguf.Keys.General.ARCHITECTURE)
    count, predicting = (source.config.get(k.format(arch=arch), 0) for k in (_K.BLOCK_COUNT, _K.NEXTN_PREDICT_LAYERS))
    return int(count) - int(predicting)


def _without_prediction(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's metadata of a model without the layers that predict further tokens."""
    arch = metadata.get(gguf.Keys.General.ARCHITECTURE)
    count, predicting = (k.format(arch=arch) for k in (_K.BLOCK_COUNT, _K.NEXTN_PREDICT_LAYERS))
    if not (n := int(metadata.get(predicting, 0))):
        return dict(metadata)
    layers = int(metadata[count])

    def shorter(key: str, value: Any) -> Any:
        per_layer = key.startswith(f"{arch}.") and not key.startswith(f"{arch}.rope.") and np.shape(value) == (layers,)
        return value[: layers - n] if per_layer else value

    shortened = {k: shorter(k, v) for k, v in metadata.items() if k != predicting}
    return shortened | {count: type(metadata[count])(layers - n)}


def _uncounted(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model without the layers that predict further tokens."""
    inner = config.get("text_config")
    outer = {k: 0 if k in nextn.COUNTS else v for k, v in config.items()}
    return outer | ({"text_config": _uncounted(inner)} if isinstance(inner, Mapping) else {})


def _several(parts: Iterable[Sequence[str]]) -> dict[str, Sequence[str]]:
    """`Contents.joined` from the weights that each tensor of the output is made of."""
    return {some[0]: some for some in parts if len(some) > 1}


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
    expert = sum(n for w, n in zip(weights, sizes, strict=True) if w.experts)
    experts = max((w.experts for w in weights), default=0)
    total = sum(sizes)
    known = _described(directory.resolve(), config, total)
    known.name = known.name or directory.resolve().name
    known.size_label = gguf.size_label(total, total - expert, expert // max(1, experts), experts) if total else None
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
ADAPTERS = "quantforge.source.adapters"
_OF_ONE_RUN = (VERSION, RECIPE, SOURCE_NAME, SOURCE_DIGEST, ADAPTERS, IMATRIX_DIGEST)
PENDING = "0" * 64
"""In a plan, which reads no tensors, the place of `Source.digest`."""


def origin(source: Source, recipe: str, imatrix: Importance | None, first_hand: bool) -> dict[str, Any]:
    """What a file says of the model and the recipe that made it: names and digests, no paths and no times.

    first_hand: no tensor is quantized in the source and changed here. A source that says where it is from is then only on the
    way: the file is of the model that it names, and the same as if it had been made of that at once.
    """
    values = {VERSION: __version__, RECIPE: recipe, SOURCE_NAME: source.path.absolute().name, SOURCE_DIGEST: PENDING}
    before = {k: source.config[k] for k in (SOURCE_NAME, SOURCE_DIGEST, ADAPTERS) if isinstance(source.config.get(k), str)}
    if source.adapters:  # merged here: the digest is of what came of it
        values[ADAPTERS] = ", ".join(adapter.absolute().name for adapter in source.adapters)
    elif first_hand and {SOURCE_NAME, SOURCE_DIGEST} <= before.keys():
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
        "adapters": ADAPTERS,
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
