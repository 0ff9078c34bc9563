"""What a format is: it moves `Encoded` between files and memory, knowing neither models nor methods."""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from typing_extensions import Self

from ..arrays import Array, Parts, TensorInfo
from ..codecs import Codec, Encoded
from ..discovery import modules
from ..errors import FormatError, OutputError, UnsupportedError, nearest
from ..layouts import Layout


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

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Size on disk of the weight files."""

    @abstractmethod
    def read(self, name: str) -> Encoded:
        """The stored tensor; parts are views of a memory map where the format allows."""

    def release(self, name: str) -> None:  # noqa: B027 - optional to override
        """Tell the system that this tensor's pages are not needed any more."""

    def close(self) -> None:  # noqa: B027 - optional to override
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


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
    max_shard_size: int = 5_000_000_000
    """Bytes of tensors in each file of a checkpoint directory; one tensor may exceed it."""


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
    """The first bytes of each file. A single-file format has one file, named ""."""
    sizes: Mapping[str, int]
    """Total bytes of each file; what neither head nor slots cover is zero."""
    slots: Mapping[str, Mapping[str, Slot]]
    """Tensor name -> part name -> place."""

    @property
    def nbytes(self) -> int:
        """Total bytes of all files."""
        return sum(self.sizes.values())


class FileSink(Sink):
    """A sink whose parts have fixed places in one file, or in the files of a directory.

    Writes to a temporary file or directory beside `path`; `commit` flushes it to disk and renames
    it, replacing what stands at `path`. An existing directory is replaced only if it holds nothing
    but files and one of them is a .safetensors file.  Raises OutputError.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Stored], placement: Placement, *, directory: bool = False) -> None:
        self._path = path.absolute()  # a later chdir must not move the output
        self._tensors, self._placement, self._directory = tensors, placement, directory
        self._written: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._idle = threading.Condition()
        self._busy = 0
        self._closed = False
        self._fds: dict[str, int] = {}
        parent = self._path.parent
        self._temporary = parent / f".quantforge-{secrets.token_hex(6)}.tmp"
        self._check_target()
        try:
            space = os.statvfs(parent)
            if space.f_blocks and space.f_bavail * space.f_frsize < placement.nbytes:
                raise OutputError(
                    path, f"the result takes {placement.nbytes} bytes and only {space.f_bavail * space.f_frsize} are free there"
                )
            if directory:
                self._temporary.mkdir()
            for name, head in placement.heads.items():
                target = self._temporary / name if directory else self._temporary
                fd = self._fds[name] = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                os.ftruncate(fd, placement.sizes[name])
                _pwrite(fd, memoryview(head), 0)
        except OSError as e:
            self.abort()
            raise self._cannot_write(e) from None
        except BaseException:
            self.abort()
            raise

    def take(self, file: Path) -> None:
        """Move a finished file into a directory that is being written."""
        try:
            os.rename(file, self._temporary / file.name)
            self._fds[file.name] = os.open(self._temporary / file.name, os.O_RDWR)
        except OSError as e:
            raise self._cannot_write(e) from None

    def write(self, name: str, parts: Parts, row: int = 0) -> None:
        """Store a tensor, or its rows from `row` on; see `Sink.write`. Raises OutputError."""
        try:
            slots, stored = self._placement.slots[name], self._tensors[name]
        except KeyError:
            raise OutputError(self._path, f"tensor {name} is not in the header") from None
        if parts.keys() != slots.keys():
            raise OutputError(self._path, f"tensor {name}: parts {sorted(parts)} given, {sorted(slots)} expected")
        rows = int(np.prod(stored.shape[:-1], dtype=object))
        with self._writing():
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
                try:
                    _pwrite(self._fds[slot.file], octets.data, slot.offset + at)
                except OSError as e:
                    raise self._cannot_write(e) from None
                with self._idle:
                    self._written.setdefault((name, part), []).append((at, at + data.nbytes))

    def commit(self) -> None:
        """Check that every byte has arrived once, fsync, and rename. Raises OutputError, having removed everything."""
        try:
            self._drain()
            self._check_complete()
            for fd in self._fds.values():
                os.fsync(fd)
            self._close()
            if self._directory:
                _fsync_directory(self._temporary)
                self._replace_directory()
            else:
                os.replace(self._temporary, self._path)
        except OSError as e:
            self.abort()
            raise self._cannot_write(e) from None
        except BaseException:
            self.abort()
            raise
        with suppress(OSError):  # the file is whole and in place; not every directory can be opened or synced
            _fsync_directory(self._path.parent)

    def abort(self) -> None:
        """Wait for writes under way, then remove what was written. Harmless after `commit`."""
        self._drain()
        self._close()
        with suppress(OSError):
            if self._directory:
                shutil.rmtree(self._temporary)
            else:
                self._temporary.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise OutputError(self._path, "written to after commit or abort")
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _drain(self) -> None:
        # a file descriptor closed under a writer could by then belong to another file
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._busy)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

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

    def _check_target(self) -> None:
        try:
            mode = self._path.stat().st_mode
        except FileNotFoundError:
            if not self._path.parent.is_dir():
                raise OutputError(self._path, f"the directory {self._path.parent} does not exist") from None
            return
        except OSError as e:
            raise self._cannot_write(e) from None
        if not self._directory and not stat.S_ISREG(mode):
            raise OutputError(self._path, "exists and is not a regular file; choose another name")
        if self._directory:
            if not stat.S_ISDIR(mode):
                raise OutputError(self._path, "exists and is not a directory; choose another name")
            inside = list(self._path.iterdir())
            if any(p.is_dir() for p in inside) or (inside and not any(p.suffix == ".safetensors" for p in inside)):
                raise OutputError(
                    self._path, "exists and is not a plain checkpoint directory; it is not replaced, choose another name"
                )

    def _replace_directory(self) -> None:
        old = self._temporary.with_suffix(".old")
        replacing = self._path.exists()
        if replacing:
            os.rename(self._path, old)
        try:
            os.rename(self._temporary, self._path)
        except BaseException:
            if replacing:
                os.rename(old, self._path)
            raise
        if replacing:
            shutil.rmtree(old, ignore_errors=True)

    def _cannot_write(self, e: OSError) -> OutputError:
        return OutputError(self._path, f"cannot write: {e.strerror or e}")


def adopt(directory: Path, path: Path) -> None:
    """Put the files of a finished directory on `path`'s file system in place as a sink would. Raises OutputError."""
    with FileSink(path, {}, Placement({}, {}, {}), directory=True) as sink:
        for file in sorted(directory.iterdir()):
            if file.is_file():
                sink.take(file)
        sink.commit()


def _pwrite(fd: int, data: memoryview, at: int) -> None:
    while data:
        n = os.pwrite(fd, data, at)  # writes at most 2 GiB
        data, at = data[n:], at + n


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without directory sync
            raise
    finally:
        os.close(fd)


class MappedFile:
    """A regular file in memory, read-only. Raises FormatError for what cannot be one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # before open: opening a pipe would wait for a writer
                raise FormatError(path, "not a regular file")
            with path.open("rb") as f:
                self.size = os.fstat(f.fileno()).st_size
                if not self.size:
                    raise FormatError(path, "the file is empty", 0)
                self.bytes = mmap.mmap(f.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as e:
            raise FormatError(path, f"cannot read: {e.strerror or e}") from None
        if self.bytes[: len(_LFS)] == _LFS:
            raise FormatError(path, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", 0)

    def array(self, offset: int, info: TensorInfo) -> Array:
        """A read-only view of checked bytes; a copy only where they are not aligned for the dtype."""
        if not info.nbytes:
            return np.empty(info.shape, info.dtype)
        # np.ndarray(buffer=...) would not keep the map alive, a memoryview does
        octets = np.frombuffer(memoryview(self.bytes), np.uint8, info.nbytes, offset)
        view: Array = octets.view(info.dtype).reshape(info.shape)
        return view if view.flags.aligned else view.copy()

    def release(self, offset: int, nbytes: int) -> None:
        """Let the system drop these pages from this process; a later read brings them back."""
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = offset - offset % mmap.PAGESIZE
            self.bytes.madvise(mmap.MADV_DONTNEED, start, offset + nbytes - start)

    def close(self) -> None:
        """Unmap; where arrays still view the file, that happens when the last one is gone."""
        with suppress(BufferError):
            self.bytes.close()


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


_LFS = b"version https://git-lfs"
_SHARD = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)", re.DOTALL)


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
        files.append(path.with_name(f"{match['stem']}-{i:05}-of-{n:05}{match['suffix']}"))
        if not files[-1].exists():
            raise FormatError(files[-1], f"missing: file {i} of {n}; fetch the whole set")
    return files


class Format(Protocol):
    """A module of this package: `name`, `recognises`, `open` and, if it can be written, `create`."""

    name: str

    def recognises(self, path: Path) -> bool:
        """True if the file or directory is of this format (a look at names or magic bytes)."""

    def open(self, path: Path) -> Source:
        """Read headers, checking everything. Raises FormatError."""

    def size(self, header: Header) -> int:
        """Total bytes of what `create` would write for this header."""

    def create(self, path: Path, header: Header) -> Sink:
        """Begin a new file or directory that will appear at `path` on commit."""


def get(name: str) -> Format:
    """The format module of that name."""
    known: dict[str, Any] = {module.name: module for module in modules(__package__)}
    if name not in known:
        raise UnsupportedError(f"unknown format {name}; known: {', '.join(known)}")
    return known[name]  # type: ignore[no-any-return]


def open_path(path: str | Path) -> Source:
    """Open a model file or directory of any known format. Raises FormatError."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        for module in modules(__package__):
            if module.recognises(path):
                return module.open(path)  # type: ignore[no-any-return]
        if stat.S_ISREG(mode):
            MappedFile(path).close()  # says what is wrong with an empty file or a pointer
            if path.suffix in _PICKLED:
                raise FormatError(path, _PICKLED_ADVICE)
        elif stat.S_ISDIR(mode):
            inside = sorted(p.name for p in path.iterdir())
            if ggufs := [n for n in inside if n.endswith(".gguf")]:
                raise FormatError(path, f"a directory of GGUF files; give one of them: {', '.join(ggufs[:5])}")
            if any(Path(n).suffix in _PICKLED for n in inside):
                raise FormatError(path, _PICKLED_ADVICE)
            if "config.json" in inside:
                raise FormatError(path, "has a config.json but no *.safetensors; fetch the weights too")
    except OSError as e:
        raise FormatError(path, f"cannot read: {e.strerror or e}") from None
    raise FormatError(
        path,
        "not a model that quantforge knows: give a directory with config.json and *.safetensors, a .safetensors or a .gguf file",
    )


_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_PICKLED_ADVICE = (
    "pickled PyTorch checkpoints are not loaded, because unpickling runs code from the file; convert with transformers "
    "from a source you trust: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)
