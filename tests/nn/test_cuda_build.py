"""Where nvcc is: the kernels compile for sm_90, and those for matrix-vector products keep everything in registers."""

from __future__ import annotations

import re
import shutil

import pytest

from tests import cuda_host

NVCC = shutil.which("nvcc")
UNITS = sorted(p.stem for p in cuda_host.SOURCES.glob("*.cu") if "launch.cuh" in p.read_text())


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("unit", UNITS)
def test_no_spills(unit):
    assert NVCC
    flags = ["-std=c++17", "-O3", "-fmad=false", "--extended-lambda", "-arch=sm_90", "-Xptxas=-v"]
    said = cuda_host.build(f"{unit}.ptxas", [NVCC, *flags, "-c", f"kernels/cuda/{unit}.cu"], log=True).read_text()
    assert "warning" not in said
    found = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    linear = {name: tuple(map(int, numbers)) for name, *numbers in found if "linear_kernel" in name}
    assert len(linear) >= 6
    assert {name for name, numbers in linear.items() if any(numbers)} == set()
