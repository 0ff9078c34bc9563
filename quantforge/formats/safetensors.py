"""Safetensors: a lone file or a Hugging Face directory is read, a directory is written.

Tensors of plain codecs are ordinary safetensors. Any other codec's are stored part by part, as
`NAME.PART`, and listed in config.json, which is how they are found again:

    "quantization_config": {"quantforge": "read by ...", "version": 1,
                            "tensors": {NAME: {"codec": "my-int3", "shape": [out, in]}}}

(without "quant_method": transformers ignores one that it does not know, and takes random numbers for these tensors, but
refuses a config that has none)

or as one of the `layouts` has it: GPTQ, AWQ, compressed-tensors, bitsandbytes, and those that are only read.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .. import codecs, layouts
from ..arrays import SAFETENSORS_DTYPES, Array, Parts, TensorInfo
from ..codecs import Encoded
from ..errors import FormatError, OutputError, QuantForgeError, ShapeError, UnsupportedError
from .base import FileSink, Format, Header, MappedSource, Place, Placement, Sink, Slot, Source, Stored, shard_name, shards
from .diagnosis import ADAPTER
from .files import MappedFile

logger = logging.getLogger(__name__)

_MAX_HEADER = 100_000_000  # bytes; the reference's limit
_MAX_CONFIG = 1 << 26  # bytes of a config.json or an index
_MAX_DIMS = 64  # NumPy's limit
_MAX_DIM = (1 << 63) - 1
_SHARD_SIZE = 5_000_000_000  # bytes of tensors in a file, where nothing else is asked for
_VERSION = 1
_UNPACKED = 4  # tensors of a layout that are kept in memory: rows are read in tiles, by a few threads
_SINGLE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_READERS = (
    "read by quantforge alone (convert, load, evaluate), not by transformers, vLLM or llama.cpp; for these write a .gguf file, "
    "or a directory with --format gptq, awq, compressed-tensors or bitsandbytes"
)
_FLOATS = {SAFETENSORS_DTYPES[k] for k in ("F64", "F32", "F16", "BF16")}
_DTYPE_NAMES = {dtype: dtype_name for dtype_name, dtype in SAFETENSORS_DTYPES.items()}


# ---- reading


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return unique


def _parse(path: Path, data: bytes, base: int = 0) -> dict[str, Any]:
    """A JSON object; `base` is where `data` begins in the file."""
    try:
        text = data.decode("utf-8" if base else "utf-8-sig")  # some editors begin a file with a byte order mark
        header = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as e:
        raise FormatError(path, "the JSON is not UTF-8", base + e.start) from None
    except json.JSONDecodeError as e:
        at = base + len(e.doc[: e.pos].encode())
        raise FormatError(path, f"not valid JSON: {e.msg}", at) from None
    except _DuplicateKey as e:
        raise FormatError(path, f"{str(e)!r} appears twice in one JSON object", base) from None
    except (ValueError, RecursionError) as e:
        why = "nested too deep" if isinstance(e, RecursionError) else "a number has too many digits"
        raise FormatError(path, f"unreadable JSON: {why}", base) from None
    if not isinstance(header, dict):
        raise FormatError(path, "the JSON is not an object", base)
    return header


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises FormatError."""
    file = MappedFile(path)
    try:
        if file.size > _MAX_CONFIG:
            raise FormatError(path, f"{file.size} bytes; the limit for this file is {_MAX_CONFIG}")
        return _parse(path, file.bytes[:])
    finally:
        file.close()


def read_header(file: MappedFile) -> tuple[dict[str, Place], dict[str, str]]:
    """The tensors of one file in the order of their bytes, everything checked, and what it says beside them."""

    def fail(message: str, offset: int = 0) -> NoReturn:
        raise FormatError(file.path, message, offset)

    if file.size < 8:
        fail(f"truncated: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.bytes[:8], "little")
    if length > _MAX_HEADER:
        fail(f"not a safetensors file, or damaged: the header's length is given as {length}, the limit is {_MAX_HEADER}")
    data = 8 + length
    if data > file.size:
        fail(f"truncated: the header ends at byte {data}, the file at {file.size}")
    raw = file.bytes[8:data]
    if raw[:1] != b"{":
        fail("the header does not begin with {", 8)
    entries = _parse(file.path, raw, 8)

    def at(tensor: str) -> int:
        return 8 + max(0, raw.find(json.dumps(tensor, ensure_ascii=False).encode("utf-8", "replace")))

    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail("__metadata__ is not a map from strings to strings", at("__metadata__"))
    infos = []
    for tensor, entry in entries.items():
        try:
            infos.append((*_check_entry(tensor, entry), tensor))
        except ValueError as e:
            fail(f"tensor {tensor!r}: {e}", at(tensor))
    infos.sort(key=lambda info: info[:2])
    tensors: dict[str, Place] = {}
    end = 0
    for begin, stop, info, tensor in infos:
        if begin != end:
            fail(f"tensor {tensor!r} begins at offset {begin} of the data, the one before ends at {end}", at(tensor))
        if data + stop > file.size:
            fail(f"truncated: tensor {tensor!r} ends at byte {data + stop}, the file at {file.size}", at(tensor))
        tensors[tensor] = Place(file, data + begin, info)
        end = stop
    if data + end != file.size:
        fail(f"{file.size - data - end} bytes after the last tensor belong to none", data + end)
    return tensors, metadata


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n <= _MAX_DIM


def _check_entry(tensor: str, entry: object) -> tuple[int, int, TensorInfo]:
    """Begin, end, dtype and shape of a header's entry. Raises ValueError."""
    try:
        tensor.encode()
    except UnicodeEncodeError:
        raise ValueError("the name is not valid Unicode") from None
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(SAFETENSORS_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise ValueError("its shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError("its data_offsets are not two sizes")
    begin, end = offsets
    info = TensorInfo(SAFETENSORS_DTYPES[dtype], tuple(shape))
    if end - begin != info.nbytes:
        raise ValueError(f"{dtype}{shape} takes {info.nbytes} bytes, its data_offsets {offsets} span {end - begin}")
    if not info.nbytes and TensorInfo(info.dtype, tuple(n or 1 for n in shape)).nbytes > _MAX_DIM:
        raise ValueError(f"its shape {shape} is too large")
    return begin, end, info


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """A checkpoint directory's shards, and its index: tensor -> file name (empty: none)."""
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE], {}
    if (directory / _INDEX).exists():
        index = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
            raise FormatError(directory / _INDEX, "weight_map is not a map from tensors to file names")
        paths = []
        for file in dict.fromkeys(index.values()):
            if not file or file in (".", "..") or re.search(r"[/\\\0]", file):
                raise FormatError(directory / _INDEX, f"{file!r} is not the name of a file in this directory")
            if not (directory / file).exists():
                raise FormatError(directory / file, f"missing: {_INDEX} names this shard; fetch the whole checkpoint")
            paths.append(directory / file)
        return paths, index
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FormatError(directory, "has no *.safetensors")
    if len(files) > 1:  # an adapter beside a model
        files = [p for p in files if p.name != ADAPTER]
    complete = shards(files[0])
    if set(complete) != set(files):
        extra = sorted(p.name for p in set(files) - set(complete))
        raise FormatError(directory, f"{complete[0].name} and {extra[0]} are not one checkpoint; give the file you mean")
    return complete, {}


def _same(a: Place, b: Place) -> bool:
    """Do two places hold the same bytes?"""
    if a.info != b.info:
        return False
    step = 1 << 24
    ends = (a.offset + a.info.nbytes, b.offset + b.info.nbytes)
    for i in range(0, a.info.nbytes, step):
        x, y = (p.file.bytes[p.offset + i : min(p.offset + i + step, end)] for p, end in zip((a, b), ends, strict=True))
        if x != y:
            return False
    return True


class SafetensorsSource(MappedSource):
    """A safetensors checkpoint, mapped into memory."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        directory = path if path.is_dir() else path.parent
        paths, index = _files(path) if path.is_dir() else (shards(path), {})
        if paths[0].name != ADAPTER and (directory / ADAPTER).exists():
            logger.warning("%s: the adapter in it (%s) is left out: only the model is read", path, ADAPTER)
        self._files = [MappedFile(p) for p in paths]
        tensors: dict[str, Place] = {}
        metadata: dict[str, str] = {}
        for file in self._files:
            here, said = read_header(file)
            metadata |= said
            for tensor, place in here.items():
                if (other := tensors.get(tensor)) is not None and not _same(other, place):
                    where = other.file.path.name
                    raise FormatError(file.path, f"tensor {tensor} is also in {where}, with other bytes", place.offset)
                if other is None or index.get(tensor) == file.path.name:
                    tensors[tensor] = place
        for tensor, shard in index.items():
            if tensor not in tensors or tensors[tensor].file.path.name != shard:
                raise FormatError(directory / shard, f"has no tensor {tensor}, which {_INDEX} promises; fetch it again")
        config = directory / _CONFIG
        self.config = read_json(config) if config.exists() else {}
        self._places = {k: {"data": v} for k, v in tensors.items()}
        plain = {dtype: codecs.get(dtype_name) for dtype_name, dtype in SAFETENSORS_DTYPES.items()}
        self.weights = {k: Stored(plain[v.info.dtype], v.info.shape) for k, v in tensors.items()}
        self._layout_tensors: dict[str, layouts.Gathered] = {}
        self._unpacked: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = threading.Lock()
        own = layouts.stated(self.config, lambda name: read_json(p) if (p := directory / name).is_file() else None)
        floats = all(v.info.dtype in _FLOATS for v in tensors.values())
        if own is None and not floats:
            own = self._by_arrays(tensors)
        if own is not None and own["quant_method"] == layouts.OWN:
            self._gather(config, own, tensors)
        elif own is not None and (layouts.find(own) is not None or not floats):
            self._find({**own, "metadata": metadata}, tensors)
        elif own is not None:
            logger.warning(
                "%s: config.json speaks of %r, but all tensors are floats; taken as they are", path, own["quant_method"]
            )

    def _by_arrays(self, tensors: Mapping[str, Place]) -> dict[str, Any] | None:
        try:
            stated = layouts.by_arrays(tensors)
        except UnsupportedError as e:
            raise FormatError(self.path, str(e)) from None
        if stated is not None:
            method = stated["quant_method"]
            logger.warning("%s: no quantization_config; its tensors are named as %s names them, and read so", self.path, method)
        return stated

    def _find(self, config: Mapping[str, Any], tensors: Mapping[str, Place]) -> None:
        """Make one tensor of those that a layout holds together."""
        try:
            layout = layouts.layout_of(config)
        except UnsupportedError as e:
            raise FormatError(self.path, str(e)) from None

        def load(tensor: str) -> Array:
            return tensors[tensor].file.array(tensors[tensor].offset, tensors[tensor].info)

        try:
            located = layout.find(config, {k: v.info for k, v in tensors.items()}, load)
        except (TypeError, ValueError, AttributeError, KeyError):
            raise FormatError(self.path, f"quantization_config: not what {layout.name} writes") from None
        except QuantForgeError as e:
            raise FormatError(self.path, str(e)) from None
        owner = {array: k for k, g in located.tensors.items() for array in g.arrays.values()}
        rest = (k for k, v in tensors.items() if v.info.dtype.kind in "iu" and k not in owner and k not in located.dropped)
        if odd := layouts.telling(rest):
            raise FormatError(self.path, f"config.json says {layout.name}, but {odd} is none of its tensors: fetch both again")
        weights: dict[str, Stored] = {}
        for k in tensors:
            whole = owner.get(k, k)
            if k not in located.dropped:
                g = located.tensors.get(whole)
                weights[whole] = Stored(g.codec, g.shape) if g else self.weights[k]
        self.weights, self.optional = weights, located.optional
        self._layout_tensors = dict(located.tensors)
        self._places = {
            k: {a: tensors[v] for a, v in located.tensors[k].arrays.items()} if k in located.tensors else {"data": tensors[k]}
            for k in weights
        }

    def read(self, name: str) -> Encoded:
        """The stored tensor. Parts are views of the files, or copies where a layout has them in another order."""
        gathered = self._layout_tensors.get(name)
        if gathered is None:
            return super().read(name)
        with self._lock:
            e = self._unpacked.get(name)
            if e is None:
                arrays = {k: p.file.array(p.offset, p.info) for k, p in self._places[name].items()}
                try:
                    e = Encoded(gathered.codec, gathered.shape, gathered.unpack(arrays))
                except ValueError:
                    raise FormatError(self.path, f"tensor {name}: its arrays do not fit {gathered.codec.name}") from None
                self._unpacked[name] = e
                while len(self._unpacked) > _UNPACKED:
                    self._unpacked.popitem(last=False)
        return e

    def release(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        with self._lock:
            self._unpacked.pop(name, None)
        super().release(name)

    def _gather(self, config: Path, own: Mapping[str, Any], tensors: Mapping[str, Place]) -> None:
        """Make one tensor of those that are the parts of a quantforge codec."""
        if own.get("version") != _VERSION:
            raise FormatError(config, f"quantization_config is of version {own.get('version')!r}; {_VERSION} is read")
        listed = own.get("tensors")
        if not isinstance(listed, dict):
            raise FormatError(config, "quantization_config has no map of tensors")
        owner: dict[str, str] = {}  # file's tensor -> whole tensor
        stored: dict[str, Stored] = {}
        parts: dict[str, dict[str, Place]] = {}
        for tensor, entry in listed.items():
            try:
                stored[tensor] = Stored(codecs.get(entry["codec"]), tuple(entry["shape"]))
                layout = stored[tensor].codec.layout(stored[tensor].shape)
            except (KeyError, TypeError, AttributeError):
                raise FormatError(config, f"quantization_config: tensor {tensor} needs a codec and a shape") from None
            except UnsupportedError as e:
                raise FormatError(config, f"tensor {tensor}: {e}; import what registers this codec first") from None
            except QuantForgeError as e:
                raise FormatError(config, f"tensor {tensor}: {e}") from None
            parts[tensor] = {}
            for part, info in layout.items():
                place = tensors.get(f"{tensor}.{part}")
                if place is None:
                    if self.path.is_dir():
                        raise FormatError(self.path, f"tensor {tensor}.{part} is missing: {stored[tensor].codec.name} needs it")
                    break  # a lone shard of several: this tensor lives elsewhere
                if place.info != info:
                    raise FormatError(
                        place.file.path,
                        f"tensor {tensor}.{part} is {place.info.dtype}{list(place.info.shape)}, "
                        f"{stored[tensor].codec.name} needs {info.dtype}{list(info.shape)}",
                        place.offset,
                    )
                owner[f"{tensor}.{part}"] = tensor
                parts[tensor][part] = place
            else:
                continue
            del stored[tensor], parts[tensor]
        weights: dict[str, Stored] = {}
        for k in tensors:
            whole = owner.get(k, k)
            weights[whole] = stored[whole] if k in owner else self.weights[k]
        self.weights = weights
        self._places = {k: parts.get(k) or {"data": tensors[k]} for k in weights}


# ---- writing


def _dump(value: Any) -> bytes:
    def plain(x: Any) -> Any:
        if isinstance(x, (np.generic, np.ndarray)):
            return x.tolist()
        raise UnsupportedError(f"config: JSON cannot hold a {type(x).__name__}")

    return (json.dumps(value, indent=2, default=plain) + "\n").encode()


def _config(header: Header, quantized: Mapping[str, Stored]) -> dict[str, Any]:
    """header.metadata with the quantization_config of what is written, or without one where there is none any more."""
    config = dict(header.metadata)
    for key in ("quantization_config", "compression_config", "quantization"):  # what it was read by
        if isinstance(config.get(key), dict):
            del config[key]
    if quantized and header.layout is not None:
        matrices = [k.removesuffix(".weight") for k, v in header.tensors.items() if len(v.shape) == 2 and k.endswith(".weight")]
        modules = {k.removesuffix(".weight"): v.codec for k, v in quantized.items()}
        kept = [m for m in matrices if m not in modules and not _NO_LINEAR.search(m)]
        config["quantization_config"] = header.layout.config(modules, kept)
    elif quantized:
        config["quantization_config"] = {
            layouts.OWN: _READERS,
            "version": _VERSION,
            "tensors": {k: {"codec": v.codec.name, "shape": list(v.shape)} for k, v in quantized.items()},
        }
    return config


# two axes, but no linear layer
_NO_LINEAR = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|\w*norm|ln_\w+)$", re.IGNORECASE)


def _shard(entries: Mapping[str, Mapping[str, TensorInfo]]) -> tuple[bytes, dict[str, int], int]:
    """Head, the entries' offsets and total size of one file."""
    infos = {k: info for parts in entries.values() for k, info in parts.items()}
    # widest first keeps every tensor aligned
    order = sorted(infos, key=lambda k: -infos[k].dtype.itemsize)
    description: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative, end = {}, 0
    for k in order:
        info = infos[k]
        relative[k] = end
        end += info.nbytes
        description[k] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [relative[k], end]}
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise UnsupportedError(
            f"a safetensors header of {len(text)} bytes; the limit is {_MAX_HEADER}: choose a smaller shard size"
        )
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: data + v for k, v in relative.items()}, data + end


def _place(header: Header) -> Placement:
    max_shard_size = header.max_shard_size or _SHARD_SIZE
    entries: dict[str, dict[str, TensorInfo]] = {}  # tensor -> name in the file -> dtype and shape
    parts_of: dict[str, dict[str, str]] = {}  # tensor -> part -> name in the file
    quantized: dict[str, Stored] = {}
    taken: dict[str, str] = {}
    for tensor, stored in header.tensors.items():
        if stored.codec.name in SAFETENSORS_DTYPES:
            arrays = {"data": (tensor, stored.codec.layout(stored.shape)["data"])}
        else:
            quantized[tensor] = stored
            arrays = {part: (f"{stem}.{part}", info) for stem, part, info in _arrays(header.layout, tensor, stored)}
        parts_of[tensor] = {part: k for part, (k, _) in arrays.items()}
        entries[tensor] = dict(arrays.values())
        for k, info in entries[tensor].items():
            if k in taken or k == "__metadata__":
                raise UnsupportedError(f"tensor {tensor}: {k} is already the name of {taken.get(k, 'the metadata')}")
            if info.dtype not in _DTYPE_NAMES:
                raise UnsupportedError(f"tensor {tensor}: safetensors cannot hold {stored.codec.name}'s {k} of {info.dtype}")
            taken[k] = tensor

    groups: list[dict[str, dict[str, TensorInfo]]] = [{}]
    filled = 0
    for tensor, parts in entries.items():
        n = sum(info.nbytes for info in parts.values())
        if groups[-1] and filled + n > max_shard_size:
            groups.append({})
            filled = 0
        groups[-1][tensor] = parts
        filled += n

    heads: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    slots: dict[str, dict[str, Slot]] = {}
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        file = _SINGLE if len(groups) == 1 else shard_name("model", i, len(groups), ".safetensors")
        heads[file], offsets, sizes[file] = _shard(group)
        for tensor, parts in group.items():
            slots[tensor] = {part: Slot(file, offsets[k], parts[k]) for part, k in parts_of[tensor].items()}
            weight_map.update(dict.fromkeys(parts, file))
    extra = dict(header.files)
    for file in extra:
        if not file or file in (".", "..", _CONFIG, _INDEX) or file in heads or re.search(r"[/\\\0]", file):
            raise UnsupportedError(f"{file!r} cannot be the name of a file beside the weights")
    if config := _config(header, quantized):
        extra[_CONFIG] = _dump(config)
    if quantized and header.layout is not None:
        extra |= {k: _dump(v) for k, v in header.layout.files(config["quantization_config"]).items()}
    if len(groups) > 1:
        total = sum(info.nbytes for parts in entries.values() for info in parts.values())
        extra[_INDEX] = _dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    heads.update(extra)
    sizes.update({k: len(v) for k, v in extra.items()})
    return Placement(heads, sizes, slots)


def _arrays(layout: layouts.Layout | None, tensor: str, stored: Stored) -> list[tuple[str, str, TensorInfo]]:
    """(stem, part, dtype and shape) of what a tensor that is not plain is stored as: the file has it as STEM.PART."""
    if layout is None:
        return [(tensor, part, info) for part, info in stored.codec.layout(stored.shape).items()]
    if not tensor.endswith(".weight"):
        raise UnsupportedError(f"tensor {tensor}: {layout.name} checkpoints hold only modules' weights; keep it in a float type")
    try:
        return [(tensor[: -len(".weight")], part, info) for part, info in layout.arrays(stored.codec, stored.shape).items()]
    except ShapeError as e:
        raise ShapeError(f"{tensor}: {e}") from None


class _LayoutSink(FileSink):
    """A sink that gathers the rows of a tensor until it is whole, then stores it as the layout has it."""

    def __init__(self, path: Path, header: Header, layout: layouts.Layout) -> None:
        self._layout = layout
        self._gathered: dict[str, tuple[Parts, list[int]]] = {}
        self._gathering = threading.Lock()
        super().__init__(path, header.tensors, _place(header), directory=True)

    def write(self, name: str, parts: Parts, row: int = 0) -> None:
        """See `Sink.write`."""
        stored = self._tensors.get(name)
        if stored is None or stored.codec.name in SAFETENSORS_DTYPES:
            super().write(name, parts, row)
            return
        layout, shape = stored.codec.layout(stored.shape), stored.shape
        if parts.keys() != layout.keys():
            raise OutputError(self._path, f"tensor {name}: parts {sorted(parts)} given, {sorted(layout)} expected")
        rows = len(parts["codes"]) if "codes" in parts else len(next(iter(parts.values())))
        if rows < shape[0]:
            with self._gathering:
                whole, left = self._gathered.setdefault(
                    name, ({k: np.empty(i.shape, i.dtype) for k, i in layout.items()}, [shape[0]])
                )
            for k, p in parts.items():
                whole[k][row : row + rows] = p
            with self._gathering:
                left[0] -= rows
                if left[0] > 0:
                    return
                del self._gathered[name]
            parts = whole
        super().write(name, self._layout.pack(stored.codec, parts, shape))


class Safetensors(Format):
    """See the module."""

    name = "safetensors"
    suffixes = ()

    def recognises(self, path: Path) -> bool:
        """True for a directory with *.safetensors or their index, and a file that is named or begins like one."""
        if path.is_dir():
            return (path / _INDEX).exists() or next(path.glob("*.safetensors"), None) is not None
        if not path.is_file():
            return False
        with path.open("rb") as f:
            start = f.read(9)
        return path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER)

    def open(self, path: Path) -> Source:
        """Open a checkpoint directory or a .safetensors file. Raises FormatError."""
        return SafetensorsSource(path)

    def size(self, header: Header) -> int:
        """The exact bytes of all files that `create` would write."""
        return _place(header).nbytes

    def warnings(self, header: Header) -> list[str]:
        """Who reads a directory with codecs of no layout."""
        own = header.layout is None and any(s.codec.name not in SAFETENSORS_DTYPES for s in header.tensors.values())
        return [f"such a directory is {_READERS}"] if own else []

    def create(self, path: Path, header: Header) -> Sink:
        """Begin a checkpoint directory with files of at most `header.max_shard_size` bytes of tensors (5 GB).

        Raises UnsupportedError for what safetensors or the layout cannot hold, OutputError.
        """
        if path.suffix == ".safetensors":
            raise OutputError(
                path, "a safetensors checkpoint is a directory (weights, config.json, tokenizer); give a name without suffix"
            )
        if header.layout is not None:
            return _LayoutSink(path, header, header.layout)
        return FileSink(path, header.tensors, _place(header), directory=True)


FORMAT = Safetensors()
