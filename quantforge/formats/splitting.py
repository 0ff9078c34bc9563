"""A GGUF file cut into a set of files, and a set put together: tensors' bytes are copied, metadata kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..arrays import TensorInfo
from ..errors import OutputError, RecipeError
from . import gguf
from .base import Placement
from .files import NewFiles

_AT_ONCE = 1 << 24
"""Bytes that are copied together."""


def split(path: str | Path, out: str | Path, max_size: int, *, force: bool = False) -> list[Path]:
    """Cut a GGUF file, or set, into files OUT-00001-of-0000N.gguf of at most `max_size` bytes; one tensor may exceed it.

    Metadata stand in the first one. force: overwrite. Returns the files. Raises FormatError, UnsupportedError, OutputError.
    """
    with gguf.GgufSource(Path(path)) as source:
        out = Path(out)
        stem = out.name.removesuffix(".gguf")
        return _copy(source, out, gguf.split(source.config, _entries(source), max_size, stem), force)


def merge(path: str | Path, out: str | Path, *, force: bool = False) -> list[Path]:
    """Put the files of a set, of which `path` is one, together at `out`: the file that they were cut from.

    force: overwrite. Returns [out]. Raises FormatError (a file is missing), RecipeError (`path` is no part of a set),
    OutputError.
    """
    with gguf.GgufSource(Path(path)) as source:
        if source.files is None:
            raise RecipeError(f"{path}: a whole file, not one of a set NAME-00001-of-0000N.gguf; there is nothing to merge")
        return _copy(source, Path(out), gguf.whole(source.config, _entries(source)), force)


def _entries(source: gguf.GgufSource) -> list[gguf.Entry]:
    entries = []
    for name, (stored, place) in source.held.items():
        kind = stored.codec.ggml_type
        assert kind is not None, name
        entries.append(gguf.Entry(name, kind, stored.shape, name, "data", place.info))
    return entries


def _copy(source: gguf.GgufSource, out: Path, placement: Placement, force: bool) -> list[Path]:
    """Write what is placed. Raises OutputError."""
    paths = [out.with_name(name) if name else out for name in placement.heads]
    own = {place.file.path.resolve() for _, place in source.held.values()}
    for p in paths:
        if p.exists() and (not force or p.resolve() in own):
            raise OutputError(p, "is being read; choose another name" if force else "exists already; --force overwrites it")
    files = NewFiles(out, placement.heads, placement.sizes)
    try:
        with files.writing():
            for name, (_, place) in source.held.items():
                slot = placement.slots[name]["data"]
                for a in range(0, slot.info.nbytes, _AT_ONCE):
                    n = min(_AT_ONCE, slot.info.nbytes - a)
                    octets = place.file.array(place.offset + a, TensorInfo(np.dtype(np.uint8), (n,)))
                    files.write(slot.file, octets.data, slot.offset + a)
                    place.file.release(place.offset + a, n)
        files.commit()
    finally:
        files.abort()
    return paths
