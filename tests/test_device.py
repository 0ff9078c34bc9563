"""`convert --device cuda`: the device's part of a conversion, by emulated kernels; on a GPU, by the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge import codecs, device, native
from quantforge.demo import IMATRIX, MODEL
from quantforge.errors import NonFiniteError, RecipeError
from tests.codecs.test_gpu_encode import UNITS, emulated
from tests.conversion.test_run import edit, small  # noqa: F401  (a fixture)

torch = pytest.importorskip("torch")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or bool(native.cuda_missing()), reason="no GPU or no CUDA kernels")


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Emulated kernels stand for _cuda.so, the CPU for the device. They run in one thread. Returns what was called."""
    kernels = {key: fn for unit in UNITS for key, fn in emulated(unit).items()}
    called = []
    real = native.cuda_call

    def call(codec: str, op: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], stream: int) -> None:
        called.append((codec, op))
        real(codec, op, inputs, outputs, stream)

    monkeypatch.setattr(native, "_cuda", lambda: (kernels, ""))
    monkeypatch.setattr(native, "cuda_call", call)
    monkeypatch.setattr(device, "encoder", lambda name, n: None if name == "cpu" else device.Encoder(torch.device("cpu"), n))
    return called


def test_same_file_as_the_cpu(tmp_path: Path, emulation: list[tuple[str, str]]) -> None:
    for recipe, importance in (("Q4_K_M", IMATRIX), ("Q5_0", None)):
        for on in ("cpu", "cuda"):
            qf.convert(MODEL, tmp_path / f"{on}.gguf", recipe, importance, device=on, threads=1, force=True)
        assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
    assert {c for c, op in emulation if op == "encode"} >= {"Q4_K", "Q6_K", "Q5_0"}


def test_quantized_sources_are_decoded_there(tmp_path: Path, emulation: list[tuple[str, str]]) -> None:
    qf.convert(MODEL, tmp_path / "q8.gguf", "Q8_0")
    for on in ("cpu", "cuda"):
        qf.convert(tmp_path / "q8.gguf", tmp_path / f"{on}.gguf", "Q4_K_S", device=on, threads=1, allow_requantize=True)
    assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
    assert ("Q8_0", "decode") in emulation


def test_measured_errors_are_the_same(tmp_path: Path, emulation: list[tuple[str, str]]) -> None:
    reports = [qf.convert(MODEL, tmp_path / f"{on}.gguf", "Q3_K_S", device=on, threads=1, measure=True) for on in ("cpu", "cuda")]
    for a, b in zip(reports[0].tensors, reports[1].tensors, strict=True):
        assert (a.name, a.rel_rmse) == (b.name, pytest.approx(b.rel_rmse, rel=1e-5))


def test_non_finite_weights_are_named_as_by_the_cpu(small: Path, tmp_path: Path, emulation: list[tuple[str, str]]) -> None:  # noqa: F811
    from safetensors.numpy import load_file

    name = "model.layers.1.self_attn.k_proj.weight"
    w = np.array(load_file(small / "model.safetensors")[name])
    w[5, 7] = np.nan
    edit(small, {name: w})
    said = []
    for on in ("cpu", "cuda"):
        with pytest.raises(NonFiniteError) as e:
            qf.convert(small, tmp_path / "m.gguf", "Q4_K_M", device=on, threads=1)
        said.append((str(e.value), e.value.index))
    assert said[0] == said[1] and said[0][1] == (5, 7) and name in said[0][0]


def test_types_without_a_kernel_stay_on_the_cpu(tmp_path: Path, emulation: list[tuple[str, str]]) -> None:
    for on in ("cpu", "cuda"):
        qf.convert(MODEL, tmp_path / on, "NVFP4", device=on, threads=1)
    assert (tmp_path / "cuda" / "model.safetensors").read_bytes() == (tmp_path / "cpu" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "IQ2_XXS", "Q4_0"])
def test_importance_in_every_form(name: str, emulation: list[tuple[str, str]]) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 5, 256)).astype(np.float32)
    codec = codecs.get(name)
    forms = [None, rng.random(256), rng.random((3, 1, 256)), *([rng.random(w.shape)] if name.startswith("IQ") else [])]
    for q in forms:
        q = None if q is None else q.astype(np.float32)
        data, bad = device.encode(codec, torch.from_numpy(w), q)
        assert not bad.item()
        np.testing.assert_array_equal(data.numpy(), codec.encode(w, q)["data"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "IQ2_XXS", "int4-g128-asym", "int3-channel-sym-bf16", "nf4"])
def test_decoding_and_rounding_there(name: str) -> None:
    """What GPTQ's blocks are compared with does not leave the GPU; the numbers are the CPU's."""
    codec, rng = codecs.get(name), np.random.default_rng(0)
    w, q = rng.normal(size=(40, 512)).astype(np.float32), rng.random(512).astype(np.float32) + 0.1
    e = codecs.quantize(w, name, importance=q)
    there = device.decode_on(e, torch.device("cuda"))
    assert there.is_cuda
    np.testing.assert_array_equal(there.cpu().numpy(), e.decode())
    stats = qf.methods.Stats(None, 1, importance=torch.from_numpy(q).cuda())
    parts = qf.methods.get("rtn").quantize(torch.from_numpy(w).cuda(), codec, stats)
    ours, theirs = (np.linalg.norm((x - w) * np.sqrt(q)) for x in (codec.decode(parts, w.shape), e.decode()))
    assert ours <= 1.001 * theirs


def test_where_there_is_no_gpu_the_cpu_does_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    device._on_the_cpu.cache_clear()
    for name in ("cpu", "cuda", "cuda:1", "cuda"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M", device=name, force=True)
        (tmp_path / "m.gguf").rename(tmp_path / f"{name}.gguf")
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    assert [r.getMessage() for r in caplog.records if "the CPU does the work" in r.getMessage()] == [
        f"--device {name}: torch {torch.__version__} finds no CUDA device here; the CPU does the work"
        for name in ("cuda", "cuda:1")
    ]
    for where in ("cuda", torch.device("cuda", 0), torch.device("cpu")):
        assert qf.load(tmp_path / "cuda.gguf", device=where).device.type == "cpu"


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "cpu:0", "CUDA", ""])
def test_no_name_of_a_device(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"--device {name}: cpu, cuda or cuda:N"):
        qf.convert(MODEL, tmp_path / "m.gguf", device=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [n for names in UNITS.values() for n in names])
def test_bytes_of_a_gpu(name: str) -> None:
    from tests.codecs.test_contract import CASES, IMPORTANCE

    codec = codecs.get(name)
    assert isinstance(codec, codecs.base.GgmlCodec)
    for case, w in CASES.items():
        for kind, q in {"none": None, **(IMPORTANCE if codec.takes_importance else {})}.items():
            expected = codec.encode(w, q)["data"]
            e = qf.quantize(torch.from_numpy(w).cuda(), name, importance=q)
            differ = np.flatnonzero(e.parts["data"] != expected)
            assert not len(differ), (
                f"{case}, importance {kind}: {len(differ)} of {expected.size} bytes, the first at {differ[:4]}"
            )
            decoded = device.decode(codec, torch.from_numpy(expected).cuda(), w.shape).cpu().numpy()
            np.testing.assert_array_equal(decoded.view(np.uint32), codec.decode({"data": expected}, w.shape).view(np.uint32))
    bad = CASES["sigma 30"].copy()
    bad[3, 77] = np.nan
    with pytest.raises(NonFiniteError):
        qf.quantize(torch.from_numpy(bad).cuda(), name)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [n for names in UNITS.values() for n in names])
def test_large_tensors_on_a_gpu(name: str) -> None:
    codec = codecs.get(name)
    rows = 64 if name.startswith(("IQ1", "IQ2", "IQ3")) else 1024
    rng = np.random.default_rng(1)
    w = (rng.normal(size=(rows, 4096)) * 0.02).astype(np.float32)
    for q in (None, np.exp(rng.normal(size=4096)).astype(np.float32)):
        e = qf.quantize(torch.from_numpy(w).bfloat16().cuda(), name, importance=q)
        expected = codec.encode(torch.from_numpy(w).bfloat16().float().numpy(), q, threads=4)
        np.testing.assert_array_equal(e.parts["data"], expected["data"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["Q4_K_M", "IQ2_M", "Q8_0"])
def test_conversion_on_a_gpu(recipe: str, tmp_path: Path) -> None:
    for on in ("cpu", "cuda"):
        qf.convert(MODEL, tmp_path / f"{on}.gguf", recipe, IMATRIX, device=on)
    assert (tmp_path / "cuda.gguf").read_bytes() == (tmp_path / "cpu.gguf").read_bytes()
