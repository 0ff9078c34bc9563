"""What a format is: it moves `Encoded` between files and memory, knowing neither models nor methods."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from typing_extensions import Self

from ..arrays import Parts
from ..codecs import Codec, Encoded
from ..errors import FormatError, UnsupportedError


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
    """Extra files beside the weights, for directory formats: tokenizer.json, ..."""


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


def _modules() -> list[Any]:
    package = importlib.import_module(__package__)
    found = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base"]
    return [importlib.import_module(f"{__package__}.{name}") for name in found]


def get(name: str) -> Format:
    """The format module of that name."""
    for module in _modules():
        if module.name == name:
            return module  # type: ignore[no-any-return]
    raise UnsupportedError(f"unknown format {name}; known: {', '.join(m.name for m in _modules())}")


def open_path(path: str | Path) -> Source:
    """Open a model file or directory of any known format. Raises FormatError."""
    path = Path(path)
    if not path.exists():
        raise FormatError(path, "no such file or directory")
    for module in _modules():
        if module.recognises(path):
            return module.open(path)  # type: ignore[no-any-return]
    raise FormatError(
        path,
        "not a model that quantforge knows: give a directory with config.json and *.safetensors, a .safetensors or a .gguf file",
    )
