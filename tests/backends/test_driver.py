"""How a library is run: what is ours of it, with a fake library that hands over a checkpoint made beforehand.
The real libraries are run by tests/clients/test_backends.py (`make test-backends`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge.demo import MODEL
from quantforge.errors import BackendError, FormatError, OutputError, RecipeError, UnsupportedError

FAKE = """
import json, os, shutil, signal, sys, time
mode = os.environ.get("FAKE_MODE", "")
if mode == "incompatible":
    raise ImportError("cannot import name 'no_init_weights' from 'transformers'")

class BACKEND:
    AWQ_TORCH = "awq_torch"

class QuantizeConfig(dict):
    pass

class GPTQModel:
    @classmethod
    def load(cls, model, config, device, trust_remote_code):
        self = cls()
        self.told = {"config": config, "device": device, "files": sorted(os.listdir(model)), "cwd": os.getcwd()}
        return self

    def quantize(self, rows, batch_size, **more):
        self.told |= {"rows": [r["input_ids"] for r in rows], "more": more, "pid": os.getpid()}
        with open(os.environ["FAKE_TOLD"], "w") as f:
            json.dump(self.told, f)
        print("progress 1\\rprogress 2\\x1b[1m")
        if mode == "raise":
            raise RuntimeError("the Hessian is singular\\nsecond line")
        if mode == "exit":
            print("giving up now"); sys.stdout.flush(); os._exit(3)
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "hang":
            time.sleep(600)

    def save(self, out):
        shutil.copytree(os.environ["FAKE_MADE"], out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            with open(os.path.join(out, name), "w") as f:
                f.write("{}")
        if mode == "garbage":
            with open(os.path.join(out, "model.safetensors"), "wb") as f:
                f.write(b"no")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "m"
    qf.convert(MODEL, path, format="gptq", bits=4, group_size=32)
    return path


@pytest.fixture
def fake(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `import gptqmodel` find the fake in this interpreter's children; returns where it says what it was told."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "gptqmodel.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_MADE", str(made))
    monkeypatch.setenv("FAKE_TOLD", str(tmp_path / "told.json"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "out").mkdir()
    return tmp_path / "told.json"


def convert(out: Path, **options: object) -> qf.Report:
    return qf.convert(MODEL, out, backend="gptqmodel", calibration_chunks=2, **options)


def test_checkpoint_as_the_library_wrote_it(fake: Path, made: Path) -> None:
    out = fake.parent / "out"
    report = convert(out / "m", group_size=32, measure=True, damping=0.05)
    told = json.loads(fake.read_text())
    assert told["config"] == {"bits": 4, "group_size": 32, "sym": True, "format": "gptq", "damp_percent": 0.05}
    assert told["device"] == "cpu" and np.asarray(told["rows"]).shape == (2, 256)
    assert "config.json" in told["files"] and "model.safetensors" in told["files"]
    assert (out / "m" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert (out / "m" / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()  # not the library's
    config = json.loads((out / "m" / "config.json").read_text())
    assert config["quantforge.method"].startswith("gptq (gptqmodel")
    assert config["quantization_config"] == json.loads((made / "config.json").read_text())["quantization_config"]
    assert os.listdir(out) == ["m"]
    assert report.total_bytes == (out / "m" / "model.safetensors").stat().st_size
    assert {t.type for t in report.tensors} == {"BF16", "int4-g32-sym"}
    quantized = [t for t in report.tensors if t.type == "int4-g32-sym"]
    assert len(quantized) == 42
    assert all(t.method.startswith("gptq (gptqmodel") and 0.05 < (t.rel_rmse or 0) < 0.15 for t in quantized)
    with qf.open(out / "m") as source:
        assert source.read("model.layers.0.mlp.up_proj.weight").codec.name == "int4-g32-sym"


def test_the_same_tokens_as_the_built_in_methods(fake: Path) -> None:
    from quantforge.calibration.gather import read_windows
    from quantforge.tokenizer import Tokenizer

    convert(fake.parent / "out" / "m", calibration_ctx=64)
    with qf.open(MODEL) as source:
        ids = read_windows("builtin", Tokenizer(MODEL, source.config, gguf_metadata=False), 64, 2, spread=True)
    assert json.loads(fake.read_text())["rows"] == ids.tolist()


@pytest.mark.parametrize("options", [{"recipe": "Q4_0"}, {"bits": 4, "group_size": 32}], ids=str)
def test_gguf_takes_the_integers_over(options: dict, fake: Path, made: Path, tmp_path: Path) -> None:
    report = convert(tmp_path / "out" / "m.gguf", measure=True, **options)
    assert json.loads(fake.read_text())["config"]["group_size"] == 32
    with qf.open(made) as theirs, qf.open(tmp_path / "out" / "m.gguf") as ours:
        a, b = theirs.read("model.layers.1.mlp.down_proj.weight"), ours.read("blk.1.ffn_down.weight")
        assert b.codec.name == "Q4_0"
        assert "recipe" in options or ours.weights["token_embd.weight"].codec.name == "BF16"
        assert np.array_equal(a.decode(), b.decode())
        assert ours.config["quantforge.method"].startswith("gptq (gptqmodel")
    found = {t.name: t for t in report.tensors}["blk.1.ffn_down.weight"]
    assert 0.05 < found.rel_rmse < 0.15  # against the model, not against the library's file
    assert os.listdir(tmp_path / "out") == ["m.gguf"]


def test_any_format(fake: Path, tmp_path: Path) -> None:
    report = convert(tmp_path / "out" / "m.gguf", recipe="Q4_K_M", bits=4, group_size=32)
    assert {t.type for t in report.tensors if t.name.startswith("blk.0.ffn")} <= {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"}
    convert(tmp_path / "out" / "ct", format="compressed-tensors", bits=4, group_size=32)
    with qf.open(tmp_path / "out" / "ct") as source:
        assert source.config["quantization_config"]["quant_method"] == "compressed-tensors"
    convert(tmp_path / "out" / "v2", format="gptq", bits=4, group_size=32, version="gptq_v2")
    with qf.open(tmp_path / "out" / "v2") as source:
        assert source.config["quantization_config"]["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raise", r"failed: RuntimeError: the Hessian is singular \(all it said: .*\.log\); gptqmodel 7\.6\.0 .*built-in"),
        ("exit", r"failed: giving up now"),
        ("kill", r"failed: ended by SIGKILL, perhaps for want of memory"),
        (
            "incompatible",
            r"cannot be imported \(ImportError: cannot import name .*gptqmodel 7\.6\.0 with transformers .*built-in",
        ),
    ],
)
def test_one_line_for_every_failure(mode: str, message: str, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", mode)
    with pytest.raises(BackendError, match=message) as caught:
        convert(fake.parent / "out" / "m")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert os.listdir(fake.parent / "out") == []
    if kept := re.search(r"all it said: (\S+\.log)", str(caught.value)):
        assert "progress 1" in Path(kept[1]).read_text()


def test_a_damaged_checkpoint(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "garbage")
    with pytest.raises(FormatError):
        convert(fake.parent / "out" / "m")
    assert os.listdir(fake.parent / "out") == []


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # ended, not yet waited for
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_library_ends_with_us(how: signal.Signals, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODE", "hang")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{Path(qf.__file__).parent.parent}")
    command = [sys.executable, "-m", "quantforge", "convert", str(MODEL), str(fake.parent / "out" / "m")]
    command += ["--backend", "gptqmodel", "--calibration-chunks", "2"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not fake.exists() or not fake.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    pid = json.loads(fake.read_text())["pid"]
    parent.send_signal(how)
    _, said = parent.communicate(timeout=60)
    assert gone(pid)
    if how is not signal.SIGKILL:
        assert (parent.returncode, said.strip()) == (130, "interrupted; nothing was written")
        assert os.listdir(fake.parent / "out") == []


def test_not_there() -> None:
    with pytest.raises(BackendError, match=r"no auto-round in .*auto-round 0\.16\.1 .* works.*the built-in methods need no"):
        qf.convert(MODEL, "never", backend="auto-round", calibration_chunks=2)
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "gptqmodle"}, RecipeError, "did you mean gptqmodel"),
        ({"backend": "autoawq", "method": "gptq"}, RecipeError, "has --method awq, not gptq, which auto-gptq and gptqmodel and"),
        ({"backend": "gptqmodel", "method": "rtn"}, RecipeError, "not rtn"),
        ({"backend": "auto-gptq"}, BackendError, r"only with CUDA.*auto-gptq 0\.7\.1.*built-in --method gptq needs no"),
        ({"backend": "autoawq", "bits": 3}, UnsupportedError, "4 bits, not 3"),
        ({"backend": "autoawq", "act_order": True}, RecipeError, "--act-order: autoawq's awq has no such option"),
        ({"backend": "gptqmodel", "group_size": 96}, qf.ShapeError, "multiple of the group size"),
        ({"backend": "gptqmodel", "backend_python": "/no/such/python"}, RecipeError, "no such interpreter"),
        ({"backend_python": sys.executable}, RecipeError, "goes with --backend"),
        ({"backend": "llm-compressor", "recipe": "W4A4"}, RecipeError, "unknown type or recipe W4A4"),
    ],
    ids=str,
)
def test_refused_before_anything_runs(options: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        qf.convert(MODEL, tmp_path / "m", **options)
    assert os.listdir(tmp_path) == []


def test_what_it_says_is_logged(fake: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quantforge"):
        convert(fake.parent / "out" / "m")
    assert {"gptqmodel: progress 1", "gptqmodel: progress 2"} <= {r.getMessage() for r in caplog.records}


def test_refused_outputs(fake: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="gguf files cannot hold fp8"):
        qf.convert(MODEL, tmp_path / "m.gguf", "FP8_DYNAMIC", backend="llm-compressor")
    with pytest.raises(RecipeError, match="--act-order scatters groups"):
        convert(tmp_path / "m.gguf", bits=4, group_size=32, act_order=True)
    qf.convert(MODEL, tmp_path / "f16.gguf", "F16")
    with pytest.raises(UnsupportedError, match="--type BF16"):
        qf.convert(tmp_path / "f16.gguf", tmp_path / "m", backend="gptqmodel")
    with pytest.raises(UnsupportedError, match="quantized already"):
        qf.convert(made, tmp_path / "m", backend="gptqmodel")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a plain checkpoint directory"):
        convert(tmp_path / "full", force=True)
    assert not fake.exists()  # the library never ran


def test_no_python() -> None:
    library = qf.Library("autoawq", python="/bin/true")
    assert library.method == "awq"
    with pytest.raises(BackendError, match="is that a Python"):
        qf.convert(MODEL, "never", backend="autoawq", backend_python="/bin/true", calibration_chunks=2)


def test_the_plan_says_what_it_should_come_to(made: Path) -> None:
    plan = qf.plan(MODEL, "x.gguf", "Q4_0", backend="gptqmodel")
    assert plan.recipe == "Q4_0, gptq (gptqmodel)"
    assert {t.codec.name for t in plan.tensors if "ffn" in t.name and "norm" not in t.name} == {"Q4_0"}
    plan.source.close()
