"""Split GGUF files: written by convert and split, put together by merge, and what llama.cpp makes of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge import formats
from quantforge.codecs import get
from quantforge.demo import MODEL
from quantforge.errors import FormatError, OutputError, RecipeError, UnsupportedError
from quantforge.formats import Header, Stored
from quantforge.formats.files import MappedFile
from quantforge.formats.gguf import _read_header
from tests.llama_cpp import Llama

LIMIT = 1_000_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    qf.convert(MODEL, path, "Q4_0")
    return path


def fields(path: Path) -> dict[str, object]:
    metadata, _ = _read_header(MappedFile(path))
    return {k.removeprefix("split."): v for k, v in metadata.items() if k.startswith("split.")}


def test_convert_writes_what_split_cuts(whole: Path, tmp_path: Path) -> None:
    cut = qf.split(whole, tmp_path / "m.gguf", LIMIT)
    (tmp_path / "own").mkdir()
    report = qf.convert(MODEL, tmp_path / "own" / "m.gguf", "Q4_0", max_shard_size=LIMIT)
    made = sorted((tmp_path / "own").iterdir())
    assert Path(report.path) == made[0] and report.total_bytes == sum(p.stat().st_size for p in made)
    assert [p.name for p in made] == [p.name for p in cut] == [f"m-{i + 1:05}-of-{len(cut):05}.gguf" for i in range(len(cut))]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(made, cut, strict=True))
    assert len(cut) > 3 and all(p.stat().st_size <= LIMIT for p in cut[1:])


def test_keys_are_those_of_gguf_split(whole: Path, tmp_path: Path) -> None:
    cut = qf.split(whole, tmp_path / "m", LIMIT)
    with formats.open_path(whole) as source:
        tensors = len(source.weights)
    for i, path in enumerate(cut):
        said = fields(path)
        assert said == {"no": i, "count": len(cut), "tensors.count": tensors}
        assert [type(v) for v in said.values()] == [np.uint16, np.uint16, np.int32]


def test_merged_is_the_file_that_was_split(whole: Path, tmp_path: Path) -> None:
    cut = qf.split(whole, tmp_path / "m", LIMIT)
    (merged,) = qf.merge(cut[-1], tmp_path / "merged.gguf")
    assert merged.read_bytes() == whole.read_bytes()
    again = qf.split(cut[1], tmp_path / "n", 2 * LIMIT)  # a set can be cut in another way
    assert len(again) < len(cut)
    assert qf.merge(again[0], tmp_path / "again.gguf")[0].read_bytes() == whole.read_bytes()


def test_a_tensor_with_parts_beside_it(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "NVFP4")
    cut = qf.split(tmp_path / "m.gguf", tmp_path / "m", 500_000)
    assert qf.merge(cut[0], tmp_path / "n.gguf")[0].read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_llama_cpp_loads_a_set(whole: Path, tmp_path: Path) -> None:
    cut = qf.split(whole, tmp_path / "m", LIMIT)
    with Llama(whole) as a, Llama(cut[0]) as b:
        assert np.array_equal(a.logits(list(range(10))), b.logits(list(range(10))))


def test_what_fits_is_one_file(whole: Path, tmp_path: Path) -> None:
    report = qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", max_shard_size="1GB")
    assert Path(report.path) == tmp_path / "m.gguf" and (tmp_path / "m.gguf").read_bytes() == whole.read_bytes()
    (only,) = qf.split(whole, tmp_path / "n", 1 << 30)  # whoever asks for a set gets one, as from gguf-split
    assert only.name == "n-00001-of-00001.gguf" and fields(only)["count"] == 1
    assert qf.merge(only, tmp_path / "merged.gguf")[0].read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("limit", [1, 40_000, 200_000])
def test_a_file_exceeds_the_limit_only_for_one_tensor(limit: int, tmp_path: Path) -> None:
    tensors = {f"t{i}": Stored(get("F32"), (i + 1, 1000)) for i in range(20)}
    header = Header({"general.alignment": 64, "long": "x" * 10_000}, tensors, max_shard_size=limit)
    gguf = formats.get("gguf")
    with gguf.create(tmp_path / "m.gguf", header) as sink:
        for i, (k, t) in enumerate(tensors.items()):
            sink.write(k, {"data": np.full(t.shape, i, np.float32)})
        sink.commit()
    paths = gguf.paths(tmp_path / "m.gguf", header)
    assert sorted(tmp_path.iterdir()) == paths
    for path in paths:
        held = _read_header(MappedFile(path))[1]
        assert len(held) == 1 or path.stat().st_size <= limit
    with formats.open_path(paths[0]) as source:
        assert list(source.weights) == list(tensors)
        assert all((source.read(f"t{i}").decode() == i).all() for i in range(20))
    assert gguf.size(header) == sum(p.stat().st_size for p in paths)


def test_what_cannot_be_merged_or_split(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="a whole file"):
        qf.merge(whole, tmp_path / "merged.gguf")
    cut = qf.split(whole, tmp_path / "m", LIMIT)
    with pytest.raises(OutputError, match="exists already"):
        qf.split(whole, tmp_path / "m", LIMIT)
    with pytest.raises(OutputError, match="being read"):
        qf.split(cut[0], tmp_path / "m", LIMIT, force=True)
    with pytest.raises(OutputError, match=r"m-00001-of-\d+.gguf: exists already"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", max_shard_size=LIMIT)
    cut[2].unlink()
    with pytest.raises(FormatError, match=f"{cut[2].name}: missing: file 3 of {len(cut)}"):
        qf.merge(cut[0], tmp_path / "merged.gguf")
    monkeypatch.setattr("quantforge.formats.gguf._MOST_FILES", 20)
    with pytest.raises(UnsupportedError, match="choose a larger size"):
        formats.get("gguf").size(Header({}, {f"t{i}": Stored(get("F32"), (1,)) for i in range(21)}, max_shard_size=1))
    assert not (tmp_path / "merged.gguf").exists()


def test_a_set_appears_whole_or_not_at_all(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    real = os.replace

    def failing(a: Path, b: Path) -> None:
        if len(replaced) == 2:
            raise OSError(28, "No space left on device")
        replaced.append(b)
        real(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="No space left"):
        qf.split(whole, tmp_path / "m", LIMIT)
    assert len(replaced) == 2 and not list(tmp_path.iterdir())
