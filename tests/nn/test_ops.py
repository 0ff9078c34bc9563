"""The torch operators' side of the GPU, without one: what is built loads, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantforge import codecs, native
from quantforge.errors import ShapeError, UnsupportedError
from quantforge.nn import cuda, planes, products
from quantforge.nn.base import tensor
from tests import cuda_host
from tests.nn.test_planes import random_matrix


def test_operators_trace():
    e = codecs.quantize(np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32), "Q8_0")
    parts, w = [tensor(e.parts["data"])], torch.from_numpy(e.decode())
    x = torch.randn(3, 64)
    torch.library.opcheck(torch.ops.quantforge.linear, (x, parts, "Q8_0", 5, 64), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        torch.ops.quantforge.dequantize, (parts, "Q8_0", 5, 64, torch.float16), test_utils=("test_schema", "test_faketensor")
    )
    traced = torch.compile(lambda x: torch.ops.quantforge.linear(x, parts, "Q8_0", 5, 64) + 1, fullgraph=True, backend="eager")
    assert torch.allclose(traced(x), x @ w.T + 1, atol=1e-5)


def test_the_cuda_library_loads_without_a_driver():
    if native.cuda_missing():
        pytest.skip(native.cuda_missing())
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    library = Path(native.__file__).with_name("_cuda.so")
    if library.stat().st_mtime < max(p.stat().st_mtime for p in cuda_host.SOURCES.iterdir()):
        pytest.skip("_cuda.so is older than its sources (make cuda)")
    packed = planes.pack(codecs.quantize(np.ones((16, 128), np.float32), "Q4_0"))
    for kind in {f.kind for f in planes.FAMILIES.values()}:
        assert native.cuda_has(kind, "linear") and native.cuda_has(kind, "dequantize")
    with pytest.raises(native.KernelError) as caught:
        native.cuda_call("q4_0", "dequantize", list(packed.tensors.values()), [torch.empty(16, 128)], 0)
    assert caught.value.code == native.EDEVICE
    assert caught.value.cuda in (35, 100), caught.value  # no driver, or none that finds a device


def test_errors_of_a_device_say_what_cuda_said():
    assert str(native.KernelError("q4_0 linear (CUDA)", native.EDEVICE | 209 << 8)).endswith(
        "the device reported an error: CUDA error 209 (the kernels were not built for this GPU; build again with "
        "QUANTFORGE_CUDA_ARCH set to its compute capability)"
    )
    assert str(native.KernelError("q4_0 linear (CUDA)", native.EDEVICE | 719 << 8)).endswith("an error: CUDA error 719")
    assert native.KernelError("Q4_0 encode", native.ENONFINITE).code == native.ENONFINITE


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, str]]:
    """nn/cuda.py on the CPU, with the kernels that tests/cuda_host.py compiles: what it launches."""
    if cuda_host.CXX is None:
        pytest.skip("no C++ compiler")
    seen: list[tuple[str, str]] = []

    def run(kind, op, inputs, out):
        seen.append((kind, op))
        assert cuda_host.call(kind, op, inputs, out) == native.OK

    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(native, "cuda_has", lambda kind, op: (kind, op) in cuda_host.kernels())
    monkeypatch.setattr(products.ops, "dequantize", cuda.dequantize)
    return seen


CASES = [
    ("Q4_0", 70, 160), ("Q6_K", 33, 512), ("IQ2_XXS", 20, 256), ("nf4-dq", 40, 320), ("MXFP4", 17, 96),
    ("int8-channel-sym", 5, 1001), ("int4-g128-asym-act", 35, 384), ("int4-channel-sym-f32", 9, 100),
]  # fmt: skip


def matrix(codec: str, rows: int, n: int) -> codecs.Encoded:
    if isinstance(codecs.get(codec), codecs.base.AffineCodec) or codec.startswith("int"):
        return random_matrix(codec, rows, n)
    w = np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32)
    return codecs.quantize(w, codec, importance=np.ones(n, np.float32))


@pytest.mark.parametrize("way", ["matvec", "slabs"])
@pytest.mark.parametrize(("codec", "rows", "n"), CASES)
def test_the_gpu_side_of_linear(codec, rows, n, way, launches, monkeypatch):
    """Everything but the kernels themselves: how activations of all shapes and dtypes come to them, and what comes back."""
    e = matrix(codec, rows, n)
    given = list(planes.pack(e).tensors.values())
    w = torch.from_numpy(e.decode()).double()
    monkeypatch.setattr(products, "SLAB", 32 * n * 2)  # several slabs
    wide = torch.randn((40, 2 * n + 2), generator=torch.Generator().manual_seed(0))
    with products.way(way):
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4), (torch.float64, 1e-4)):
            x = wide.to(dtype)
            for rows_of_x in (
                x[:1, :n],
                x[:20, :n].clone(),
                x[:9, 1 : n + 1],
                x[::2, ::2][:, :n],
                x[:6, :n].reshape(2, 3, n),
                x[0, :n],
            ):
                y = cuda.linear(rows_of_x, given, codec, rows, n)
                exact = rows_of_x.double() @ w.T
                assert y.dtype == dtype and y.shape == exact.shape
                bar = max(tolerance, 2e-3) if "nf4" in codec else tolerance  # its levels are rounded to bf16 at least
                assert (y.double() - exact).norm() <= bar * exact.norm()
            assert cuda.linear(x[:0, :n], given, codec, rows, n).shape == (0, rows)
            grad = x[:30, :rows].reshape(3, 10, rows)
            back = cuda.linear_backward(grad, given, codec, rows, n)
            assert back.dtype == dtype and (back.double() - grad.double() @ w).norm() <= tolerance * (grad.double() @ w).norm()
            assert torch.equal(cuda.dequantize(given, codec, rows, n, dtype), w.to(torch.float32).to(dtype))
    assert {op for _, op in launches} == ({"linear", "dequantize"} if way == "matvec" else {"dequantize"})
    with pytest.raises(ShapeError, match="do not fit"):
        cuda.linear(x[:2, : n - 1], given, codec, rows, n)
    with pytest.raises(UnsupportedError, match="move them to one device"):
        cuda.linear(x[:2, :n].to("meta"), given, codec, rows, n)


class Operations(TorchDispatchMode):
    """Names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_token_is_one_kernel(launches):
    """Whatever else torch ran would be a launch more, as long as the product itself."""
    e = matrix("Q4_0", 64, 256)
    given = list(planes.pack(e).tensors.values())
    for x in (torch.randn(1, 1, 256).bfloat16(), torch.randn(16, 256).half()):
        with Operations() as seen:
            cuda.linear(x, given, "Q4_0", 64, 256)
        assert set(seen.names) <= {"view", "empty", "split"}, seen.names
    assert launches == [("q4_0", "linear")] * 2


def test_whoever_listens_to_operators_hears_of_them():
    """Products outside the dispatcher are for those who only want the numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from quantforge.nn import QuantLinear

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    heard: list[str] = []
    layer = QuantLinear(codecs.quantize(np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32), "Q8_0"))
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = layer(x)
        with Listener():
            assert torch.equal(layer(x), want)
        assert "quantforge.linear.default" in heard
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(2 * x), layer(2 * x))
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(2 * x), layer(2 * x))
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, want) and x.grad is not None


def test_without_the_library(launches, monkeypatch, caplog):
    """On a device whose quantforge has no CUDA kernels: Triton's, or the CPU decodes; a line in the log says which, once."""
    monkeypatch.setattr(native, "cuda_has", lambda kind, op: False)
    monkeypatch.setattr(native, "cuda_missing", lambda: "none were built")
    cuda._warn_once.cache_clear()
    e = matrix("Q4_0", 70, 160)
    given, w = list(planes.pack(e).tensors.values()), torch.from_numpy(e.decode())
    seen = []

    def fused(x, planes_, kind, out_features):
        seen.append((len(x), kind, out_features))
        return x @ w.to(x.dtype).T

    monkeypatch.setattr(products, "fused", fused)
    monkeypatch.setattr(products, "fusible", lambda kind, n_in, dtype: dtype == torch.bfloat16)
    for m in (1, 20, 300):
        x = torch.randn(m, 160)
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
            y = cuda.linear(x.to(dtype), given, "Q4_0", 70, 160)
            exact = x.to(dtype).double() @ w.double().T
            assert y.dtype == dtype and (y - exact).norm() < tolerance * exact.norm()
    assert seen == [(m, "q4_0", 70) for m in (1, 20, 300)] and not launches
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        "none were built: quantized weights on the GPU are multiplied by Triton's kernels alone",
        "none were built: quantized weights on the GPU are decoded by the CPU",
    ]
    cuda._warn_once.cache_clear()
