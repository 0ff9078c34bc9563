"""GGUF files: versions 2 and 3 are read, split files as one; version 3 is written.

Metadata values keep their exact type both ways, by this convention:

    UINT32, FLOAT32, BOOL, STRING       int, float, bool, str (bytes that are not UTF-8: surrogateescape)
    other scalars                       NumPy scalars of that dtype: np.int32(5), np.uint64(7)
    arrays of numbers or bools          1-D NumPy arrays of that dtype
    arrays of strings, of arrays        lists

For writing, a Python int outside of UINT32 becomes INT32, INT64 or UINT64, whichever is the first
to hold it; a list of ints becomes an array of the first of INT32, UINT32, INT64, UINT64 to hold
all, a list of floats FLOAT32, an empty list an array of strings.

Tensor shapes are in NumPy's order, [..., out, in]: GGUF's dimensions reversed. A codec's part `data`
is the tensor; further parts are sibling tensors, `blk.0.ffn_up.scale` beside `blk.0.ffn_up.weight`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from .. import codecs
from ..archs import from_gguf
from ..archs.rope import ROPE_FACTORS
from ..arrays import SAFETENSORS_DTYPES, Array, TensorInfo
from ..codecs import Codec
from ..errors import FormatError, ShapeError, UnsupportedError
from .base import FileSink, Format, Header, MappedSource, Place, Placement, Sink, Slot, Source, Stored, shard_name, shards
from .files import MappedFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say otherwise
_MAX_ALIGNMENT = 1 << 21
# Limits of the reader, generous multiples of the largest known files' figures.
_MAX_HEADER = 1 << 28  # bytes before the tensor data
_MAX_STRING = 1 << 26  # bytes
_MAX_NAME = (1 << 16) - 1  # bytes of a key or a tensor's name
_MAX_ELEMENTS = 1 << 23  # array elements of all metadata
_ARRAY_COST = 64  # an array within an array counts as so many elements: that is its memory
_MAX_DEPTH = 4  # arrays within arrays
_MAX_DIMS = 4
_MOST_FILES = (1 << 16) - 1  # of a set: split.count is u16
_GGML_NAME = 63  # bytes of a tensor's name that ggml stores; longer ones it refuses

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_T = gguf.GGUFValueType
_DTYPES: dict[int, np.dtype[Any]] = {
    _T.UINT8: np.dtype("<u1"),
    _T.INT8: np.dtype("<i1"),
    _T.UINT16: np.dtype("<u2"),
    _T.INT16: np.dtype("<i2"),
    _T.UINT32: np.dtype("<u4"),
    _T.INT32: np.dtype("<i4"),
    _T.FLOAT32: np.dtype("<f4"),
    _T.BOOL: np.dtype(np.bool_),
    _T.UINT64: np.dtype("<u8"),
    _T.INT64: np.dtype("<i8"),
    _T.FLOAT64: np.dtype("<f8"),
}
_DTYPES = {int(k): v for k, v in _DTYPES.items()}
_TYPES = {v: k for k, v in _DTYPES.items()}
_STRING, _ARRAY = int(_T.STRING), int(_T.ARRAY)
_NATIVE = frozenset((int(_T.UINT32), int(_T.FLOAT32), int(_T.BOOL)))  # read as Python int, float, bool
_MIN_BYTES = {**{k: v.itemsize for k, v in _DTYPES.items()}, _STRING: 8, _ARRAY: 12}
_INTEGER_RANGES = [(np.dtype(d), int(np.iinfo(d).min), int(np.iinfo(d).max)) for d in (np.int32, np.uint32, np.int64, np.uint64)]


# ---- reading


class _Cursor:
    """Checked reads from the header of a file."""

    def __init__(self, file: MappedFile) -> None:
        self.path, self.bytes, self.pos = file.path, file.bytes, 0
        self.size, self.end = file.size, min(file.size, _MAX_HEADER)
        self.elements = 0

    def fail(self, message: str, offset: int | None = None) -> NoReturn:
        raise FormatError(self.path, message, self.pos if offset is None else offset)

    def take(self, n: int, what: str) -> int:
        """Advance over n bytes; returns where they begin."""
        at = self.pos
        if n > self.end - at:
            if n <= self.size - at:
                self.fail(f"the header goes on beyond {_MAX_HEADER} bytes")
            self.fail(f"truncated: {what} takes {n} bytes, {self.size - at} are left")
        self.pos = at + n
        return at

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.bytes, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.bytes, self.take(8, what))[0])

    def count(self, what: str, least: int) -> int:
        """A number of items of at least `least` bytes each."""
        n = self.u64(f"the number of {what}")
        if n * least > self.size - self.pos:
            self.fail(f"{n} {what} cannot fit into the {self.size - self.pos} bytes left", self.pos - 8)
        return n

    def name(self, what: str) -> str:
        n = self.u64(f"the length of {what}")
        if not 0 < n <= _MAX_NAME:
            self.fail(f"{what} of {n} bytes; 1 to {_MAX_NAME} are allowed", self.pos - 8)
        at = self.take(n, what)
        try:
            text = self.bytes[at : self.pos].decode()
        except UnicodeDecodeError as e:
            self.fail(f"{what} is not UTF-8", at + e.start)
        if "\0" in text:
            self.fail(f"{what} has a NUL character", at)
        return text

    def strings(self, n: int) -> list[str]:
        # the loop of a vocabulary of 256k: everything local, one test per string
        data, unpack, pos, end = self.bytes, _U64.unpack_from, self.pos, self.end
        texts = []
        for _ in range(n):
            start = pos + 8
            if start > end:
                break
            size = unpack(data, pos)[0]
            if size > _MAX_STRING or size > end - start:
                break
            pos = start + size
            texts.append(str(data[start:pos], "utf-8", "surrogateescape"))
        self.pos = pos
        if len(texts) < n:
            size = self.u64("the length of a string")
            if size > _MAX_STRING:
                self.fail(f"a string of {size} bytes; the limit is {_MAX_STRING}", pos)
            self.take(size, "a string")
        return texts

    def numbers(self, kind: int, n: int) -> Array:
        dtype = _DTYPES[kind]
        at = self.take(n * dtype.itemsize, f"{n} values of type {_T(kind).name}")
        if dtype == np.bool_:
            octets = np.frombuffer(self.bytes, np.uint8, n, at)
            if n and octets.max() > 1:
                self.fail("a bool is neither 0 nor 1", at + int(np.argmax(octets > 1)))
        return np.frombuffer(self.bytes, dtype, n, at).copy()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _DTYPES:
            scalar = self.numbers(kind, 1)[0]
            return scalar.item() if kind in _NATIVE else scalar
        if kind == _STRING:
            return self.strings(1)[0]
        if kind != _ARRAY:
            self.fail(f"unknown value type {kind}", self.pos - 4)
        if depth == _MAX_DEPTH:
            self.fail(f"arrays nested more than {_MAX_DEPTH} deep")
        item = self.u32("an array's type")
        if item not in _MIN_BYTES:
            self.fail(f"unknown value type {item} of an array", self.pos - 4)
        n = self.count("array elements", _MIN_BYTES[item])
        self.elements += n * _ARRAY_COST if item == _ARRAY else n
        if self.elements > _MAX_ELEMENTS:
            self.fail(f"more than {_MAX_ELEMENTS} array elements in the metadata", self.pos - 8)
        if item in _DTYPES:
            return self.numbers(item, n)
        return self.strings(n) if item == _STRING else [self.value(_ARRAY, depth + 1) for _ in range(n)]


@cache
def _plain(dtype: np.dtype[Any]) -> Codec | None:
    """The codec of a GGUF tensor that holds an array of `dtype`."""
    dtype_name = next((n for n, d in SAFETENSORS_DTYPES.items() if d == dtype), None)
    codec = codecs.get(dtype_name) if dtype_name in codecs.names() else None
    return codec if codec is not None and codec.ggml_type is not None else None


def _sibling(tensor: str, part: str) -> str:
    return f"{tensor.removesuffix('.weight')}.{part}"


def _padded(n: int, alignment: int) -> int:
    return n + -n % alignment


def _check_alignment(value: object) -> int | None:
    """The alignment, or None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, np.uint32)):
        return None
    n = int(value)
    return n if 8 <= n <= _MAX_ALIGNMENT and not n & (n - 1) else None


def _read_header(file: MappedFile) -> tuple[dict[str, Any], dict[str, tuple[Stored, Place]]]:
    """Metadata and tensors of one file, everything checked."""
    c = _Cursor(file)
    if file.bytes[:4] != _MAGIC:
        c.fail(f"not a GGUF file: it begins with {file.bytes[:4]!r}", 0)
    c.take(4, "the magic")
    version = c.u32("the version")
    if version not in _VERSIONS:
        if int.from_bytes(_U32.pack(version), "big") in (1, *_VERSIONS):
            c.fail("a big-endian GGUF file; only little-endian ones are read", 4)
        c.fail(f"GGUF version {version}; versions {' and '.join(map(str, _VERSIONS))} are read", 4)
    n_tensors = c.count("tensors", 8 + 1 + 4 + 8 + 4 + 8)
    n_metadata = c.count("metadata pairs", 8 + 1 + 4 + 1)
    metadata: dict[str, Any] = {}
    alignment = _ALIGNMENT
    for _ in range(n_metadata):
        at = c.pos
        key = c.name("a metadata key")
        if key in metadata:
            c.fail(f"metadata key {key} appears twice", at)
        kind = c.u32(f"the type of {key}")
        metadata[key] = c.value(kind)
        if key == "general.alignment":
            stated = _check_alignment(metadata[key])
            if stated is None:
                c.fail(f"general.alignment is {metadata[key]}; it must be a power of two, UINT32, 8 to {_MAX_ALIGNMENT}", at)
            alignment = stated

    infos = [_read_info(c, alignment) for _ in range(n_tensors)]
    seen: set[str] = set()
    for tensor, at, _, _ in infos:
        if tensor in seen:
            c.fail(f"tensor {tensor} appears twice", at)
        seen.add(tensor)
    data = _padded(c.pos, alignment)
    tensors: dict[str, tuple[Stored, Place]] = {}
    end, before = data, ""
    for tensor, at, relative, stored in sorted(infos, key=lambda info: info[2]):
        offset = data + relative
        if offset < end:
            c.fail(f"tensor {tensor} begins at byte {offset}, within tensor {before}", at)
        info = stored.codec.layout(stored.shape)["data"]
        end, before = offset + info.nbytes, tensor
        if end > file.size:
            c.fail(f"truncated or damaged: tensor {tensor} ends at byte {end}, the file at {file.size}", at)
        tensors[tensor] = (stored, Place(file, offset, info))
    return metadata, tensors


def _read_info(c: _Cursor, alignment: int) -> tuple[str, int, int, Stored]:
    """Name, where that was read, offset from the start of the data, codec and shape of the next tensor."""
    at = c.pos
    tensor = c.name("a tensor's name")
    n_dims = c.u32(f"the number of dimensions of {tensor}")
    if not 1 <= n_dims <= _MAX_DIMS:
        c.fail(f"tensor {tensor} has {n_dims} dimensions; 1 to {_MAX_DIMS} are allowed", c.pos - 4)
    dims = [c.u64(f"the dimensions of {tensor}") for _ in range(n_dims)]
    if 0 in dims:
        c.fail(f"tensor {tensor} has a dimension of 0", c.pos - 8 * n_dims)
    kind = c.u32(f"the type of {tensor}")
    codec = codecs.by_ggml_type(kind)
    if codec is None:
        known = {int(t): t.name for t in gguf.GGMLQuantizationType}
        if kind in known:
            c.fail(f"tensor {tensor} is of type {known[kind]}, which quantforge does not read", c.pos - 4)
        c.fail(f"tensor {tensor} is of unknown type {kind}", c.pos - 4)
    offset = c.u64(f"the offset of {tensor}")
    if offset % alignment:
        c.fail(f"tensor {tensor} is at offset {offset}, which is not a multiple of the alignment {alignment}", c.pos - 8)
    stored = Stored(codec, tuple(reversed(dims)))
    try:
        n = codec.layout(stored.shape)["data"].nbytes
    except ShapeError as e:
        c.fail(f"tensor {tensor}: {e}", at)
    if n > c.size:
        c.fail(f"truncated or damaged: tensor {tensor} takes {n} bytes, the whole file has {c.size}", at)
    return tensor, at, offset, stored


class GgufSource(MappedSource):
    """A GGUF file, or a set of split files, mapped into memory."""

    format = "gguf"
    gguf_names = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [MappedFile(path)]
        first, tensors = _read_header(self._files[0])
        count = _split_field(path, first, "count")
        if count is not None and count > 1:
            first, tensors = self._open_splits(shards(path, count))
        self.config = {k: v for k, v in first.items() if not k.startswith("split.")}
        self.files = count
        """How many files the model says it consists of; None: it says nothing."""
        self.held = tensors
        """The tensors as the files have them: a codec's further parts are tensors of their own."""
        self._places = _gather(tensors)
        self.weights = {k: tensors[k][0] for k in self._places}

    def checkpoint_config(self) -> dict[str, Any]:
        """config.json rebuilt from the metadata, and the tensors of rope factors."""
        factors = {name: self.read(name).decode().reshape(-1) for name in ROPE_FACTORS if name in self.weights}
        return from_gguf.config(self.config, {k: s.shape for k, s in self.weights.items()}, self.path, factors)

    def _open_splits(self, paths: list[Path]) -> tuple[dict[str, Any], dict[str, tuple[Stored, Place]]]:
        self._files = [MappedFile(p) for p in paths]
        config: dict[str, Any] = {}
        tensors: dict[str, tuple[Stored, Place]] = {}
        total = None
        for i, file in enumerate(self._files):
            metadata, here = _read_header(file)
            if _split_field(file.path, metadata, "no") != i or _split_field(file.path, metadata, "count") != len(paths):
                raise FormatError(file.path, f"not file {i + 1} of {len(paths)}: its split.no or split.count says otherwise")
            for tensor, place in here.items():
                if tensor in tensors:
                    raise FormatError(
                        file.path, f"tensor {tensor} is also in {tensors[tensor][1].file.path.name}", place[1].offset
                    )
                tensors[tensor] = place
            config = metadata if i == 0 else config
            total = _split_field(file.path, metadata, "tensors.count") if i == 0 else total
        if total is not None and total != len(tensors):
            raise FormatError(paths[0], f"split.tensors.count is {total}, the {len(paths)} files have {len(tensors)} tensors")
        return config, tensors


def _split_field(path: Path, metadata: Mapping[str, Any], field: str) -> int | None:
    value = metadata.get(f"split.{field}")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise FormatError(path, f"split.{field} is {value!r}, not an integer")
    return int(value)


def _gather(tensors: Mapping[str, tuple[Stored, Place]]) -> dict[str, dict[str, Place]]:
    """Tensor -> part -> place. Siblings that are parts are not tensors of their own; where one is missing
    it is all ones: writers leave out scales of 1."""
    places = {k: {"data": place} for k, (_, place) in tensors.items()}
    for tensor, (stored, _) in tensors.items():
        for part, info in stored.codec.layout(stored.shape).items():
            sibling = _sibling(tensor, part)
            if part == "data" or sibling not in tensors:
                continue
            sibling_info, place = tensors[sibling]
            if sibling_info.codec is not _plain(info.dtype) or place.info.nbytes != info.nbytes:
                raise FormatError(
                    place.file.path,
                    f"tensor {sibling} is {sibling_info.codec.name}{list(sibling_info.shape)}; "
                    f"{tensor} ({stored.codec.name}) needs {info.dtype}{list(info.shape)}",
                    place.offset,
                )
            places[tensor][part] = place
            del places[sibling]
    return places


# ---- writing


def _string(text: str, key: str) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UnsupportedError(f"metadata {key}: {text[:40]!r} has a surrogate that UTF-8 cannot hold") from None
    return _U64.pack(len(data)) + data


def _integer_dtype(values: list[int], key: str, choices: list[int]) -> np.dtype[Any]:
    for i in choices:
        dtype, low, high = _INTEGER_RANGES[i]
        if low <= min(values) and max(values) <= high:
            return dtype
    raise UnsupportedError(f"metadata {key}: {values[0]} does not fit into 64 bits")


def _array(value: Array | list[Any] | tuple[Any, ...], key: str) -> bytes:
    """Type, count and elements of an array."""
    if not isinstance(value, np.ndarray):
        kinds = {bool if isinstance(v, np.bool_) else type(v) for v in value}
        if all(isinstance(v, str) for v in value):
            return _U32.pack(_STRING) + _U64.pack(len(value)) + b"".join(_string(v, key) for v in value)
        if all(isinstance(v, (list, tuple, np.ndarray)) for v in value):
            return _U32.pack(_ARRAY) + _U64.pack(len(value)) + b"".join(_array(v, key) for v in value)
        if kinds == {int}:
            value = np.array(value, _integer_dtype(list(value), key, [0, 1, 2, 3]))
        elif kinds <= {int, float}:
            value = _floats(value, key)
        elif len(kinds) == 1 and isinstance(value[0], (np.generic, bool)):
            value = np.array(value)
        else:
            raise UnsupportedError(f"metadata {key}: a list of {' and '.join(sorted(k.__name__ for k in kinds))}; give one type")
    kind = _TYPES.get(value.dtype.newbyteorder("<"))
    if kind is None or value.ndim != 1:
        raise UnsupportedError(f"metadata {key}: GGUF has no arrays of {value.dtype}{list(value.shape)}")
    return _U32.pack(kind) + _U64.pack(len(value)) + value.astype(_DTYPES[kind]).tobytes()


def _floats(values: Any, key: str) -> Array:
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    if (np.isinf(rounded) & np.isfinite(exact)).any():
        raise UnsupportedError(f"metadata {key}: too large for FLOAT32; give np.float64")
    return rounded


def _value(value: Any, key: str) -> bytes:
    """Type and bytes of a metadata value, by the convention above."""
    if isinstance(value, str):
        return _U32.pack(_STRING) + _string(value, key)
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return _U32.pack(_ARRAY) + _array(value, key)
    if isinstance(value, bool):
        scalar = np.array(value)
    elif isinstance(value, (np.generic, np.ndarray)):
        scalar = np.asarray(value)
    elif isinstance(value, int):
        scalar = np.array(value, _integer_dtype([value], key, [1, 0, 2, 3]))
    elif isinstance(value, float):
        scalar = _floats(value, key)
    else:
        raise UnsupportedError(f"metadata {key}: GGUF cannot hold a {type(value).__name__}")
    kind = _TYPES.get(scalar.dtype.newbyteorder("<"))
    if kind is None:
        raise UnsupportedError(f"metadata {key}: GGUF has no type for {scalar.dtype}")
    return _U32.pack(kind) + scalar.astype(_DTYPES[kind]).tobytes()


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the file has it: a part of one that is written."""

    name: str
    kind: int
    """Its ggml type."""
    shape: tuple[int, ...]
    tensor: str
    part: str
    info: TensorInfo


def _entries(tensors: Mapping[str, Stored]) -> list[Entry]:
    """What tensors are in a file, parts beside them. Raises UnsupportedError for what GGUF cannot hold."""
    entries: dict[str, Entry] = {}
    for tensor, stored in tensors.items():
        if stored.codec.ggml_type is None:
            raise UnsupportedError(f"tensor {tensor}: GGUF files cannot hold {stored.codec.name}; choose a ggml type")
        for part, info in stored.codec.layout(stored.shape).items():
            own, kind, shape = tensor, stored.codec.ggml_type, stored.shape
            if part != "data":
                plain = _plain(info.dtype)
                if plain is None or plain.ggml_type is None:
                    raise UnsupportedError(f"tensor {tensor}: GGUF has no type for {stored.codec.name}'s {part} ({info.dtype})")
                own, kind, shape = _sibling(tensor, part), plain.ggml_type, info.shape
            if own in entries or (part != "data" and own in tensors):
                raise UnsupportedError(f"tensor {own} is both a tensor and {stored.codec.name}'s {part} of {tensor}")
            entries[own] = Entry(own, kind, shape, tensor, part, info)
    return list(entries.values())


def whole(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> Placement:
    """Where everything stands in one file. Raises UnsupportedError."""
    head, size, starts = _file(metadata, entries)
    return Placement({"": head}, {"": size}, _slots({"": (entries, starts)}))


def split(metadata: Mapping[str, Any], entries: Sequence[Entry], limit: int, stem: str) -> Placement:
    """Where everything stands in files STEM-00001-of-0000N.gguf of at most `limit` bytes; one tensor may exceed it.

    Raises UnsupportedError.
    """
    fields: Mapping[str, Any] = {**metadata, **_split_fields(0, 0, 0)}
    groups: list[list[Entry]] = [[]]
    head, data = len(_file(fields, [])[0]), 0
    for e in entries:
        alignment = _alignment(fields)
        more, n = len(_info(e.name, e.shape, e.kind, 0)), _padded(e.info.nbytes, alignment)
        if groups[-1] and _padded(head + more, alignment) + data + n > limit:
            groups.append([])
            fields = _split_fields(0, 0, 0)
            head, data, n = len(_file(fields, [])[0]), 0, _padded(e.info.nbytes, _alignment(fields))
        groups[-1].append(e)
        head, data = head + more, data + n
    if len(groups) > _MOST_FILES:
        raise UnsupportedError(f"{len(groups)} files of at most {limit} bytes; {_MOST_FILES} are possible: choose a larger size")
    heads, sizes, files = {}, {}, {}
    for i, group in enumerate(groups):
        fields = _split_fields(i, len(groups), len(entries))
        name = shard_name(stem, i + 1, len(groups), ".gguf")
        heads[name], sizes[name], starts = _file({**metadata, **fields} if i == 0 else fields, group)
        files[name] = (group, starts)
    return Placement(heads, sizes, _slots(files))


def _split_fields(no: int, count: int, tensors: int) -> dict[str, Any]:
    """What each file of a set says of itself, as gguf-split writes it."""
    return {"split.no": np.uint16(no), "split.count": np.uint16(count), "split.tensors.count": np.int32(tensors)}


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = _check_alignment(metadata.get("general.alignment", _ALIGNMENT))
    if alignment is None:
        raise UnsupportedError(f"general.alignment must be a power of two from 8 to {_MAX_ALIGNMENT}")
    return alignment


def _file(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> tuple[bytes, int, list[int]]:
    """One file: the bytes before the data, all of its bytes, and where each entry begins."""
    alignment = _alignment(metadata)
    ends = np.cumsum([0, *(_padded(e.info.nbytes, alignment) for e in entries)], dtype=object)
    head = b"".join(
        (
            _MAGIC,
            _U32.pack(_VERSIONS[-1]),
            _U64.pack(len(entries)),
            _U64.pack(len(metadata)),
            *(_string(k, k) + _value(v, k) for k, v in metadata.items()),
            *(_info(e.name, e.shape, e.kind, at) for e, at in zip(entries, ends, strict=False)),
        )
    )
    data = _padded(len(head), alignment)
    return head, data + ends[-1], [data + at for at in ends[:-1]]


def _slots(files: Mapping[str, tuple[Sequence[Entry], Sequence[int]]]) -> dict[str, dict[str, Slot]]:
    slots: dict[str, dict[str, Slot]] = {}
    for file, (entries, starts) in files.items():
        for e, at in zip(entries, starts, strict=True):
            slots.setdefault(e.tensor, {})[e.part] = Slot(file, at, e.info)
    return slots


def _info(tensor: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    if not 1 <= len(shape) <= _MAX_DIMS or 0 in shape:
        raise UnsupportedError(f"tensor {tensor}: shape {list(shape)}; GGUF holds 1 to {_MAX_DIMS} dimensions, none of them 0")
    encoded = _string(tensor, tensor)
    if not 8 < len(encoded) <= 8 + _GGML_NAME:
        raise UnsupportedError(f"tensor {tensor}: a name of {len(encoded) - 8} bytes; ggml takes 1 to {_GGML_NAME}")
    return encoded + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


class Gguf(Format):
    """See the module."""

    name = "gguf"
    suffixes = (".gguf",)
    gguf_names = True

    def holds(self, codec: Codec) -> bool:
        """True for ggml's types."""
        return codec.ggml_type is not None

    def recognises(self, path: Path) -> bool:
        """True for a file that begins with GGUF or is named .gguf."""
        if not path.is_file():
            return False
        with path.open("rb") as f:
            return f.read(4) == _MAGIC or path.suffix == ".gguf"

    def open(self, path: Path) -> Source:
        """Open a GGUF file; of split files, any one stands for all. Raises FormatError."""
        return GgufSource(path)

    def size(self, header: Header) -> int:
        """The exact bytes of the file, or files, that `create` would write."""
        return self._placement(header, Path("m.gguf")).nbytes

    def paths(self, path: Path, header: Header) -> list[Path]:
        """`path`, or PATH-00001-of-0000N.gguf where more than `header.max_shard_size` would stand there."""
        return [path.with_name(name) if name else path for name in self._placement(header, path).heads]

    def create(self, path: Path, header: Header) -> Sink:
        """Begin a GGUF version 3 file, or a set of them. Raises UnsupportedError for what GGUF cannot hold, OutputError."""
        return FileSink(path, header.tensors, self._placement(header, path))

    @staticmethod
    def _placement(header: Header, path: Path) -> Placement:
        entries, limit = _entries(header.tensors), header.max_shard_size
        one = whole(header.metadata, entries)
        return one if limit is None or one.nbytes <= limit else split(header.metadata, entries, limit, path.stem)


FORMAT = Gguf()
