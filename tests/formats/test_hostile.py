"""Damaged and hostile files: FormatError with path and offset, nothing else, and little memory."""

from __future__ import annotations

import itertools
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantforge import formats
from quantforge.errors import FormatError

HUGE = (2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(s: str | bytes) -> bytes:
    data = s.encode() if isinstance(s, str) else s
    return u64(len(data)) + data


# A small GGUF file as labelled fields, so that each can be replaced.
FIELDS: dict[str, bytes] = {
    "magic": b"GGUF",
    "version": u32(3),
    "n_tensors": u64(2),
    "n_metadata": u64(5),
    "key0": text("general.alignment"),
    "type0": u32(4),
    "alignment": u32(32),
    "key1": text("tokens"),
    "type1": u32(9),
    "tokens.type": u32(8),
    "tokens.n": u64(2),
    "token0.len": u64(1),
    "token0": b"a",
    "token1": text("bc"),
    "key2": text("scores"),
    "type2": u32(9),
    "scores.type": u32(6),
    "scores.n": u64(2),
    "scores": struct.pack("<2f", 1, 2),
    "key3": text("flag"),
    "type3": u32(7),
    "flag": b"\1",
    "key4": text("nested"),
    "type4": u32(9),
    "nested.type": u32(9),
    "nested.n": u64(1),
    "nested.inner": u32(0) + u64(1) + b"\7",
    "name0.len": u64(8),
    "name0": b"a.weight",
    "n_dims0": u32(2),
    "dim00": u64(32),
    "dim01": u64(2),
    "kind0": u32(8),  # Q8_0: 34 bytes per 32 weights
    "offset0": u64(0),
    "name1": text("b"),
    "n_dims1": u32(1),
    "dim10": u64(3),
    "kind1": u32(0),  # F32
    "offset1": u64(96),
}
DATA = bytes(range(96)) + struct.pack("<3f", 1, 2, 3) + bytes(20)


def gguf(data: bytes = DATA, **changes: bytes) -> bytes:
    assert changes.keys() <= FIELDS.keys()
    head = b"".join({**FIELDS, **changes}.values())
    return head + bytes(-len(head) % 32) + data


def opened(path: Path, data: bytes) -> FormatError | None:
    """Open and read everything; the FormatError, if that was the end."""
    path.write_bytes(data)
    try:
        with formats.get("gguf" if path.suffix == ".gguf" else "safetensors").open(path) as source:
            for name in source.weights:
                source.read(name).tobytes()
    except FormatError as e:
        error = e
    else:
        return None
    assert error.path == str(path)
    assert error.offset is not None and 0 <= error.offset <= len(data), error
    assert str(error).isprintable() and len(str(error)) < 1000
    return error


def refused(path: Path, data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        error = opened(path, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error is not None, "accepted"
    assert message in str(error)
    assert peak < 500_000 + 8 * len(data)


def test_the_undamaged_file_is_good(tmp_path: Path) -> None:
    assert opened(tmp_path / "m.gguf", gguf()) is None
    source = formats.open_path(tmp_path / "m.gguf")
    assert source.config["tokens"] == ["a", "bc"]
    assert source.weights["a.weight"].shape == (2, 32)
    assert source.read("b").parts["data"].tolist() == [1, 2, 3]


CASES: list[tuple[str, dict[str, bytes]]] = [
    ("begins with", {"magic": b"GGML"}),
    ("big-endian", {"version": struct.pack(">I", 3)}),
    ("big-endian", {"version": struct.pack(">I", 2)}),
    *(("GGUF version", {"version": u32(v)}) for v in (0, 1, 4, 2**32 - 1)),
    *(("cannot fit", {"n_tensors": u64(n)}) for n in HUGE),
    *(("cannot fit", {"n_metadata": u64(n)}) for n in HUGE),
    ("", {"n_tensors": u64(3)}),
    ("", {"n_metadata": u64(6)}),
    ("", {"n_metadata": u64(4)}),
    *(("a metadata key of", {"key0": u64(n)}) for n in (0, 65536, *HUGE)),
    ("not UTF-8", {"key0": text(b"\xff\xfe")}),
    ("NUL", {"key0": text(b"a\0b")}),
    ("appears twice", {"key1": text("scores")}),
    *(("unknown value type", {"type0": u32(t)}) for t in (13, 255, 2**32 - 1)),
    *(("general.alignment is", {"alignment": u32(n)}) for n in (0, 1, 2, 4, 24, 33, 2**22, 2**31, 2**32 - 1)),
    *(("general.alignment is", {"type0": u32(t)}) for t in (5, 6)),
    ("general.alignment is", {"type0": u32(10), "alignment": u64(32)}),
    ("general.alignment is", {"type0": u32(8), "alignment": text("32")}),
    ("not a multiple of the alignment 64", {"alignment": u32(64)}),
    *(("of an array", {"tokens.type": u32(t)}) for t in (13, 2**32 - 1)),
    *(("cannot fit", {"tokens.n": u64(n)}) for n in HUGE),
    *(("cannot fit", {"scores.n": u64(n)}) for n in HUGE),
    *(("cannot fit", {"nested.n": u64(n)}) for n in HUGE),
    *(("a string of", {"token0.len": u64(n)}) for n in HUGE),
    ("truncated: a string", {"token0.len": u64(10_000)}),
    ("neither 0 nor 1", {"flag": b"\2"}),
    ("neither 0 nor 1", {"scores.type": u32(7), "scores": b"\1\3"}),
    ("nested more than", {"nested.inner": (u32(9) + u64(1)) * 4 + u32(0) + u64(0)}),
    ("nested more than", {"nested.inner": (u32(9) + u64(1)) * 5000 + u32(0) + u64(0)}),
    *(("a tensor's name of", {"name0.len": u64(n)}) for n in (0, 65536, *HUGE)),
    ("not UTF-8", {"name0": b"a.we\xffght"}),
    ("NUL", {"name0": b"a.we\0ght"}),
    ("appears twice", {"name0.len": u64(1), "name0": b"b"}),
    *(("dimensions; 1 to 4", {"n_dims0": u32(n)}) for n in (0, 5, 2**31, 2**32 - 1)),
    ("dimension of 0", {"dim00": u64(0)}),
    ("dimension of 0", {"dim01": u64(0)}),
    ("block size", {"dim00": u64(33)}),
    *(("the whole file has", {"dim01": u64(n)}) for n in HUGE),
    *(("the whole file has", {"dim10": u64(n)}) for n in HUGE),
    ("the whole file has", {"dim00": u64(2**63), "dim01": u64(2**63)}),
    *(("unknown type", {"kind0": u32(n)}) for n in (4, 5, 31, 36, 1000, 2**31, 2**32 - 1)),
    ("which quantforge does not read", {"kind0": u32(15)}),
    *(("not a multiple", {"offset1": u64(n)}) for n in (1, 31, 95, 97)),
    *(("ends at byte", {"offset1": u64(n)}) for n in (128, 2**32, 2**63, 2**64 - 32)),
    *(("ends at byte", {"offset0": u64(n)}) for n in (128, 2**63)),
    ("within tensor", {"offset1": u64(0)}),
    ("within tensor", {"offset1": u64(64)}),
    ("within tensor", {"offset0": u64(32)}),
    ("within tensor", {"dim01": u64(3)}),
]


@pytest.mark.parametrize(("message", "changes"), CASES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_every_field_of_a_gguf(tmp_path: Path, message: str, changes: dict[str, bytes]) -> None:
    refused(tmp_path / "m.gguf", gguf(**changes), message)


def test_the_error_tells_the_byte(tmp_path: Path) -> None:
    error = opened(tmp_path / "m.gguf", gguf(offset1=u64(97)))
    assert error is not None
    assert error.offset == gguf().index(u64(96) + bytes(3))
    assert str(error).startswith(f"{tmp_path / 'm.gguf'} at byte {error.offset}: tensor b is at offset 97")


def test_gguf_truncated_anywhere(tmp_path: Path) -> None:
    whole = gguf()
    for n in range(len(whole) - 20):  # the padding after the last tensor may be missing
        assert opened(tmp_path / "m.gguf", whole[:n]) is not None or n == 0, n


def flips(data: bytes) -> Any:
    for i in range(len(data)):
        for value in {data[i] ^ 1, data[i] ^ 0x80, 0, 0xFF, (data[i] + 1) & 255} - {data[i]}:
            yield data[:i] + bytes([value]) + data[i + 1 :]


def test_gguf_with_any_byte_changed(tmp_path: Path) -> None:
    """Opens or FormatError, whatever byte is damaged."""
    results = [opened(tmp_path / "m.gguf", data + DATA) is None for data in flips(gguf()[: -len(DATA)])]
    assert {True, False} == set(results)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_gguf_with_random_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(gguf())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        cut = data.draw(st.integers(0, 16))
        whole[at : at + cut] = data.draw(st.binary(max_size=16))
    opened(tmp_path_factory.getbasetemp() / "random.gguf", bytes(whole))


def sparse(path: Path, data: bytes, size: int) -> None:
    path.write_bytes(data)
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("changes", "cut", "message"),
    [
        ({"tokens.n": u64(2**33)}, "token0.len", "array elements"),
        ({"scores.n": u64(2**35)}, "scores", "array elements"),
        ({"nested.n": u64(2**20)}, "nested.inner", "array elements"),
        ({"token0.len": u64(2**36)}, "token0", "a string of"),
        ({"n_tensors": u64(2**30), "n_metadata": u64(0)}, "key0", "a tensor's name of 0"),
        ({"n_metadata": u64(2**30)}, "key0", "a metadata key of 0"),
    ],
)
def test_a_vast_sparse_file_does_not_help(tmp_path: Path, changes: dict[str, bytes], cut: str, message: str) -> None:
    """A hundred gigabytes of holes cost an attacker nothing; they must not cost us memory either."""
    fields = list(itertools.takewhile(lambda k: k != cut, FIELDS))
    path = tmp_path / "m.gguf"
    sparse(path, b"".join({**FIELDS, **changes}[k] for k in fields), 10**11)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            formats.open_path(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# ---- safetensors


TENSORS: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def safetensors(head: Any = TENSORS, data: bytes = bytes(22)) -> bytes:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    return u64(len(raw)) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {**TENSORS, "a": {**TENSORS["a"], **changes}}


HEADERS: list[tuple[str, Any]] = [
    ("does not begin with {", b"[]"),
    ("does not begin with {", b' {"a": 1}'),
    ("not valid JSON", b"{"),
    ("not valid JSON", b'{"a": }'),
    ("not valid JSON", b"{} x"),
    ("not UTF-8", b'{"\xff": 1}'),
    ("appears twice", b'{"a": 1, "a": 2}'),
    ("appears twice", json.dumps(TENSORS).encode().replace(b'"shape": [3]', b'"shape": [3], "shape": [3]')),
    ("nested too deep", b'{"a":' * 200_000),
    ("too many digits", b'{"a": ' + b"9" * 5000 + b"}"),
    ("__metadata__", {**TENSORS, "__metadata__": {"a": 1}}),
    ("__metadata__", {**TENSORS, "__metadata__": ["a"]}),
    ("must have dtype", {**TENSORS, "a": 5}),
    ("must have dtype", {**TENSORS, "a": {}}),
    ("must have dtype", entry(more=1)),
    ("not valid Unicode", {**TENSORS, "\ud800": TENSORS["b"]}),
    *(("dtype", entry(dtype=d)) for d in ("F31", "", 5, None, ["F32"], "f32")),
    *(("not a list of sizes", entry(shape=s)) for s in (5, None, "22", [2.0, 2], [True, 4], [-2, -2], [2**63], [None], [1] * 65)),
    *(("not two sizes", entry(data_offsets=o)) for o in (5, [0], [0, 16, 16], [0.0, 16], [-16, 0], ["0", "16"], [0, 2**64])),
    ("takes 16 bytes", entry(data_offsets=[0, 15])),
    ("takes 16 bytes", entry(data_offsets=[16, 0])),
    ("takes 20 bytes", entry(shape=[5])),
    ("too large", entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
    ("the one before ends at", entry(data_offsets=[6, 22])),
    ("the one before ends at", {"a": TENSORS["a"]} | {"b": {**TENSORS["b"], "data_offsets": [10, 16]}}),
    ("the one before ends at", {"b": TENSORS["b"]}),
    ("belong to none", {"a": TENSORS["a"]}),
    ("truncated", {**TENSORS, "c": {"dtype": "U8", "shape": [2**40], "data_offsets": [22, 22 + 2**40]}}),
]


def test_the_undamaged_safetensors_is_good(tmp_path: Path) -> None:
    assert opened(tmp_path / "m.safetensors", safetensors()) is None
    assert opened(tmp_path / "m.safetensors", safetensors(json.dumps(TENSORS).encode() + b"   ")) is None
    assert opened(tmp_path / "m.safetensors", safetensors({}, b"")) is None


@pytest.mark.parametrize(("message", "head"), HEADERS, ids=[f"{i}" for i in range(len(HEADERS))])
def test_every_field_of_a_safetensors_header(tmp_path: Path, message: str, head: Any) -> None:
    refused(tmp_path / "m.safetensors", safetensors(head), message)


@pytest.mark.parametrize("length", [2, 10_000, 100_000_000, 100_000_001, 2**32, 2**63, 2**64 - 1])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    refused(tmp_path / "m.safetensors", u64(length) + safetensors()[8:], "")


def test_safetensors_truncated_anywhere_or_too_long(tmp_path: Path) -> None:
    whole = safetensors()
    for n in range(1, len(whole)):
        assert opened(tmp_path / "m.safetensors", whole[:n]) is not None, n
    refused(tmp_path / "m.safetensors", whole + b"\0", "belong to none")


def test_safetensors_with_any_byte_changed(tmp_path: Path) -> None:
    results = [opened(tmp_path / "m.safetensors", data + bytes(22)) is None for data in flips(safetensors()[:-22])]
    assert {True, False} == set(results)


def test_a_vast_sparse_safetensors(tmp_path: Path) -> None:
    sparse(tmp_path / "m.safetensors", u64(90_000_000), 10**11)
    with pytest.raises(FormatError, match="does not begin"):
        formats.open_path(tmp_path / "m.safetensors")


@pytest.mark.parametrize("make", [lambda: gguf(name0=b"a\n\x1b[31m\r\t"), lambda: gguf(key0=text("x" * 60_000), type0=u32(77))])
def test_messages_are_short_single_lines(tmp_path: Path, make: Callable[[], bytes]) -> None:
    data = make()
    if b"\x1b" in data:
        data = data.replace(u32(8) + u64(0), u32(99) + u64(0))
    error = opened(tmp_path / "m.gguf", data)
    assert error is not None and str(error).isprintable() and len(str(error)) < 1000


def test_gguf_numbers_are_not_copied_from_beyond_the_file(tmp_path: Path) -> None:
    """A count that fits the file's bytes but not what is left after the array began."""
    n = len(gguf()) // 4
    assert opened(tmp_path / "m.gguf", gguf(**{"scores.n": u64(n)})) is not None
    assert np.all(formats.get("gguf").open(_write(tmp_path, gguf())).config["scores"] == [1, 2])


def _write(tmp_path: Path, data: bytes) -> Path:
    (tmp_path / "good.gguf").write_bytes(data)
    return tmp_path / "good.gguf"
