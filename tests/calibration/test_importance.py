"""Importance matrices: llama-imatrix's two formats, and files that lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import quantforge
from quantforge.calibration import importance
from quantforge.errors import CalibrationError, FormatError

SHIPPED = Path(quantforge.__file__).parent / "data" / "demo-model" / "llama.cpp-imatrix.gguf"


def write_gguf(path: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    w = gguf.GGUFWriter(path, "")
    w.kv_data[0].clear()
    w.add_string("general.type", "imatrix")
    w.add_array("imatrix.datasets", keys.get("datasets", ["a.txt", "b.txt"]))
    w.add_uint32("imatrix.chunk_count", 7)
    w.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        w.add_tensor(name, values if isinstance(values, np.ndarray) else np.array(values, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def legacy(entries: dict[str, tuple[int, Any]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data = np.asarray(values, "<f4")
        out += struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", calls, data.size) + data.tobytes()
    return out + tail


def test_shipped_file() -> None:
    imatrix = importance.read(SHIPPED)
    assert len(imatrix) == 42
    assert (imatrix.chunks, imatrix.datasets) == (911, ("calib.txt",))
    reader = gguf.GGUFReader(SHIPPED)
    raw = {t.name: t.data for t in reader.tensors}
    for name, values in imatrix.items():
        assert values.dtype == np.float32
        assert values.shape == (768 if "ffn_down" in name else 256,)
        expected = raw[f"{name}.in_sum2"].ravel() / raw[f"{name}.counts"].ravel()
        assert np.array_equal(values, expected) and expected.dtype == np.float32


def test_experts_and_experts_that_saw_nothing(tmp_path: Path) -> None:
    sums = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    name = "blk.0.ffn_up_exps.weight"
    path = write_gguf(tmp_path / "i.gguf", {f"{name}.in_sum2": sums, f"{name}.counts": [[2], [0], [4]]})
    imatrix = importance.read(path)
    assert imatrix.datasets == ("a.txt", "b.txt") and imatrix.chunks == 7
    expected = [[0.5, 1, 1.5, 2], [1, 1, 1, 1], [2.25, 2.5, 2.75, 3]]
    assert np.array_equal(imatrix[name], expected)
    assert np.array_equal(imatrix.of(name, (3, 8, 4)), expected)  # type: ignore[arg-type]
    with pytest.raises(
        CalibrationError, match=r"importance of 12 columns does not fit the tensor's 4; .*i.gguf was made with another"
    ):
        imatrix.of(name, (3, 4))


def test_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 5, 8) + b"wiki.txt"
    path.write_bytes(legacy({"a.weight": (4, [1, 2, 3]), "blk.0.ffn_up_exps.weight": (0, [1, 2, 3, 4])}, tail))
    imatrix = importance.read(path)
    assert (imatrix.chunks, imatrix.datasets) == (5, ("wiki.txt",))
    assert np.array_equal(imatrix["a.weight"], [0.25, 0.5, 0.75])
    assert np.array_equal(imatrix["blk.0.ffn_up_exps.weight"], [1, 2, 3, 4])
    assert np.array_equal(imatrix.of("blk.0.ffn_up_exps.weight", (2, 9, 2)), [[1, 2], [3, 4]])  # type: ignore[arg-type]
    path.write_bytes(legacy({"a.weight": (4, [1, 2, 3])}))
    assert importance.read(path).datasets == ()


def test_of() -> None:
    imatrix = importance.Importance({"x.weight": np.ones(4, np.float32), "token_embd.weight": np.ones(9, np.float32)})
    found = imatrix.of("x.weight", (2, 4))
    assert found is not None and found.shape == (4,)
    assert imatrix.of("y.weight", (2, 4)) is None
    assert imatrix.of("token_embd.weight", (9, 4)) is None  # old files hold its counts of tokens
    with pytest.raises(CalibrationError, match=r"x\.weight: importance of 4 columns does not fit the tensor's 5"):
        imatrix.of("x.weight", (2, 5))


ONE = {"x.weight.in_sum2": [[1.0, 2.0]], "x.weight.counts": [[1.0]]}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.weight": [[1.0]]}, r"not an importance matrix: it has no tensor \*\.in_sum2"),
        ({"x.weight.in_sum2": [[1.0]]}, r"x\.weight\.in_sum2 is there, x\.weight\.counts is not"),
        ({**ONE, "y.weight.counts": [[1.0]]}, r"y\.weight\.counts is there, y\.weight\.in_sum2 is not"),
        ({**ONE, "x.weight.counts": [[1.0], [2.0]]}, r"x\.weight\.in_sum2 has 1 rows, x\.weight\.counts has 2"),
        ({**ONE, "x.weight.counts": [[np.nan]]}, "counts is not finite"),
        ({**ONE, "x.weight.in_sum2": [[1.0, np.inf]]}, r"x\.weight has negative or non-finite values"),
        ({**ONE, "x.weight.in_sum2": [[1.0, -1.0]]}, r"x\.weight has negative or non-finite values"),
        ({"x.weight.in_sum2": [[1e38]], "x.weight.counts": [[1e-38]]}, r"x\.weight has negative or non-finite values"),
        ({**ONE, "x.weight.in_sum2": np.ones((1, 2), np.float16)}, r"x\.weight\.in_sum2 is F16; an importance matrix is F32"),
    ],
)
def test_gguf_files_that_lie(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "bad.gguf", tensors)
    with pytest.raises(FormatError, match=message) as e:
        importance.read(path)
    assert e.value.path == str(path)


def test_gguf_metadata_of_the_wrong_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bad.gguf", ONE, datasets=[1, 2])
    with pytest.raises(FormatError, match=r"imatrix\.datasets an array of strings"):
        importance.read(path)


def test_every_cut_of_a_file_is_a_format_error(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    whole = legacy({"a.weight": (4, [1, 2, 3]), "b.weight": (1, [4])}, struct.pack("<ii", 5, 3) + b"abc")
    without_tail = len(whole) - 11
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        if n == without_tail:
            importance.read(path)
            continue
        with pytest.raises(FormatError):
            importance.read(path)
    data = write_gguf(tmp_path / "one.gguf", ONE).read_bytes()
    for n in range(0, len(data) - 40, 7):  # the last bytes are padding
        path.write_bytes(data[:n])
        with pytest.raises(FormatError):
            importance.read(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\xff\xff\xff\x7f" + bytes(64),
        b"PK\x03\x04" + bytes(1000),
        struct.pack("<ii", 1, -5) + bytes(64),
        struct.pack("<ii", 1, 2**31 - 1) + bytes(64),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(64),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1) + bytes(64),
        legacy({"a": (1, [np.nan])}),
        legacy({"a": (1, [-1.0])}),
        struct.pack("<i", 2) + legacy({"a": (1, [1.0])})[4:] * 2,
    ],
)
def test_legacy_files_that_lie(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        importance.read(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read the importance matrix: No such file"):
        importance.read(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="Is a directory"):
        importance.read(tmp_path)
