"""What a format is: it moves `Encoded` between files and memory, knowing neither models nor methods."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from typing_extensions import Self

from .. import archs
from ..arrays import Array, Parts, TensorInfo
from ..codecs import Codec, Encoded
from ..discovery import Registry
from ..errors import FormatError, OutputError, UnsupportedError, nearest
from ..layouts import Layout
from ..tokenizer import Tokenizer
from ..tokenizer.files import read_json
from .diagnosis import located, name_missing, name_unknown, refuse_adapter, refuse_unmerged
from .files import MappedFile, NewFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, before it is read: its codec and shape ([..., out, in])."""

    codec: Codec
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.codec.nbytes(self.shape)


class Source(ABC):
    """An open model file or directory. Thread-safe reads; usable as a context manager."""

    format: str
    path: Path
    config: Mapping[str, Any]
    """config.json for safetensors, the key-value metadata for GGUF."""
    weights: Mapping[str, Stored]
    """Every tensor by its name in the file, in file order."""
    optional: frozenset[str] = frozenset()
    """Tensors that say nothing where the model has no place for them: biases of zero."""
    gguf_names: bool = False
    """True: tensors and metadata are called as in GGUF; false: as in a checkpoint."""
    whole: bool = True
    """False for what is no model, but goes beside one."""
    adapters: tuple[Path, ...] = ()
    """What is merged into it while it is read."""

    @property
    def tokenizer_directory(self) -> Path:
        """Where a checkpoint's tokenizer files are."""
        return self.directory

    @property
    def directory(self) -> Path:
        """Where files beside the weights are."""
        return self.path if self.path.is_dir() else self.path.parent

    def checkpoint_config(self) -> dict[str, Any]:
        """config.json of the model as a checkpoint. Raises UnsupportedError, FormatError.

        Where it contradicts the tensors, it says what is stored: as many tokens as the embedding has rows, and a head of its
        own where one is stored that is not the embedding, as transformers has it.
        """
        return dict(self._config_as_stored)

    @cached_property
    def _config_as_stored(self) -> Mapping[str, Any]:
        arch = archs.known(self.config)
        text = self.config.get("text_config")
        text = text if isinstance(text, Mapping) else {}
        if arch is None:
            return self.config
        head, embedding = arch.ends(self.weights)
        stored: dict[str, Any] = {}
        said = {**text, **self.config}.get("tie_word_embeddings", arch.defaults.get("tie_word_embeddings"))
        if said and head and embedding and self._differ(head, embedding):
            stored["tie_word_embeddings"] = False
        shape = self.weights[embedding or head].shape if embedding or head else ()  # type: ignore[index]
        size = {**self.config, **text}.get("vocab_size")
        if len(shape) == 2 and isinstance(size, int) and size != shape[0]:
            logger.warning("config.json: vocab_size is %d, but the embedding has %d rows, which count", size, shape[0])
            stored["vocab_size"] = shape[0]
        inner = {**text, **{k: v for k, v in stored.items() if k in text}}
        outer = {k: v for k, v in stored.items() if k not in text or k in self.config or k == "tie_word_embeddings"}
        return {**self.config, **outer, **({"text_config": inner} if text else {})}

    def _differ(self, one: str, other: str) -> bool:
        a, b = map(self.read, (one, other))
        return a.shape != b.shape or a.codec is not b.codec or not all(equal(a.parts[k], b.parts[k]) for k in a.parts)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, that runs. Raises FormatError, UnsupportedError."""
        path, config = (self.path, self.config) if self.gguf_names else (self.tokenizer_directory, self.checkpoint_config())
        return Tokenizer(path, config, gguf_metadata=self.gguf_names)

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Size on disk of the weight files."""

    @abstractmethod
    def read(self, name: str) -> Encoded:
        """The stored tensor; parts are views of a memory map where the format allows."""

    def digest(self) -> str:
        """sha256 of what this model is: its config, and each tensor's name, type, shape and `samples`, in file order.

        A look at every tensor, not all of its bytes: that would take as long as a conversion.
        """
        whole = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True, default=_hashable).encode())
        for name, stored in self.weights.items():
            whole.update(f"{name}\0{stored.codec.name}{list(stored.shape)}".encode("utf-8", "surrogateescape"))
            for sample in self.samples(name):
                whole.update(sample)
        return whole.hexdigest()

    def samples(self, name: str) -> Iterator[bytes]:
        """Of each part of a tensor the first, middle and last 4096 bytes."""
        for part in self.read(name).parts.values():
            octets = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            yield from (octets[a:b].tobytes() for a, b in _ends_and_middle(octets.nbytes))

    def release(self, name: str) -> None:  # noqa: B027 - optional to override
        """Tell the system that this tensor's pages are not needed any more."""

    def close(self) -> None:  # noqa: B027 - optional to override
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Bare(Source):
    """A checkpoint's directory as it is without weights: config.json and the tokenizer's files."""

    format = "config"

    def __init__(self, path: Path) -> None:
        """Raises FormatError."""
        self.path, self.weights = path, {}
        self.config = read_json(path / "config.json")
        if not self.config:
            raise FormatError(path / "config.json", "missing: it says what the model is")

    @property
    def total_bytes(self) -> int:
        """See `Source`."""
        return 0

    def read(self, name: str) -> Encoded:
        """There are none."""
        raise KeyError(name)


_SAMPLE = 4096


def _ends_and_middle(n: int) -> list[tuple[int, int]]:
    """Where in n bytes samples are taken."""
    if n <= 3 * _SAMPLE:
        return [(0, n)]
    middle = n // 2 - _SAMPLE // 2
    return [(a, a + _SAMPLE) for a in (0, middle, n - _SAMPLE)]


def _hashable(value: Any) -> Any:
    """Arrays in GGUF's metadata, a vocabulary's scores among them, by their bytes."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, hashlib.sha256(value.tobytes()).hexdigest()]
    return value.item() if isinstance(value, np.generic) else list(value)


def equal(a: Array, b: Array, step: int = 1 << 24) -> bool:
    """Are the bytes the same? Compared a piece at a time."""
    x, y = (np.ascontiguousarray(w).reshape(-1).view(np.uint8) for w in (a, b))
    return x.nbytes == y.nbytes and all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, x.nbytes, step))


@dataclass(frozen=True, slots=True)
class Header:
    """What a sink needs to know before any tensor arrives."""

    metadata: Mapping[str, Any]
    """GGUF: typed key-value pairs (see formats/gguf.py); safetensors: config.json."""
    tensors: Mapping[str, Stored]
    """Every tensor that will be written, in file order."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Extra files beside the weights, for directory formats (single-file formats ignore them): tokenizer.json, ..."""
    layout: Layout | None = None
    """How a checkpoint directory holds tensors that are not plain; None: in quantforge's own way."""
    max_shard_size: int | None = None
    """Bytes in each file, where the model becomes several; one tensor may exceed it. None: what the format usually has."""


class Sink(ABC):
    """A model file being written. Tensors may arrive in any order, from several threads.

    Nothing stands at the final name until `commit`; leaving the context without it, or by an
    exception, removes what was written.
    """

    @abstractmethod
    def write(self, name: str, parts: Parts, row: int = 0) -> None:
        """Store a tensor, or its rows from `row` on (axes before the last merged) if its codec is row-local."""

    @abstractmethod
    def commit(self) -> None:
        """Check that every tensor has arrived in full, fsync, and rename to the final name."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written. Harmless after `commit`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one part of a tensor stands: the file (relative to the output), the byte, dtype and shape."""

    file: str
    offset: int
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every byte of an output goes, known before any data."""

    heads: Mapping[str, bytes]
    """The first bytes of each file. A single file is named ""; others stand beside it, or in the output's directory."""
    sizes: Mapping[str, int]
    """Total bytes of each file; what neither head nor slots cover is zero."""
    slots: Mapping[str, Mapping[str, Slot]]
    """Tensor name -> part name -> place."""

    @property
    def nbytes(self) -> int:
        """Total bytes of all files."""
        return sum(self.sizes.values())


class FileSink(Sink):
    """A sink whose parts have fixed places in files, which may be those of a directory; see `NewFiles`. Raises OutputError."""

    def __init__(self, path: Path, tensors: Mapping[str, Stored], placement: Placement, *, directory: bool = False) -> None:
        self._path, self._tensors, self._placement = path.absolute(), tensors, placement
        self._written: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._lock = threading.Lock()
        self._files = NewFiles(path, placement.heads, placement.sizes, directory=directory)

    def write(self, name: str, parts: Parts, row: int = 0) -> None:
        """Store a tensor, or its rows from `row` on; see `Sink.write`. Raises OutputError."""
        try:
            slots, stored = self._placement.slots[name], self._tensors[name]
        except KeyError:
            raise OutputError(self._path, f"tensor {name} is not in the header") from None
        if parts.keys() != slots.keys():
            raise OutputError(self._path, f"tensor {name}: parts {sorted(parts)} given, {sorted(slots)} expected")
        rows = prod(stored.shape[:-1])
        with self._files.writing():
            for part, slot in slots.items():
                data, info = parts[part], slot.info
                at = row * (info.nbytes // rows) if rows else 0
                whole = row == 0 and data.nbytes == info.nbytes
                fits = 0 <= at <= at + data.nbytes <= info.nbytes and not (rows and data.nbytes % max(1, info.nbytes // rows))
                if data.dtype != info.dtype or not (whole or (fits and stored.codec.row_local)):
                    raise OutputError(
                        self._path,
                        f"tensor {name}: {part} of {data.dtype}{list(data.shape)} at row {row} does not fit "
                        f"{info.dtype}{list(info.shape)} of codec {stored.codec.name}",
                    )
                octets = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
                self._files.write(slot.file, octets.data, slot.offset + at)
                with self._lock:
                    self._written.setdefault((name, part), []).append((at, at + data.nbytes))

    def commit(self) -> None:
        """Check that every byte has arrived once, fsync, and rename. Raises OutputError, having removed everything."""
        try:
            self._files.drain()
            self._check_complete()
        except BaseException:
            self.abort()
            raise
        self._files.commit()

    def abort(self) -> None:
        """Remove what was written; see `NewFiles.abort`."""
        self._files.abort()

    def _check_complete(self) -> None:
        for name, slots in self._placement.slots.items():
            for part, slot in slots.items():
                end = 0
                for a, b in sorted(self._written.get((name, part), [])):
                    if a != end:
                        what = "was written twice" if a < end else "never arrived"
                        raise OutputError(self._path, f"tensor {name}: {part} from byte {min(a, end)} on {what}")
                    end = b
                if end != slot.info.nbytes:
                    raise OutputError(self._path, f"tensor {name}: {part} is {slot.info.nbytes} bytes, {end} arrived")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored part stands: the file, the byte, dtype and shape. Checked: it is inside of the file."""

    file: MappedFile
    offset: int
    info: TensorInfo


class MappedSource(Source):
    """A source whose parts stand in mapped files. Subclasses set path, config, weights, `_files` and `_places`."""

    _files: list[MappedFile]
    _places: Mapping[str, Mapping[str, Place]]
    """Tensor -> part -> place. A part without a place is all ones."""

    @property
    def total_bytes(self) -> int:
        """Size on disk of the weight files."""
        return sum(file.size for file in self._files)

    def read(self, name: str) -> Encoded:
        """The stored tensor; its parts are read-only views of the files."""
        stored = self._stored(name)
        parts: Parts = {}
        for part, info in stored.codec.layout(stored.shape).items():
            place = self._places[name].get(part)
            parts[part] = np.ones(info.shape, info.dtype) if place is None else place.file.array(place.offset, info)
        return Encoded(stored.codec, stored.shape, parts)

    def samples(self, name: str) -> Iterator[bytes]:
        """See `Source.samples`: of the bytes in the files."""
        for place in self._places[name].values():
            for a, b in _ends_and_middle(place.info.nbytes):
                yield place.file.bytes[place.offset + a : place.offset + b]

    def release(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        self._stored(name)
        for place in self._places[name].values():
            place.file.release(place.offset, place.info.nbytes)

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files:
            file.close()

    def _stored(self, tensor: str) -> Stored:
        try:
            return self.weights[tensor]
        except KeyError:
            raise FormatError(self.path, f"no tensor named {tensor}{nearest(tensor, self.weights)}") from None


_SHARD = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)", re.DOTALL)


def shard_name(stem: str, no: int, count: int, suffix: str) -> str:
    """The name of file number `no`, from 1, of a set."""
    return f"{stem}-{no:05}-of-{count:05}{suffix}"


def shards(path: Path, count: int | None = None) -> list[Path]:
    """All files of the set that `path` (NAME-00001-of-00003.EXT) belongs to, in order; [path] if it has no such name.

    Raises FormatError if the name says another number of files than `count`, or one is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        if count is not None:
            raise FormatError(path, f"one of {count} split files, but not named like NAME-00001-of-{count:05}{path.suffix}")
        return [path]
    n = int(match["count"])
    if not 1 <= int(match["no"]) <= n or (count is not None and n != count):
        raise FormatError(path, f"the name says file {int(match['no'])} of {n}" + (f", the file {count}" if count else ""))
    files = []
    for i in range(1, n + 1):
        files.append(path.with_name(shard_name(match["stem"], i, n, match["suffix"])))
        if not files[-1].exists():
            raise FormatError(files[-1], f"missing: file {i} of {n}; fetch the whole set")
    return files


class Format(ABC):
    """One way to keep a model in files; a module of this package holds an instance as `FORMAT`."""

    name: str
    """As in --format."""
    suffixes: tuple[str, ...] = ()
    """What the names of its files end with, in lower case: (".gguf",). Empty: an output is a directory."""
    gguf_names: bool = False
    """True: tensors and metadata are called as in GGUF; false: as in a checkpoint, metadata being its config.json."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """True if the file or directory is of this format (a look at names or magic bytes)."""

    @abstractmethod
    def open(self, path: Path) -> Source:
        """Read headers, checking everything. Raises FormatError."""

    def holds(self, codec: Codec) -> bool:
        """True if its files can hold tensors of that codec."""
        return True

    def size(self, header: Header) -> int:
        """Total bytes of what `create` would write for this header. Raises UnsupportedError."""
        raise UnsupportedError(f"{self.name} files are read, not written")

    def paths(self, path: Path, header: Header) -> list[Path]:
        """What `create` would write: `path`, or a set of files beside it, the first one first. Raises UnsupportedError."""
        return [path]

    def create(self, path: Path, header: Header) -> Sink:
        """Begin a new file or directory that will appear at `path` on commit. Raises UnsupportedError, OutputError."""
        raise UnsupportedError(f"{self.name} files are read, not written")

    def warnings(self, header: Header) -> list[str]:
        """What users should know about what would be written for this header."""
        return []

    @property
    def writes(self) -> bool:
        """Can it be written?"""
        return type(self).create is not Format.create


def _check(given: Any) -> Format:
    if not isinstance(given, Format):
        raise UnsupportedError(f"{given!r} is no instance of quantforge.formats.Format")
    return given


_registry: Registry[Format] = Registry(__package__, "format", _check, marker="FORMAT")
register = _registry.register


def names() -> list[str]:
    """Names of all formats."""
    return list(_registry.all())


def get(name: str) -> Format:
    """The format of that name. Raises UnsupportedError naming the known ones."""
    return _registry.get(name)


def by_suffix(suffix: str) -> Format | None:
    """The format whose files end so (".gguf", in any case), or None."""
    return next((f for f in _registry.all().values() if suffix.lower() in f.suffixes), None)


def open_path(path: str | Path, *, weights: bool = True) -> Source:
    """Open a model file or directory of any known format; see `diagnosis` for what a path may stand for. Raises FormatError.

    weights: False takes a directory that has a config.json, and no weights, too.
    """
    path = Path(path)
    try:
        path = located(path)
        mode = path.stat().st_mode
        refuse_adapter(path)
        for known in _registry.all().values():
            if known.recognises(path):
                source = known.open(path)
                try:
                    refuse_unmerged(path, source.weights)
                except FormatError:
                    source.close()
                    raise
                return source
        if not weights and (path / "config.json").is_file():
            return Bare(path)
        if stat.S_ISREG(mode):
            MappedFile(path).close()  # says what is wrong with an empty file or a pointer
        raise name_unknown(path)
    except FileNotFoundError as e:
        raise name_missing(path) or FormatError(path, f"cannot read: {e.strerror or e}") from None
    except RuntimeError as e:  # ~someone, of whom there is no home
        raise FormatError(path, str(e)) from None
    except OSError as e:
        raise FormatError(path, f"cannot read: {e.strerror or e}") from None
