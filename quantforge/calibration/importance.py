"""Importance matrices: mean x² of every input column of every matrix, from llama-imatrix's files.

Read are its GGUF files (`NAME.in_sum2`, `NAME.counts`) and its legacy .dat files; the values are
those that llama-quantize uses. Source: llama.cpp tools/imatrix, tools/quantize.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .. import formats
from ..arrays import F32
from ..errors import CalibrationError, FormatError
from . import overlap
from .overlap import Sketch

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 1 << 10
# Their rows are looked up, not multiplied: an importance of another size belongs to nothing.
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")


class Importance(Mapping[str, F32]):
    """GGUF tensor name -> mean x² of its input columns: f32[in], or f32[experts, in].

    Legacy files do not say where one expert ends; `of` knows from the tensor's shape.
    """

    def __init__(
        self,
        values: Mapping[str, F32],
        chunks: int = 0,
        datasets: tuple[str, ...] = (),
        path: Path = Path("importance"),
        texts: tuple[Sketch, ...] = (),
    ) -> None:
        self._values = dict(values)
        self.chunks = chunks
        """Pieces of text that were seen; 0: unknown."""
        self.datasets = datasets
        """Names of the text files that were seen."""
        self.path = path
        """The file, for messages and metadata."""
        self.texts = texts
        """What is remembered of these texts, if quantforge wrote the file."""

    def __getitem__(self, name: str) -> F32:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def of(self, name: str, shape: tuple[int, ...]) -> F32 | None:
        """Importance of a tensor of `shape`: f32[in] for a matrix, f32[experts, in] for stacked ones; None if there is none.

        Raises CalibrationError if its size is not the tensor's: it was made with another model.
        """
        values = self._values.get(name)
        if values is None:
            return None
        experts, n_in = (shape[0] if len(shape) > 2 else 1), shape[-1]
        if values.size == experts * n_in:
            return values.reshape(experts, n_in) if len(shape) > 2 else values.reshape(n_in)
        if name in _LOOKED_UP:
            return None
        raise CalibrationError(
            f"{name}: importance of {values.size} columns does not fit the tensor's {experts * n_in}; "
            f"{self.path} was made with another model"
        )


def floored(values: F32) -> F32:
    """Importance f32[..., in] whose zeros are a hundredth of what is usual in their row: a column that the text never used
    may be used by another. Where a row has nothing but zeros, all columns count alike."""
    rows = values.reshape(-1, values.shape[-1]).copy()
    for row in rows:
        seen = row[row > 0]
        row[row == 0] = np.median(seen) / 100 if seen.size else 1
    return rows.reshape(values.shape)


def read(path: str | Path) -> Importance:
    """The importance in a GGUF or legacy file.

    Raises FormatError: damaged, not an importance matrix, or values that are negative or not finite.
    """
    path = Path(os.path.expanduser(path))
    try:
        with path.open("rb") as f:
            magic = f.read(4)
            means = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path, magic + f.read())
    except OSError as e:
        raise FormatError(path, f"cannot read the importance matrix: {e.strerror}") from None
    for name, values in means.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FormatError(path, f"importance of {name} has negative or non-finite values; compute it again")
    return means


def _read_gguf(path: Path) -> Importance:
    with formats.get("gguf").open(path) as source:
        arrays: dict[str, F32] = {}
        for name, stored in source.weights.items():
            if name.endswith((_SUMS, _COUNTS)):
                if stored.codec.name != "F32":
                    raise FormatError(path, f"{name} is {stored.codec.name}; an importance matrix is F32")
                arrays[name] = np.array(source.read(name).parts["data"], np.float32)
        names = [n.removesuffix(_SUMS) for n in arrays if n.endswith(_SUMS)]
        for name in arrays:
            stem = name.removesuffix(_SUMS).removesuffix(_COUNTS)
            for part in (_SUMS, _COUNTS):
                if stem + part not in arrays:
                    raise FormatError(path, f"{name} is there, {stem}{part} is not; the file is incomplete")
        if not names:
            raise FormatError(path, "not an importance matrix: it has no tensor *.in_sum2; make one with llama-imatrix")
        values = {n: _means(path, n, arrays[n + _SUMS], arrays[n + _COUNTS]) for n in names}
        chunks, datasets = source.config.get("imatrix.chunk_count", 0), source.config.get("imatrix.datasets", ())
        if not isinstance(chunks, int) or not isinstance(datasets, (list, tuple)):
            raise FormatError(path, "imatrix.chunk_count must be a UINT32 and imatrix.datasets an array of strings")
        return Importance(values, chunks, tuple(str(d) for d in datasets), path, tuple(overlap.remembered(source.config)))


def _means(path: Path, name: str, sums: F32, counts: F32) -> F32:
    """Sums of squares over counts, one count per row (expert); rows that saw nothing count as all ones."""
    rows = sums.reshape(-1, sums.shape[-1]) if sums.ndim else sums.reshape(1, 1)
    if counts.size != len(rows):
        raise FormatError(path, f"{name}{_SUMS} has {len(rows)} rows, {name}{_COUNTS} has {counts.size}")
    if not np.isfinite(counts).all():
        raise FormatError(path, f"{name}{_COUNTS} is not finite")
    n = counts.reshape(-1, 1)
    with np.errstate(over="ignore"):  # found by the caller
        means = np.where(n > 0, rows / np.where(n > 0, n, 1), np.float32(1)).astype(np.float32)
    return means[0] if len(means) == 1 else means


def _read_legacy(path: Path, data: bytes) -> Importance:
    """int32 entries; each: int32 length, name, int32 calls, int32 values, f32 sums. Then int32 chunks, int32 length, dataset."""
    at = 0

    def integer(what: str, least: int, most: int) -> int:
        nonlocal at
        if len(data) - at < 4:
            raise FormatError(path, f"truncated: {what} is missing", at)
        (n,) = struct.unpack_from("<i", data, at)
        if not least <= n <= most:
            raise FormatError(path, f"not an importance matrix, or damaged: {what} is {n}, not {least} to {most}", at)
        at += 4
        return int(n)

    def text(what: str, least: int = 1) -> str:
        nonlocal at
        n = integer(f"the length of {what}", least, min(_MAX_NAME, max(len(data) - at - 4, 0)))
        at += n
        return data[at - n : at].decode("utf-8", "replace")

    values: dict[str, F32] = {}
    for i in range(integer("the number of entries", 1, len(data) // 16)):
        start = at
        name = text(f"the name of entry {i}")
        if name in values:
            raise FormatError(path, f"{name} is there twice", start)
        calls = integer(f"the number of calls of {name}", -(2**31), 2**31 - 1)
        n = integer(f"the number of values of {name}", 1, max((len(data) - at - 4) // 4, 0))
        sums = np.frombuffer(data, "<f4", n, at).astype(np.float32)
        at += 4 * n
        values[name] = sums / np.float32(calls) if calls > 0 else sums
    chunks, datasets = 0, tuple[str, ...]()
    if at < len(data):  # the earliest files end here
        chunks = integer("the number of chunks", 0, 2**31 - 1)
        datasets = (text("the name of the dataset", 0),)
    return Importance(values, chunks, datasets, path)
