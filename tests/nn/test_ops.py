"""The torch operators without a GPU: the CPU's implementation, tracing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantforge.nn.ops  # noqa: F401
from quantforge import codecs, native
from quantforge.nn import planes
from quantforge.nn.planes import to_tensor


def stored(codec: str, rows: int, n: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A random matrix's parts as the CPU operators take them, and its weights."""
    e = codecs.quantize(np.random.default_rng(1).standard_normal((rows, n)).astype(np.float32), codec)
    return [to_tensor(e.parts[k]) for k in e.codec.layout(e.shape)], torch.from_numpy(e.decode())


@pytest.mark.parametrize("codec", ["Q4_0", "Q6_K", "int4-g128-asym-bf16", "nf4-dq", "fp8-channel", "BF16"])
def test_cpu(codec):
    parts, w = stored(codec, 7, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(torch.ops.quantforge.dequantize(parts, codec, 7, 256, dtype), w.to(dtype))
        x = torch.randn(2, 3, 256).to(dtype)
        y = torch.ops.quantforge.linear(x, parts, codec, 7, 256)
        assert y.dtype == dtype and y.shape == (2, 3, 7)
        assert (y.double() - x.double() @ w.double().T).norm() < 2e-2 * y.double().norm()
    assert torch.ops.quantforge.linear(torch.zeros(0, 256), parts, codec, 7, 256).shape == (0, 7)


def test_operators_trace():
    parts, w = stored("Q8_0", 5, 64)
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
    packed = planes.pack(codecs.quantize(np.ones((16, 128), np.float32), "Q4_0"))
    for kind in {f.kind for f in planes.FAMILIES.values()}:
        assert native.cuda_has(kind, "linear") and native.cuda_has(kind, "dequantize")
    with pytest.raises(native.KernelError) as caught:
        native.cuda_call("q4_0", "dequantize", list(packed.tensors.values()), [torch.empty(16, 128)], 0)
    assert caught.value.code == native.EDEVICE
