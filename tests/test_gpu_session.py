"""What the session with a GPU does with steps that hang, fail or come too late; in which order tests come."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_session import Session, Step
from benchmarks.on_gpu import order, smoke


def python(code: str, name: str = "step", seconds: float = 60, least: float = 0) -> Step:
    return Step(name, [sys.executable, "-S", "-c", code], seconds, least)


def said(session: Session) -> list[dict[str, str]]:
    return [json.loads(line) for line in (session.out / "session.jsonl").read_text().splitlines()]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path / "out", 100, 1)


def test_steps_are_told_of_as_they_end(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert session.run(python("print('well')"))
    assert not session.run(python("print('why it fails'); raise SystemExit(3)", "second"))
    assert session.run(python("print('again')", "third"))
    assert [r["result"].split(" after")[0] for r in said(session)] == ["ok", "exit status 3", "ok"]
    assert session.failed == ["second"] and "why it fails" in capsys.readouterr().out
    assert "again" in (session.out / "log").read_text()


@pytest.mark.parametrize("why", ["it hangs", "its time is over"])
def test_what_takes_too_long_is_killed_with_its_children(why: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "QUIET", 1.5 if why == "it hangs" else 100)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    started = f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}])"
    code = f"import subprocess, sys, time; print({started}.pid, flush=True); time.sleep(300)"
    began = time.monotonic()
    assert not session.run(python(code, seconds=2 if why != "it hangs" else 60))
    assert time.monotonic() - began < 30
    (row,) = said(session)
    assert row["result"].startswith("killed after") and row["why"].startswith(why)
    number = int((session.out / "log").read_text().split()[-1])
    for _ in range(100):  # a zombie, until whoever adopted it looks
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(number, 9)
    pytest.fail("the child lives on")


def test_nothing_begins_without_the_time_it_needs(tmp_path: Path) -> None:
    session = Session(tmp_path, 20, 1)
    assert not session.run(python("print()", least=60))
    assert said(session)[0]["result"] == "left out:" and not session.failed


def test_after_a_smoke_test_that_fails_nothing_runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "smoke", lambda a, *options: [sys.executable, "-S", "-c", "raise SystemExit('no product')"])
    monkeypatch.setattr(gpu_session, "tests", lambda *_: pytest.fail("went on"))
    gpu_session.first(argparse.Namespace(device="cuda", out=session.out), session)
    assert session.failed == ["smoke"] and len(said(session)) == 2


def test_the_smoke_test_names_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: object, names: list[str]) -> str:
        raise RuntimeError("not the CPU's bytes")

    monkeypatch.setitem(smoke.CHECKS, "encode", wrong)
    file = tmp_path / "lines"
    monkeypatch.setattr(sys, "argv", ["smoke", "--device", "cpu", "--only", "load,encode,graph", "--json", str(file)])
    with pytest.raises(SystemExit) as caught:
        smoke.main()
    assert caught.value.code == 1 and "encode: failed: RuntimeError: not the CPU's bytes" in capsys.readouterr().out
    assert [(r["check"], r["ok"]) for r in map(json.loads, file.read_text().splitlines())] == [("load", True), ("encode", False)]


def test_one_case_of_every_kernel_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def item(test: str, codec: str, dtype: str) -> SimpleNamespace:
        return SimpleNamespace(name=f"{test}[{codec}-{dtype}]", callspec=SimpleNamespace(params={"codec": codec, "dtype": dtype}))

    names = ("test_other", "test_dequantize", "test_linear")
    parts = {}
    for part in ("first", "rest", ""):
        monkeypatch.setenv("QUANTFORGE_GPU_TESTS", part)
        found = [item(test, codec, dtype) for test in names for dtype in "ab" for codec in ("Q4_0", "Q8_0")]
        order.pytest_collection_modifyitems(None, found)  # type: ignore[arg-type]
        parts[part] = [i.name for i in found]
    assert parts["first"] == [f"{t}[{c}-a]" for t in ("test_linear", "test_dequantize", "test_other") for c in ("Q4_0", "Q8_0")]
    assert parts[""] == parts["first"] + parts["rest"] and len(parts[""]) == 12
