"""benchmarks/gpu.py without a GPU: the same code to its end, tiny and without graphs; other libraries' layouts; its tables."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks.on_gpu import ggml, harness, peers, products, report
from benchmarks.on_gpu.run import Limits, Row, Run, load, merged
from benchmarks.on_gpu.worker import JobError, Worker
from quantforge import codecs
from quantforge.layouts import gptq
from quantforge.nn import planes
from quantforge.nn import products as ways

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.py"
CPU = torch.device("cpu")


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    file = tmp_path / "run.json"
    printed = run("--device", "cpu", "--smoke", "--codecs", "Q4_0,IQ2_XXS", "--m", "1,9", "--json", str(file))
    found = json.loads(file.read_text())
    assert found["finished"] and found["limits"]["copy_gbs"] > 0
    rows = {(r["name"], r["m"]): r for r in found["rows"]}
    for name in ("torch bf16", "torch int4 (tinygemm)", "decode + torch (Q4_0)", "Q4_0", "IQ2_XXS"):
        for m in (1, 9):
            row = rows[name, m]
            assert row["us"] > 0 and math.isfinite(row["error"]) and row["error"] < 4e-3
            assert name in printed
    assert rows["Q4_0", 1]["nbytes"] == 256 * 512 * 18 // 32
    assert {e["codec"] for e in found["encode"]} >= {"Q4_K", "IQ2_XXS"}
    spoken = {(g["model"], g["how"]): g for g in found["model"] if g["what"] == "generate"}
    for model in ("bf16", "Q4_K_M", "IQ2_XXS"):
        for how in ("generate", "graph", "compiled"):
            assert spoken[model, how].get("tokens_s", 0) > 0, spoken[model, how]
        assert spoken[model, "graph"]["agreement"] == 1  # the captured step goes on where it should
        assert spoken[model, "compiled"]["agreement"] == 1 and spoken[model, "compiled"]["graphs_compiled"] == 1
    assert any(g["what"] == "evaluate" and g["tokens_s"] > 0 for g in found["model"])
    assert all(name.partition(" ")[0] in ("Marlin", "bitsandbytes", "llama.cpp") for name in found["missing"]), found["missing"]
    table = run("--readme", str(file))
    assert "| Q4_0 |" in table and "| IQ2_XXS |" in table and "tokens/s" in table


def test_without_a_device_it_says_so():
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("no CUDA device") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_a_stopped_run_has_found_is_kept(tmp_path):
    file = tmp_path / "run.json"
    arguments = [sys.executable, SCRIPT, "--device", "cpu", "--smoke", "--codecs", "Q4_0,Q8_0", "--json", file]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        for line in process.stdout:  # until something is there
            if "torch bf16" in line:
                break
        process.send_signal(signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does
        printed = process.communicate(timeout=60)[0]
    assert "torch bf16" in printed and "µs" in printed  # the table, too
    found = load(file)
    assert not found.finished and any(r.name == "torch bf16" for r in found.rows)
    assert "unfinished" in "\n".join(report.readme(found))


# ---- jobs in a process of their own


def numbers(*found: int) -> Iterator[int]:
    yield from found


def breaks() -> Iterator[int]:
    yield 1
    raise ValueError("a kernel that is not there")


def dies() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> Iterator[int]:
    yield 1
    time.sleep(1000)


def test_a_job_that_ends_badly_costs_nothing_else():
    worker = Worker()
    try:
        assert list(worker.run(numbers, 1, 2)) == [1, 2]
        for job, why in ((breaks, "a kernel that is not there"), (dies, "ended with -9"), (hangs, "nothing for 1 s")):
            found: list[int] = []
            with pytest.raises(JobError, match=why):
                found.extend(worker.run(job, patience=1 if job is hangs else 60))
            assert found == [1]
            assert list(worker.run(numbers, 3)) == [3]
    finally:
        worker.stop()


# ---- other libraries


@pytest.mark.parametrize("name", [n for n in peers.NAMES if not n.startswith("Marlin")])
def test_a_library_multiplies_the_same_numbers(name):
    try:
        rows = list(peers.rows(name, 256, 512, [1, 9], "cpu"))
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"{name}: {e}")
    assert [r.m for r in rows] == [1, 9]
    limit = 1.2e-2 if rows[0].way == "8-bit activations" else 4e-3
    assert all(r.us > 0 and r.error < limit for r in rows)
    assert rows[0].nbytes == pytest.approx(rows[0].n * rows[0].k * 2, rel=1e-9) or rows[0].nbytes < rows[0].n * rows[0].k * 1.2


def test_ggml_takes_many_products_in_a_graph():
    try:
        (row,) = ggml.rows("llama.cpp Q4_K", 512, 256, [3], "cpu")
    except RuntimeError as e:
        pytest.skip(str(e))
    assert row.error < 1.2e-2 and (row.n, row.k, row.nbytes) == (512, 256, 512 * 144)


def test_what_marlin_repacks_is_gptqs_layout():
    """The words that Marlin's own repacking takes, against those of our GPTQ checkpoints."""
    e = harness.block("int4-g128-sym", 512)
    codes, step, zero = peers.integers("int4-g128-sym", 512, 512, CPU)
    stored = gptq.LAYOUT().pack(e.codec, e.parts, e.shape)
    assert np.array_equal(peers.gptq_words(codes).numpy()[:, :256], stored["qweight"].view(np.int32))
    assert torch.equal(codes[:256], codes[256:]) and step.shape == (512, 4) and (zero == 8).all()


@pytest.mark.skipif("MARLIN" not in os.environ, reason="MARLIN is not set: a checkout of IST-DASLab/marlin")
def test_marlins_own_packing_has_our_numbers():
    """Read as PTX defines a lane's share of the 16 × 8 operand of mma.m16n8k16."""
    n = k = 512
    _, _, calls = peers.marlin_first(n, k, CPU)
    (multiply,) = (c.cell_contents for c in calls[0].__closure__ or () if callable(c.cell_contents))
    scales = dict(zip(multiply.__code__.co_freevars, multiply.__closure__, strict=True))["scales"].cell_contents
    words = calls[0].__defaults__[0].numpy().view(np.uint32).reshape(k // 16, n // 64, 32, 4)  # lane, 16 columns
    w = np.zeros((k, n))
    for lane in range(32):
        for nibble in range(8):
            pair, half = nibble % 4, nibble // 4
            row, column = 2 * (lane % 4) + half + 8 * (pair % 2), lane // 4 + 8 * (pair // 2)
            for part in range(4):
                w[row::16, part * 16 + column :: 64] = ((words[:, :, lane, part] >> (4 * nibble)) & 15) - 8.0
    order = [i + 8 * j for i in range(8) for j in range(8)]
    unpacked = np.zeros((k // 128, n // 64, 64))
    unpacked[:, :, order] = scales.float().numpy().reshape(k // 128, n // 64, 64)
    w *= np.repeat(unpacked.reshape(k // 128, n), 128, 0)
    assert np.array_equal(w.T[:256], harness.block("int4-g128-sym", k).decode())


# ---- what is measured


@pytest.mark.slow
def test_a_step_of_a_loaded_model_waits_for_nothing(tmp_path):
    """No number of a tensor decides what the host does: a CUDA graph has all of it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import StaticCache

    import quantforge as qf
    from quantforge.demo import MODEL

    class Watch(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.seen.append(str(function))
            return function(*arguments, **(options or {}))

    qf.convert(MODEL, tmp_path / "model.gguf", recipe="Q4_K_M")
    model = qf.load(tmp_path / "model.gguf", dtype="bfloat16")
    cache, ids = StaticCache(config=model.config, max_cache_len=32), torch.tensor([[5]])
    with torch.inference_mode():
        model(torch.arange(1, 9)[None], past_key_values=cache)
        with Watch():
            model(ids, past_key_values=cache, position_ids=torch.full((1, 1), 8))
    assert "quantforge.linear.default" in Watch.seen and "aten.index_copy_.default" in Watch.seen
    assert not [name for name in Watch.seen if re.search("local_scalar|nonzero|masked_select|unique", name)]


def test_triton_kernels_of_a_plan():
    kernels = pytest.importorskip("quantforge.nn.triton_kernels")
    found = products.triton_jobs(["Q4_K", "IQ2_XXS", "F16"], [(8192, 8192), (28672, 8192)], [1, 16, 64, 4096], CPU, False, False)
    assert {codec for codec, *_ in found} == {"Q4_K", "IQ2_XXS"}
    assert all(kernels.Config(*config).tokens >= 64 for *_, config in found)  # 1 and 16 go another way
    tuned = products.triton_jobs(["Q4_K"], [(8192, 8192)], [64, 128], CPU, True, True)
    assert {job for job in found if job[0] == "Q4_K" and job in tuned} and len(tuned) > 4


def test_every_way_and_configuration_is_timed(monkeypatch):
    """The path of a GPU, with stand-ins that decode planes where its operators are."""
    kernels = pytest.importorskip("quantforge.nn.triton_kernels")
    taken = []

    def decoded(p, codec, n, k, dtype=torch.float32):
        return torch.from_numpy(planes.unpack(planes.restore(p, codec, (n, k))).decode()).to(dtype)

    def linear(x, p, codec, n, k):
        way = ways.choose(planes.kind(codec), len(x), k, x.dtype)
        taken.append(way)
        return ways.slabs(x, p, codec, n) if way == "slabs" else (x.float() @ decoded(p, codec, n, k).T).to(x.dtype)

    def gemm(x, p, kind, n, config):
        taken.append(config)
        return (x.float() @ decoded(p, "Q4_K", n, x.shape[1]).T).to(x.dtype)

    monkeypatch.setattr(harness, "gpu", lambda device: True)
    monkeypatch.setattr(harness, "COLD", 1 << 18)
    monkeypatch.setattr(products.ops, "linear", linear)
    monkeypatch.setattr(products.ops, "dequantize", decoded)
    monkeypatch.setattr(kernels, "gemm", gemm)
    rows = list(products.rows("Q4_K", 512, 256, [1, 32, 160], "cpu", ways=True, tune=True))
    few, some = ways.UP_TO[""]
    assert few < 32 and some >= 160
    assert {r.way for r in rows if r.m == 1} == {"matvec", "fused", "slabs"}
    assert {r.way for r in rows if r.m == 160} == {"fused", "slabs"}  # matvec would not be worth it
    configurations = {r.config for r in rows if r.m == 32 and r.config}
    assert configurations == {str(c) for c in kernels.candidates("q4_k", 32, 512, 256)} and configurations
    assert {f"{slab} MiB" for slab in products.SLABS} <= {r.config for r in rows if r.m == 160}
    assert all(r.error < 3e-3 and r.nbytes == 512 * 144 for r in rows) and "matvec" in taken
    assert report.chosen(rows)["Q4_K", 512, 256, 32].way == "fused"


# ---- tables of made-up times


def made_up() -> Run:
    """SYNTHETIC: nobody measured this. bf16 takes 100 µs; Q4_K is 3 times faster with 1, 1.1 with 64 activations."""
    rows = [
        *(Row("torch bf16", 8192, 8192, m, 100.0, 2 * 8192**2, 1e-3) for m in (1, 64)),
        Row("Q4_K", 8192, 8192, 1, 100 / 3, 37748736, 1e-3, "matvec"),
        Row("Q4_K", 8192, 8192, 1, 10.0, 37748736, 1e-3, "fused"),  # another way, which is not taken
        Row("Q4_K", 8192, 8192, 64, 5.0, 37748736, 1e-3, "fused", "Config(...)"),
        Row("Q4_K", 8192, 8192, 64, 100 / 1.1, 37748736, 2e-3, "fused"),
        Row("llama.cpp Q4_K", 8192, 8192, 1, 40.0, 37748736, 7e-3, "8-bit activations"),
    ]
    return Run({"device": "SYNTHETIC", "date": "never"}, Limits(4000, 800, 2.0, 30), rows, finished=True)


def test_a_table_marks_what_misses_its_target(tmp_path):
    file = tmp_path / "run.json"
    made_up().save(file)
    lines = list(report.readme(load(file)))
    assert "| Q4_K | 3.00 | 1.10 (1.7) | 2.0e-03 |" in lines
    assert "| Q4_K / llama.cpp Q4_K | 1.20 (1.3) | – |" in lines
    (missed,) = (line for line in lines if line.startswith("| Q4_K | 8192×8192 | 64"))
    cells = [c.strip() for c in missed.strip("|").split("|")]
    assert cells[3:6] == ["1.7× bf16", "58.8", "90.9"]
    inputs = 2 * 64 * 2 * 8192
    assert cells[6] == f"{(37748736 + inputs) / 4e6:.1f}" and cells[7] == "–" and cells[8] == "2.0"
    assert cells[9] == f"{2 * 64 * 8192**2 / 800e6:.1f}" and cells[10] == "12% of the time is arithmetic"
    (over,) = (line for line in lines if "1.3× llama.cpp Q4_K" in line)
    instructions = report.counted()["Q4_K"] * 8192**2 / 30e6
    assert f"| {instructions:.1f} | 2.0 |" in over


def test_targets_and_counts():
    assert report.target("IQ2_XXS", 1) == 3.6 and report.target("IQ2_XXS", 8) == 3.2 and report.target("Q8_0", 128) == 1.1
    assert report.target("Q4_K", 256) == 0.9 and report.target("Q4_K", 4096) == 0.95 and report.target("Q5_K", 1) is None
    known = report.counted()
    assert set(report.SPEED_UP) <= set(known) and all(1 < known[name] < 12 for name in known)
    assert all(name in codecs.names() or name.startswith(("int", "nf")) for name in report.SPEED_UP)


def test_runs_are_merged():
    first, second = made_up(), made_up()
    second.rows, second.model = [Row("Q4_K", 8192, 8192, 1, 30.0, 1, 1e-3, "matvec")], [{"what": "made", "parameters": 1}]
    whole = merged([first, second])
    assert report.chosen(whole.rows)["Q4_K", 8192, 8192, 1].us == 30 and len(whole.rows) == len(first.rows)
    assert whole.model and asdict(whole)["finished"]
