"""Where nvcc is: the kernels compile for sm_90, and those for matrix-vector products keep everything in registers. Where
they are built: sm_90's limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quantforge import native
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


def listing(*options: str) -> str:
    """What cuobjdump says of the built library's code for sm_90."""
    if native.cuda_missing():
        pytest.skip(native.cuda_missing())
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    library = Path(native.__file__).with_name("_cuda.so")
    return subprocess.run([tool, "-arch", "sm_90", *options, library], capture_output=True, text=True, check=True).stdout


def test_the_built_kernels_fit_a_multiprocessor() -> None:
    """As many threads as a kernel may be launched with have registers, and its own shared memory needs no asking for."""
    threads = {}
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\{", listing("-ptx"), flags=re.S):
        bounds = re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", body)
        assert bounds, name
        threads[name] = int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", listing("-res-usage"))
    assert len(used) > 300 and {name for name, *_ in used} <= set(threads)
    for name, registers, shared in used:
        assert -(-int(registers) // 8) * 8 * threads[name] <= 65536, name
        assert int(shared) <= (48 << 10) + 1024, name  # 1 KB is the driver's
