"""The torch operators' side of the GPU, without one: what is built loads, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import quantforge.nn  # noqa: F401
from quantforge import codecs, native
from quantforge.nn import planes
from quantforge.nn.base import tensor
from tests import cuda_host


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
