"""Sinks: threads, row ranges, completeness, and nothing at the final name unless it is whole."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantforge import codecs, formats
from quantforge.errors import OutputError
from quantforge.formats import Header, Stored

RNG = np.random.default_rng(1)
Q8 = codecs.get("Q8_0")
TENSORS = {
    "e.weight": Stored(codecs.get("BF16"), (64, 96)),
    "q.weight": Stored(Q8, (48, 64)),
    "x.weight": Stored(Q8, (4, 12, 32)),
    "n.weight": Stored(codecs.get("F32"), (64,)),
}
HEADER = Header({}, TENSORS)
FORMATS = ["gguf", "safetensors"]


def random_parts(stored: Stored) -> dict[str, np.ndarray]:
    return {
        k: RNG.integers(0, 256, info.nbytes, np.uint8).view(info.dtype).reshape(info.shape)
        for k, info in stored.codec.layout(stored.shape).items()
    }


PARTS = {k: random_parts(v) for k, v in TENSORS.items()}


def target(tmp_path: Path, format: str) -> Path:
    return tmp_path / ("m.gguf" if format == "gguf" else "model")


def fill(sink: formats.Sink) -> None:
    for name, parts in PARTS.items():
        sink.write(name, parts)


def check(path: Path) -> None:
    source = formats.open_path(path)
    assert set(source.weights) == set(TENSORS)
    for name, parts in PARTS.items():
        e = source.read(name)
        assert (e.codec, e.shape) == (TENSORS[name].codec, TENSORS[name].shape)
        assert {k: v.tobytes() for k, v in e.parts.items()} == {k: v.tobytes() for k, v in parts.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_rows_in_any_order_from_many_threads(tmp_path: Path, format: str) -> None:
    jobs: list[tuple[str, dict[str, np.ndarray], int]] = []
    for name, stored in TENSORS.items():
        rows = int(np.prod(stored.shape[:-1]))
        cuts = sorted({0, rows, *(int(c) for c in RNG.integers(0, rows + 1, 9))})
        for a, b in itertools.pairwise(cuts):
            jobs.append((name, {k: v.reshape(rows, -1)[a:b] for k, v in PARTS[name].items()}, a))
    random.Random(2).shuffle(jobs)
    path = target(tmp_path, format)
    with formats.get(format).create(path, HEADER) as sink, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(sink.write, *job) for job in jobs]:
            done.result()
        assert not path.exists()
        sink.commit()
    check(path)
    with formats.get(format).create(target(tmp_path / "..", format), HEADER) as whole:
        fill(whole)
        # same bytes as one write per tensor
        whole.commit()
    a, b = ([p] if p.is_file() else sorted(p.iterdir()) for p in (path, target(tmp_path / "..", format)))
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_strided_rows_are_stored_in_order(tmp_path: Path) -> None:
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    with formats.get("gguf").create(tmp_path / "m.gguf", Header({}, {"w": Stored(codecs.get("F32"), (4, 3))})) as sink:
        sink.write("w", {"data": w.T})
        sink.commit()
    assert formats.open_path(tmp_path / "m.gguf").read("w").parts["data"].tolist() == w.T.tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_incomplete_or_doubled_is_not_committed(tmp_path: Path, format: str) -> None:
    q = PARTS["q.weight"]["data"]
    for extra, message in [
        ((), "n.weight: data is 256 bytes, 0 arrived"),
        ((0, 10), "q.weight: data is 3264 bytes, 680 arrived"),
        ((0, 10, 11, 48), "q.weight: data from byte 680 on never arrived"),
        ((0, 30, 20, 48), "q.weight: data from byte 1360 on was written twice"),
    ]:
        with formats.get(format).create(target(tmp_path, format), HEADER) as sink:
            for name in TENSORS:
                if name != ("q.weight" if extra else "n.weight"):
                    sink.write(name, PARTS[name])
            for a, b in zip(extra[::2], extra[1::2], strict=True):
                sink.write("q.weight", {"data": q[a:b]}, a)
            with pytest.raises(OutputError, match=message):
                sink.commit()
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "parts", "row"),
    [
        ("nope", {"data": np.zeros(1)}, 0),
        ("q.weight", {}, 0),
        ("q.weight", {"data": PARTS["q.weight"]["data"], "more": np.zeros(1)}, 0),
        ("q.weight", {"data": PARTS["q.weight"]["data"].view(np.int8)}, 0),
        ("q.weight", {"data": PARTS["q.weight"]["data"][:, :-1]}, 0),
        ("q.weight", {"data": PARTS["q.weight"]["data"]}, 1),
        ("q.weight", {"data": PARTS["q.weight"]["data"][:1]}, -1),
        ("q.weight", {"data": PARTS["q.weight"]["data"][:1]}, 48),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, name: str, parts: Any, row: int) -> None:
    with formats.get("gguf").create(tmp_path / "m.gguf", HEADER) as sink, pytest.raises(OutputError, match=name):
        sink.write(name, parts, row)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing(tmp_path: Path, format: str, error: type[BaseException]) -> None:
    def convert() -> None:
        with formats.get(format).create(target(tmp_path, format), HEADER) as sink:
            sink.write("n.weight", PARTS["n.weight"])
            raise error

    with pytest.raises(error):
        convert()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync", "open"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["ctrl-c", "full"])
def test_failure_at_any_system_call_leaves_nothing(
    tmp_path: Path, format: str, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(fail_at: int) -> int:
        """Runs with the `fail_at`th call failing; returns the calls made."""
        made = 0
        real = getattr(os, call)

        def fails(*args: Any, **options: Any) -> Any:
            nonlocal made
            if options or str(args[0]).endswith(".old"):  # rmtree's, behind our back
                return real(*args, **options)
            made += 1
            if made == fail_at:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with formats.get(format).create(target(tmp_path, format), HEADER) as sink:
                fill(sink)
                sink.commit()
        return made

    n = convert(0)
    path = target(tmp_path, format)
    for f in [path] if path.is_file() else path.iterdir():
        f.write_bytes(b"x" * 100) if format == "gguf" else None
    before = path.read_bytes() if path.is_file() else sorted(p.name for p in path.iterdir())
    syncs_of_parent = {"fsync": 1, "open": 1}.get(call, 0)  # after the rename the file stands
    for i in range(1, n + 1 - syncs_of_parent):
        with pytest.raises((KeyboardInterrupt, OutputError)) as caught:
            convert(i)
        if isinstance(caught.value, OutputError):
            assert str(caught.value) == f"{path}: cannot write: No space left on device"
        assert (path.read_bytes() if path.is_file() else sorted(p.name for p in path.iterdir())) == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", FORMATS)
def test_a_real_limit_on_file_size(tmp_path: Path, format: str) -> None:
    code = f"""
        import resource, signal
        from pathlib import Path
        from quantforge import codecs, formats
        from quantforge.errors import OutputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        header = formats.Header({{}}, {{"w": formats.Stored(codecs.get("F32"), (1000, 10))}})
        try:
            formats.get({format!r}).create(Path({str(target(tmp_path, format))!r}), header)
        except OutputError as e:
            print(e)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{target(tmp_path, format)}: cannot write: File too large\n"
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    header = Header({}, {"w": Stored(codecs.get("F32"), (2**40, 2**20))})
    with pytest.raises(OutputError, match=r"the result takes 46116860184\d+ bytes and only \d+ are free"):
        formats.get("gguf").create(tmp_path / "m.gguf", header)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_targets_that_cannot_be(tmp_path: Path, format: str) -> None:
    create = formats.get(format).create
    with pytest.raises(OutputError, match=r"directory .* does not exist"):
        create(tmp_path / "no" / "out", HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory"):
        create(tmp_path / "file" / "out", HEADER)
    with pytest.raises(OutputError, match="is not a"):
        create(Path(os.devnull), HEADER)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match=r"not a (regular file|plain checkpoint)"):
        create(tmp_path / "home", HEADER)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "home", "thesis.txt"]


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    (tmp_path / "ro").mkdir(mode=0o555)
    if os.access(tmp_path / "ro", os.W_OK):
        pytest.skip("running as root: every directory can be written")
    return tmp_path / "ro"


@pytest.mark.parametrize("format", FORMATS)
def test_unwritable_directory(read_only: Path, format: str) -> None:
    with pytest.raises(OutputError, match="cannot write: Permission denied"):
        formats.get(format).create(target(read_only, format), HEADER)


@pytest.mark.parametrize("format", FORMATS)
def test_commit_replaces_and_abort_after_it_is_harmless(tmp_path: Path, format: str) -> None:
    path = target(tmp_path, format)
    for _ in range(2):
        with formats.get(format).create(path, HEADER) as sink:
            fill(sink)
            sink.commit()
            sink.abort()
            with pytest.raises(OutputError, match="after commit"):
                sink.write("n.weight", PARTS["n.weight"])
        check(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", FORMATS)
def test_killed_in_the_middle(tmp_path: Path, format: str) -> None:
    """SIGKILL: the final name keeps what it had; only a temporary file may be left."""
    path = target(tmp_path, format)
    code = f"""
        import os, signal
        from pathlib import Path
        from quantforge import codecs, formats
        stored = formats.Stored(codecs.get("F32"), (4,))
        sink = formats.get({format!r}).create(Path({str(path)!r}), formats.Header({{}}, {{"a": stored, "b": stored}}))
        import numpy as np
        sink.write("a", {{"data": np.ones(4, np.float32)}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    for before in (False, True):
        if before:
            with formats.get(format).create(path, HEADER) as sink:
                fill(sink)
                sink.commit()
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert path.exists() == before
        assert all(p.name.startswith(".quantforge-") and p.suffix == ".tmp" for p in tmp_path.iterdir() if p != path)
    check(path)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with formats.get("gguf").create(tmp_path / "m.gguf", HEADER) as sink:
            fill(sink)
            sink.commit()
    finally:
        os.umask(before)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o640
