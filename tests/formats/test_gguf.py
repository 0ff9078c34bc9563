"""GGUF: round trips with ourselves, gguf-py and ggml; split files; version 2; parts beside a tensor."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge import codecs, formats
from quantforge.arrays import BF16, TensorInfo
from quantforge.errors import FormatError, OutputError, UnsupportedError
from quantforge.formats import Header, Stored

GGUF = formats.get("gguf")
RNG = np.random.default_rng(0)
SCALARS = [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint64, np.int64, np.float64]
ARRAYS = [*SCALARS, np.uint32, np.float32, np.bool_]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "naïve 模型\n",
    "not.utf8": b"\xff\xfe ok".decode("utf-8", "surrogateescape"),
    "empty": "",
    "u32": 0,
    "u32.max": 2**32 - 1,
    "f32": 1.5,
    "bool": True,
    **{f"scalar.{t.__name__}": t(7) for t in SCALARS},
    **{f"array.{t.__name__}": np.array([0, 1, 1], t) for t in ARRAYS},
    "array.empty": np.array([], np.float32),
    "strings": ["a", "", "ü", "\udcff"],
    "nested": [np.array([1, 2], np.int32), ["x"], [np.array([True]), [np.array([1.5])]]],
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or (a != a and b != b))


def write(path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int8": "I8", "int32": "I32"}
    header = Header(metadata, {k: Stored(codecs.get(names[v.dtype.name]), v.shape) for k, v in arrays.items()})
    with GGUF.create(path, header) as sink:
        for name, data in arrays.items():
            sink.write(name, {"data": data})
        sink.commit()
    assert path.stat().st_size == GGUF.size(header)
    return path


def arrays() -> dict[str, np.ndarray]:
    return {
        "token_embd.weight": RNG.standard_normal((5, 32)).astype(BF16),
        "norm.weight": RNG.standard_normal(3).astype(np.float32),
        "a.weight": RNG.standard_normal((2, 3, 4, 5)).astype(np.float16),
        "b": np.arange(7, dtype=np.int8),
        "one": np.ones((1, 1), np.float64),
    }


def test_round_trip_keeps_every_type_and_bit(tmp_path: Path) -> None:
    tensors = arrays()
    with formats.open_path(write(tmp_path / "m.gguf", METADATA, tensors)) as source:
        assert source.format == "gguf"
        assert list(source.config) == list(METADATA)
        for key, value in METADATA.items():
            assert same(value, source.config[key]), key
        assert list(source.weights) == list(tensors)
        for name, data in tensors.items():
            e = source.read(name)
            assert e.shape == data.shape and e.parts["data"].dtype == data.dtype
            assert e.tobytes() == data.tobytes()
            source.release(name)
            assert source.read(name).tobytes() == data.tobytes()
        assert source.total_bytes == (tmp_path / "m.gguf").stat().st_size


scalars = st.one_of(
    st.booleans(), st.text(), st.floats(width=32), st.integers(0, 2**32 - 1), *(st.integers(0, 100).map(t) for t in SCALARS)
)
flat_arrays = st.one_of(st.lists(st.text()), *(st.lists(st.integers(0, 1)).map(lambda v, t=t: np.array(v, t)) for t in ARRAYS))
values = scalars | flat_arrays | st.lists(flat_arrays | st.lists(flat_arrays, min_size=1), min_size=1)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=20), values))
def test_any_metadata_round_trips(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    metadata = {f"k.{k}": v for k, v in metadata.items()}
    found = formats.open_path(write(tmp_path_factory.getbasetemp() / "any.gguf", metadata, {})).config
    assert found.keys() == metadata.keys()
    assert all(same(v, found[k]) for k, v in metadata.items())


@pytest.mark.parametrize(
    ("value", "read_back"),
    [
        (-5, np.int32(-5)),
        (-(2**31) - 1, np.int64(-(2**31) - 1)),
        (2**32, np.int64(2**32)),
        (2**63, np.uint64(2**63)),
        ([1, -1], np.array([1, -1], np.int32)),
        ([1, 2**31], np.array([1, 2**31], np.uint32)),
        ([-1, 2**31], np.array([-1, 2**31], np.int64)),
        ([1.0, 2], np.array([1, 2], np.float32)),
        ([True, False], np.array([True, False])),
        ([np.uint8(1), np.uint8(2)], np.array([1, 2], np.uint8)),
        (("a", "b"), ["a", "b"]),
        ([], []),
        (np.array(3, np.int16), np.int16(3)),
    ],
)
def test_python_values_choose_a_type(tmp_path: Path, value: Any, read_back: Any) -> None:
    assert same(formats.open_path(write(tmp_path / "m.gguf", {"k": value}, {})).config["k"], read_back)


@pytest.mark.parametrize(
    "value",
    [2**64, -(2**63) - 1, 1e39, [1e39], None, {}, b"x", [1, "a"], np.float16(1), np.zeros((2, 2)), np.zeros(1, BF16), "\ud800"],
    ids=str,
)
def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"metadata the\.key"):
        write(tmp_path / "m.gguf", {"the.key": value}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32])
def test_names_that_ggml_refuses(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="1 to 63"):
        write(tmp_path / "m.gguf", {}, {name: np.zeros(1, np.float32)})


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1, 1, 1, 1)])
def test_shapes_that_gguf_refuses(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="dimensions"):
        write(tmp_path / "m.gguf", {}, {"x": np.zeros(shape, np.float32)})


def test_codec_without_ggml_type_is_refused(tmp_path: Path) -> None:
    header = Header({}, {"x.weight": Stored(codecs.get("F8_E4M3"), (4,))})
    with pytest.raises(UnsupportedError, match=r"x\.weight.*F8_E4M3"):
        GGUF.create(tmp_path / "m.gguf", header)


@pytest.mark.parametrize("alignment", [8, 64, 4096, np.uint32(64)])
def test_alignment_of_the_metadata_is_kept(tmp_path: Path, alignment: Any) -> None:
    path = write(tmp_path / "m.gguf", {"general.alignment": alignment}, arrays())
    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == alignment
    assert all(t.data_offset % int(alignment) == 0 for t in theirs.tensors)
    assert path.stat().st_size % int(alignment) == 0
    source = formats.open_path(path)
    for t in theirs.tensors:
        assert source.read(t.name).tobytes() == t.data.tobytes()


@pytest.mark.parametrize("alignment", [0, 1, 4, 48, 2**22, "32", 32.0, True, np.int32(32)])
def test_bad_alignment_is_refused_on_writing(tmp_path: Path, alignment: Any) -> None:
    with pytest.raises(UnsupportedError, match="alignment"):
        write(tmp_path / "m.gguf", {"general.alignment": alignment}, {})


def test_padding_is_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {}, {"a": np.full(3, 255, np.int32).astype(np.int8), "b": np.full(5, -1, np.int8)})
    data = path.read_bytes()[gguf.GGUFReader(path).data_offset :]
    assert data == b"\xff" * 3 + bytes(29) + b"\xff" * 5 + bytes(27)


def test_gguf_py_reads_ours(tmp_path: Path) -> None:
    tensors = arrays()
    metadata = {k: v for k, v in METADATA.items() if k not in ("not.utf8", "strings", "nested")}
    theirs = gguf.GGUFReader(write(tmp_path / "m.gguf", metadata, tensors))
    for key, value in metadata.items():
        field = theirs.get_field(key)
        assert field is not None
        got = field.contents()
        assert got == (value.tolist() if isinstance(value, np.ndarray) else value), key
    found = {t.name: t for t in theirs.tensors}
    assert list(found) == list(tensors)
    for name, data in tensors.items():
        assert tuple(found[name].shape[::-1]) == data.shape
        assert found[name].data.tobytes() == data.tobytes()


def test_we_read_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(3)
    writer.add_float32("x.f32", 0.1)
    writer.add_float64("x.f64", 0.1)
    writer.add_int8("x.i8", -3)
    writer.add_uint64("x.u64", 2**60)
    writer.add_bool("x.bool", False)
    writer.add_array("x.tokens", ["a", "b", "💥"])
    writer.add_array("x.scores", [0.5, 1.5])
    writer.add_array("x.ids", [1, -2])
    w = RNG.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("w.weight", w)
    writer.add_tensor(
        "q.weight", gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with formats.open_path(tmp_path / "m.gguf") as source:
        expected = {
            "general.architecture": "llama",
            "llama.block_count": 3,
            "x.f32": float(np.float32(0.1)),
            "x.f64": np.float64(0.1),
            "x.i8": np.int8(-3),
            "x.u64": np.uint64(2**60),
            "x.bool": False,
            "x.tokens": ["a", "b", "💥"],
            "x.scores": np.array([0.5, 1.5], np.float32),
            "x.ids": np.array([1, -2], np.int32),
        }
        assert source.config.keys() == expected.keys()
        assert all(same(v, source.config[k]) for k, v in expected.items())
        assert source.weights["q.weight"].codec.name == "Q8_0"
        assert source.weights["q.weight"].shape == (4, 64)
        assert source.read("w.weight").parts["data"].tolist() == w.tolist()
        assert source.read("q.weight").tobytes() == gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0).tobytes()


def test_ggml_reads_ours(tmp_path: Path) -> None:
    """ggml's own parser, from the xllamacpp wheel, finds the same tensors at the same offsets."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp is not installed")
    lib = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    lib.gguf_init_from_file.restype = ctypes.c_void_p

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    for f, result in {
        "gguf_get_n_kv": ctypes.c_int64,
        "gguf_get_n_tensors": ctypes.c_int64,
        "gguf_get_data_offset": ctypes.c_size_t,
        "gguf_free": None,
    }.items():
        getattr(lib, f).restype, getattr(lib, f).argtypes = result, [ctypes.c_void_p]
    for f, result in {
        "gguf_get_tensor_name": ctypes.c_char_p,
        "gguf_get_tensor_offset": ctypes.c_size_t,
        "gguf_get_tensor_size": ctypes.c_size_t,
    }.items():
        getattr(lib, f).restype, getattr(lib, f).argtypes = result, [ctypes.c_void_p, ctypes.c_int64]
    tensors = arrays()
    metadata = {k: v for k, v in METADATA.items() if k != "nested"}  # ggml refuses arrays of arrays
    path = write(tmp_path / "m.gguf", metadata, tensors)
    ctx = lib.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert ctx
    assert lib.gguf_get_n_kv(ctx) == len(metadata)
    assert lib.gguf_get_n_tensors(ctx) == len(tensors)
    data = path.read_bytes()
    for i, (name, array) in enumerate(tensors.items()):
        assert lib.gguf_get_tensor_name(ctx, i).decode() == name
        at = lib.gguf_get_data_offset(ctx) + lib.gguf_get_tensor_offset(ctx, i)
        assert data[at : at + lib.gguf_get_tensor_size(ctx, i)] == array.tobytes()
    lib.gguf_free(ctx)


def test_version_2_and_missing_tail_padding(tmp_path: Path) -> None:
    data = write(tmp_path / "3.gguf", METADATA, {"a": np.arange(3, dtype=np.float32)}).read_bytes()
    (tmp_path / "2.gguf").write_bytes(data[:4] + struct.pack("<I", 2) + data[8:-20])
    source = formats.open_path(tmp_path / "2.gguf")
    assert source.read("a").parts["data"].tolist() == [0, 1, 2]
    assert source.config.keys() == METADATA.keys()


def test_file_without_suffix_is_known_by_its_magic(tmp_path: Path) -> None:
    assert formats.open_path(write(tmp_path / "sha256-abc", {}, arrays())).format == "gguf"


def test_read_gives_read_only_views(tmp_path: Path) -> None:
    source = formats.open_path(write(tmp_path / "m.gguf", {}, arrays()))
    data = source.read("norm.weight").parts["data"]
    assert not data.flags.owndata and not data.flags.writeable
    source.close()
    assert data.sum() == data.copy().sum()  # the map lives as long as its views


def test_reads_and_releases_from_many_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": RNG.standard_normal((64, 64)).astype(np.float32) for i in range(16)}
    source = formats.open_path(write(tmp_path / "m.gguf", {}, tensors))

    def read(i: int) -> bool:
        name = f"t{i % 16}"
        e = source.read(name)
        source.release(name)  # neighbours share pages with this tensor
        return e.tobytes() == tensors[name].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


def test_unknown_tensor_names_the_nearest(tmp_path: Path) -> None:
    source = formats.open_path(write(tmp_path / "m.gguf", {}, arrays()))
    with pytest.raises(FormatError, match=r"did you mean norm\.weight"):
        source.read("norm.wieght")
    with pytest.raises(FormatError):
        source.release("nope")


# ---- split files


def split(tmp_path: Path, n: int = 3, **changes: Any) -> list[Path]:
    paths = []
    for i in range(n):
        metadata = {
            **({"general.architecture": "llama"} if i == 0 else {}),
            "split.no": np.uint16(i),
            "split.count": np.uint16(n),
            "split.tensors.count": np.int32(n),
        }
        metadata.update({k.replace("_", "."): v for k, v in changes.items()} if i == 1 else {})
        path = tmp_path / f"m-{i + 1:05}-of-{n:05}.gguf"
        paths.append(write(path, metadata, {f"t{i}": np.full(4, i, np.float32)}))
    return paths


@pytest.mark.parametrize("which", range(3))
def test_any_split_file_opens_the_whole(tmp_path: Path, which: int) -> None:
    paths = split(tmp_path)
    source = formats.open_path(paths[which])
    assert source.config == {"general.architecture": "llama"}
    assert list(source.weights) == ["t0", "t1", "t2"]
    assert [source.read(f"t{i}").parts["data"][0] for i in range(3)] == [0, 1, 2]
    assert source.total_bytes == sum(p.stat().st_size for p in paths)


def test_splits_made_by_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 32), i, np.float32))
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = formats.open_path(tmp_path / "m-00001-of-00003.gguf")
    assert [source.read(f"t{i}").decode().max() for i in range(5)] == [0, 1, 2, 3, 4]


def test_broken_splits(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: missing: file 2 of 3"):
        formats.open_path(paths[0])
    (tmp_path / "away").rename(paths[1])
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="one of 3 split files"):
        formats.open_path(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").rename(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(FormatError, match="1 of 2"):
        formats.open_path(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    "changes", [{"split_no": np.uint16(2)}, {"split_count": np.uint16(4)}, {"split_no": "x"}, {"split_no": True}], ids=str
)
def test_split_fields_that_contradict(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"split\."):
        formats.open_path(split(tmp_path, **changes)[0])


def test_split_counts_and_duplicates(tmp_path: Path) -> None:
    paths = split(tmp_path)
    write(paths[2], {"split.no": 2, "split.count": 3}, {"t0": np.zeros(1, np.float32)})
    with pytest.raises(FormatError, match=r"t0 is also in m-00001"):
        formats.open_path(paths[0])
    write(paths[2], {"split.no": 2, "split.count": 3}, {f"u{i}": np.zeros(1, np.float32) for i in range(2)})
    with pytest.raises(FormatError, match=r"split\.tensors\.count is 3"):
        formats.open_path(paths[0])


# ---- codecs of several parts


class Scaled(codecs.Codec):
    """int8 codes with one f32 scale per leading index: like NVFP4, a ggml type with a part beside it."""

    name, block_size, ggml_type = "TEST_SCALED", 4, 250

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        codecs.base.check_block(shape, self)
        scales = shape[0] if len(shape) > 2 else 1
        return {"data": TensorInfo(np.dtype(np.uint8), shape), "scale": TensorInfo(np.dtype(np.float32), (scales,))}

    def encode(self, w: Any, importance: Any = None, *, threads: int = 1) -> Any:
        scale = np.float32(np.abs(w).max() / 127)
        return {"data": np.rint(w / scale).astype(np.int8).view(np.uint8), "scale": np.array([scale], np.float32)}

    def decode(self, parts: Any, shape: tuple[int, ...], *, threads: int = 1) -> Any:
        return (parts["data"].view(np.int8) * parts["scale"]).reshape(shape).astype(np.float32)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> codecs.Codec:
    codec = Scaled()
    codecs.names()
    monkeypatch.setitem(codecs.base._registry.all(), codec.name, codec)
    return codec


def test_further_parts_are_sibling_tensors(tmp_path: Path, scaled: codecs.Codec) -> None:
    w = RNG.standard_normal((3, 8)).astype(np.float32)
    header = Header({}, {"blk.0.up.weight": Stored(scaled, w.shape), "norm.weight": Stored(codecs.get("F32"), (2,))})
    parts = scaled.encode(w)
    with GGUF.create(tmp_path / "m.gguf", header) as sink:
        sink.write("norm.weight", {"data": np.ones(2, np.float32)})
        sink.write("blk.0.up.weight", parts)
        with pytest.raises(OutputError, match="parts"):
            sink.write("blk.0.up.weight", {"data": parts["data"]})
        sink.commit()
    assert (tmp_path / "m.gguf").stat().st_size == GGUF.size(header)
    raw = (tmp_path / "m.gguf").read_bytes()
    at = raw.index(b"blk.0.up.scale") + len("blk.0.up.scale")
    assert struct.unpack_from("<IQI", raw, at) == (1, 1, 0)  # one dimension of 1, F32
    source = formats.open_path(tmp_path / "m.gguf")
    assert list(source.weights) == ["blk.0.up.weight", "norm.weight"]
    e = source.read("blk.0.up.weight")
    assert e.codec is scaled and e.parts.keys() == {"data", "scale"}
    assert e.decode().tolist() == scaled.decode(parts, w.shape).tolist()
    source.release("blk.0.up.weight")

    # a writer that left out a scale of 1
    (tmp_path / "n.gguf").write_bytes(raw.replace(b"blk.0.up.scale", b"blk.0.up.other"))
    source = formats.open_path(tmp_path / "n.gguf")
    assert source.read("blk.0.up.weight").parts["scale"].tolist() == [1]
    assert "blk.0.up.other" in source.weights

    # a sibling that does not fit
    (tmp_path / "n.gguf").write_bytes(raw[:at] + struct.pack("<IQI", 1, 1, 26) + raw[at + 16 :])
    with pytest.raises(FormatError, match=r"blk\.0\.up\.scale is I32"):
        formats.open_path(tmp_path / "n.gguf")


def test_sibling_names_may_not_collide(tmp_path: Path, scaled: codecs.Codec) -> None:
    header = Header({}, {"x.weight": Stored(scaled, (4, 4)), "x.scale": Stored(codecs.get("F32"), (1,))})
    with pytest.raises(UnsupportedError, match=r"x\.scale is both"):
        GGUF.size(header)
