"""Safetensors: against the reference library both ways, Hugging Face directories, quantforge's own codecs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import quantforge
from quantforge import codecs, formats
from quantforge.arrays import BF16, F8_E4M3, F8_E5M2, SAFETENSORS_DTYPES, TensorInfo
from quantforge.errors import FormatError, OutputError, UnsupportedError
from quantforge.formats import Header, Stored

ST = formats.get("safetensors")
RNG = np.random.default_rng(3)
DEMO = Path(quantforge.__file__).parent / "data" / "demo-model"


def arrays() -> dict[str, np.ndarray]:
    return {
        "bf16": RNG.standard_normal((3, 4)).astype(BF16),
        "u8.odd": np.arange(3, dtype=np.uint8),
        "f32": RNG.standard_normal((2, 3, 2)).astype(np.float32),
        "f16": RNG.standard_normal(5).astype(np.float16),
        "f64": RNG.standard_normal((1, 1)),
        "e4m3": RNG.standard_normal(7).astype(F8_E4M3),
        "e5m2": RNG.standard_normal(7).astype(F8_E5M2),
        "i64": np.arange(2),
        "bool": np.array([True, False, True]),
        "scalar": np.array(1.5, np.float32),
        "none": np.zeros((0, 5), np.float32),
    }


def stored(data: np.ndarray) -> Stored:
    return Stored(codecs.get(next(k for k, v in SAFETENSORS_DTYPES.items() if v == data.dtype)), data.shape)


def write(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **options: Any) -> Path:
    header = Header(config or {}, {k: stored(v) for k, v in tensors.items()}, **options)
    with ST.create(path, header) as sink:
        for name, data in tensors.items():
            sink.write(name, {"data": data})
        sink.commit()
    assert sum(p.stat().st_size for p in path.iterdir()) == ST.size(header)
    return path


def same(source: formats.Source, tensors: dict[str, np.ndarray]) -> None:
    assert set(source.weights) == set(tensors)
    for name, data in tensors.items():
        part = source.read(name).parts["data"]
        assert (part.dtype, part.shape) == (data.dtype, data.shape)
        assert part.tobytes() == data.tobytes()
        assert part.flags.aligned
        source.release(name)
        assert source.read(name).tobytes() == data.tobytes()


def test_we_read_the_reference(tmp_path: Path) -> None:
    tensors = arrays()
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k not in ("e4m3", "e5m2")}, tmp_path / "x.safetensors")
    with formats.open_path(tmp_path / "x.safetensors") as source:
        assert source.config == {}
        same(source, {k: v for k, v in tensors.items() if k not in ("e4m3", "e5m2")})


@pytest.mark.parametrize("limit", [10**9, 60, 1])
def test_the_reference_reads_ours(tmp_path: Path, limit: int) -> None:
    tensors = arrays()
    path = write(tmp_path / "out", tensors, {"model_type": "llama"}, max_shard_size=limit)
    found: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "numpy") as f:
            assert f.metadata() == {"format": "pt"}
            here = {k: f.get_tensor(k) for k in f.keys() if k not in ("e4m3", "e5m2", "bf16")}  # noqa: SIM118
            assert len(f.keys()) == 1 or sum(v.nbytes for v in here.values()) <= limit
            found.update(here)
    assert all(found[k].tobytes() == tensors[k].tobytes() and found[k].shape == tensors[k].shape for k in found)
    assert found.keys() | {"e4m3", "e5m2", "bf16"} == tensors.keys()
    index = path / "model.safetensors.index.json"
    assert index.exists() == (limit < 10**9)
    if index.exists():
        written = json.loads(index.read_text())
        assert written["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
        assert written["weight_map"].keys() == tensors.keys()
    source = formats.open_path(path)
    assert source.config == {"model_type": "llama"}
    same(source, tensors)


def test_transformers_style_checkpoint_with_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    w = torch.randn(4, 8).to(torch.bfloat16)
    save({"w": w, "s": torch.tensor(2.0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    source = formats.open_path(tmp_path)
    assert source.read("w").decode().tolist() == w.float().tolist()
    assert source.weights["s"].shape == ()


def test_the_shipped_model() -> None:
    with formats.open_path(DEMO) as source:
        assert source.config["architectures"] == ["LlamaForCausalLM"]
        assert source.total_bytes == (DEMO / "model.safetensors").stat().st_size
        with safe_open(DEMO / "model.safetensors", "pt") as reference:
            assert set(source.weights) == set(reference.keys())
            for name in list(source.weights)[:5]:
                assert source.read(name).decode().tolist() == reference.get_tensor(name).float().tolist()
    lone = formats.open_path(DEMO / "model.safetensors")
    assert lone.config == source.config  # the config.json beside it


def test_views_outlive_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "out", arrays())
    source = formats.open_path(path)
    data = source.read("f32").parts["data"]
    assert not data.flags.writeable and not data.flags.owndata
    source.close()
    del source
    assert np.isfinite(data).all()


# ---- directories


def sharded(path: Path) -> Path:
    return write(path, {f"t{i}": np.full(4, i, np.float32) for i in range(3)}, {"a": 1}, max_shard_size=16)


def shard(path: Path, i: int) -> Path:
    return path / f"model-{i:05}-of-00003.safetensors"


def test_shards_without_index(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    (path / "model.safetensors.index.json").unlink()
    same(formats.open_path(path), {f"t{i}": np.full(4, i, np.float32) for i in range(3)})
    shard(path, 2).unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors: missing: file 2 of 3"):
        formats.open_path(path)


def test_symlinked_shards_like_the_hub_cache(tmp_path: Path) -> None:
    path = sharded(tmp_path / "blobs")
    link = tmp_path / "snapshot"
    link.mkdir()
    for file in path.iterdir():
        (link / file.name).symlink_to(os.path.relpath(file, link))
    assert set(formats.open_path(link).weights) == {"t0", "t1", "t2"}
    shard(path, 1).unlink()
    with pytest.raises(FormatError, match=r"model-00001-of-00003\.safetensors: missing"):
        formats.open_path(link)


def test_missing_shard_of_an_index(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    shard(path, 3).unlink()
    with pytest.raises(FormatError, match=r"model-00003-of-00003\.safetensors: missing: .* names this shard"):
        formats.open_path(path)


def test_truncated_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    data = shard(path, 2).read_bytes()
    shard(path, 2).write_bytes(data[:-1])
    with pytest.raises(FormatError, match=r"model-00002.*truncated: tensor 't1' ends at byte \d+, the file at \d+") as caught:
        formats.open_path(path)
    assert caught.value.offset == data.index(b'"t1"')
    shard(path, 2).write_bytes(b"")
    with pytest.raises(FormatError, match=r"model-00002.*empty"):
        formats.open_path(path)


def test_duplicate_tensor_across_shards(tmp_path: Path) -> None:
    path = sharded(tmp_path / "m")
    shard(path, 2).write_bytes(shard(path, 2).read_bytes().replace(b'"t1"', b'"t0"'))
    with pytest.raises(FormatError, match=r"model-00002.*t0 is also in model-00001"):
        formats.open_path(path)


def edit_index(path: Path, edit: Any) -> None:
    index = path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    index.write_text(json.dumps(edit(value)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: [], "not an object"),
        (lambda v: {}, "weight_map"),
        (lambda v: {"weight_map": {}}, "weight_map"),
        (lambda v: {"weight_map": {"t0": 3}}, "weight_map"),
        (lambda v: {"weight_map": {"t0": "../m/model-00001-of-00003.safetensors"}}, "not the name of a file"),
        (lambda v: {"weight_map": {"t0": "/etc/passwd"}}, "not the name of a file"),
        (lambda v: {"weight_map": {"t0": ".."}}, "not the name of a file"),
        (lambda v: {"weight_map": {**v["weight_map"], "t9": "model-00001-of-00003.safetensors"}}, "no tensor t9"),
        (lambda v: {"weight_map": {**v["weight_map"], "t0": "model-00002-of-00003.safetensors"}}, "model-00002.*no tensor t0"),
    ],
)
def test_index_that_lies(tmp_path: Path, edit: Any, message: str) -> None:
    path = sharded(tmp_path / "m")
    edit_index(path, edit)
    with pytest.raises(FormatError, match=message):
        formats.open_path(path)


def test_two_checkpoints_in_one_directory(tmp_path: Path) -> None:
    for name in "ab":
        safetensors.numpy.save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors and b\.safetensors are not one checkpoint"):
        formats.open_path(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\xff", "[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_bad_config(tmp_path: Path, text: str) -> None:
    write(tmp_path / "m", arrays())
    (tmp_path / "m" / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"config\.json"):
        formats.open_path(tmp_path / "m")


# ---- what open_path says about everything else


def test_open_path_errors(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(FormatError) as caught:
            formats.open_path(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in message(tmp_path / "nope")
    assert "give a directory with config.json" in message(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no *.safetensors" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "not loaded" in message(path) and "save_pretrained" in message(path)
    (tmp_path / "text.txt").write_text("hello")
    assert "give a directory" in message(tmp_path / "text.txt")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("m.gguf", "m.safetensors", "m"):
        (tmp_path / name).write_text(pointer)
        assert "git lfs pull" in message(tmp_path / name)
    (tmp_path / "m.safetensors").rename(tmp_path / "model.safetensors")
    assert "git lfs pull" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "GGUF files; give one of them: m.gguf" in message(tmp_path)
    (tmp_path / "empty.gguf").write_text("")
    assert "empty" in message(tmp_path / "empty.gguf")
    (tmp_path / "text.gguf").write_text("hello there")
    assert "not a GGUF file: it begins with b'hell'" in message(tmp_path / "text.gguf")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    assert "give" in message(tmp_path / "pipe.safetensors")
    assert "give" in message(tmp_path / "dir.safetensors")


# ---- codecs that are not plain arrays


class Ternary(codecs.Codec):
    """A custom quantizer: -1, 0 or 1 times one scale per row."""

    name = "test-ternary"

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        return {"codes": TensorInfo(np.dtype(np.int8), shape), "scale": TensorInfo(np.dtype(np.float16), shape[:-1])}

    def encode(self, w: Any, importance: Any = None, *, threads: int = 1) -> Any:
        scale = np.abs(w).mean(axis=-1).astype(np.float16)
        return {"codes": np.clip(np.rint(w / scale[..., None]), -1, 1).astype(np.int8), "scale": scale}

    def decode(self, parts: Any, shape: tuple[int, ...], *, threads: int = 1) -> Any:
        return parts["codes"] * parts["scale"][..., None].astype(np.float32)


@pytest.fixture
def ternary(monkeypatch: pytest.MonkeyPatch) -> codecs.Codec:
    codecs.names()
    monkeypatch.setitem(codecs.base._registry.all(), "test-ternary", Ternary())
    return codecs.get("test-ternary")


def write_quantized(path: Path, codec: codecs.Codec, **options: Any) -> np.ndarray:
    w = RNG.standard_normal((4, 256)).astype(np.float32)
    header = Header(
        {"model_type": "llama", "quantization_config": {"quant_method": "quantforge", "version": 1, "tensors": {"old": {}}}},
        {"a.weight": Stored(codec, w.shape), "norm": stored(w[0]), "k.weight": Stored(codecs.get("Q6_K"), w.shape)},
        {"tokenizer.json": b"{}"},
    )
    with ST.create(path, replace(header, **options)) as sink:
        sink.write("norm", {"data": w[0]})
        sink.write("a.weight", codec.encode(w))
        sink.write("k.weight", codecs.get("Q6_K").encode(w))
        sink.commit()
    assert (path / "tokenizer.json").read_bytes() == b"{}"
    return w


@pytest.mark.parametrize("limit", [10**9, 1])
def test_any_codec_round_trips(tmp_path: Path, ternary: codecs.Codec, limit: int) -> None:
    w = write_quantized(tmp_path / "m", ternary, max_shard_size=limit)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "read by quantforge alone" in config["quantization_config"].pop("quantforge")
    assert config["quantization_config"] == {
        "version": 1,
        "tensors": {
            "a.weight": {"codec": "test-ternary", "shape": [4, 256]},
            "k.weight": {"codec": "Q6_K", "shape": [4, 256]},
        },
    }
    for file in (tmp_path / "m").glob("*.safetensors"):
        safetensors.numpy.load_file(file)  # a valid file to the reference
    source = formats.open_path(tmp_path / "m")
    assert set(source.weights) == {"a.weight", "norm", "k.weight"}
    assert source.weights["a.weight"].codec is ternary
    assert source.read("a.weight").decode().tolist() == ternary.decode(ternary.encode(w), w.shape).tolist()
    assert source.read("k.weight").tobytes() == codecs.get("Q6_K").encode(w)["data"].tobytes()
    source.release("a.weight")
    if limit == 1:
        lone = formats.open_path(tmp_path / "m" / "model-00001-of-00003.safetensors")
        assert lone.weights.keys() == source.weights.keys()  # one of a set stands for the set


def test_unregistered_codec(tmp_path: Path, ternary: codecs.Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(tmp_path / "m", ternary)
    monkeypatch.delitem(codecs.base._registry.all(), "test-ternary")
    with pytest.raises(FormatError, match=r"config\.json: tensor a\.weight: unknown type test-ternary.*register"):
        formats.open_path(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"tensors": 3}, "no map of tensors"),
        ({"tensors": {"a.weight": {"codec": "Q6_K"}}}, "needs a codec and a shape"),
        ({"tensors": {"a.weight": {"codec": 5, "shape": [4, 256]}}}, "needs a codec and a shape"),
        ({"tensors": {"a.weight": {"codec": "Q6_K", "shape": 5}}}, "needs a codec and a shape"),
        ({"tensors": {"a.weight": {"codec": "Q6_K", "shape": ["4", "256"]}}}, "needs a codec and a shape"),
        ({"tensors": {"a.weight": 5}}, "needs a codec and a shape"),
        ({"tensors": {"a.weight": {"codec": "Q6_K", "shape": [4, 255]}}}, "block size"),
        ({"tensors": {"a.weight": {"codec": "Q6_K", "shape": [4, 256]}}}, r"a\.weight\.data is missing"),
        ({"tensors": {"a.weight": {"codec": "test-ternary", "shape": [5, 256]}}}, r"a\.weight\.codes is int8\[4, 256\].*needs"),
    ],
)
def test_quantization_config_that_lies(tmp_path: Path, ternary: codecs.Codec, change: dict[str, Any], message: str) -> None:
    write_quantized(tmp_path / "m", ternary)
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        formats.open_path(tmp_path / "m")


def test_a_quantization_config_is_not_handed_on(tmp_path: Path) -> None:
    """What is written is quantized as the sink says, whatever the source's config.json said."""
    config = {"a": 1, "quantization_config": {"quant_method": "exl2", "bits": 4}, "quantization": {"group_size": 64, "bits": 4}}
    source = formats.open_path(write(tmp_path / "m", {"x.ints": np.zeros((2, 2), np.int32)}, config))
    assert source.config == {"a": 1} and list(source.weights) == ["x.ints"]


def test_what_safetensors_cannot_hold(tmp_path: Path, ternary: codecs.Codec) -> None:
    with pytest.raises(UnsupportedError, match="already the name"):
        ST.size(Header({}, {"a": Stored(ternary, (2, 2)), "a.codes": Stored(codecs.get("F32"), (2,))}))
    with pytest.raises(UnsupportedError, match="cannot be the name"):
        ST.size(Header({}, {}, {"../evil": b""}))
    with pytest.raises(UnsupportedError, match="JSON cannot hold"):
        ST.size(Header({"a": object()}, {}))
    with pytest.raises(OutputError, match="is a directory"):
        ST.create(tmp_path / "x.safetensors", Header({}, {}))
    assert not list(tmp_path.iterdir())


def test_numpy_values_in_a_config(tmp_path: Path) -> None:
    config = {"a": np.int32(1), "b": np.arange(2), "c": "é\udcff"}
    assert formats.open_path(write(tmp_path / "m", arrays(), config)).config == {"a": 1, "b": [0, 1], "c": "é\udcff"}
