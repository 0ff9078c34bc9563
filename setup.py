"""Builds kernels/ into the package as plain shared libraries with a C ABI (no Python or torch ABI)."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
CPU_UNITS = ["dispatch.cpp", "crew.cpp", "scalar.cpp", "avx2.cpp", "avx512.cpp", "neon.cpp"]
CXXFLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra",
    # float32 sums keep ggml's order and rounding: never contract a*b+c
    "-ffp-contract=off",
    # GCC's own AVX-512 headers trip these
    "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
]  # fmt: skip
CUDA_ARCHS = "80,86,89,90"
# -fmad=false: as -ffp-contract=off; products that may be fused are written as such
NVCCFLAGS = [
    "-std=c++17", "-O3", "-fmad=false", "--extended-lambda", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden",
    # a fourth of the size
    "-Xfatbin=-compress-all",
]  # fmt: skip


def compiler() -> list[str]:
    """The C++ compiler's command line, or exit with what to install."""
    chosen = os.environ.get("CXX")
    candidates = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    tried = ", ".join(c[0] for c in candidates)
    sys.exit(
        f"quantforge: no C++17 compiler found (tried {tried}). Its kernels are compiled at install time; "
        "install one (Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
        "or set CXX to its path"
    )


def nvcc() -> str:
    """The CUDA compiler: in CUDA_HOME, then PATH; or exit with what to set."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        sys.exit(
            "quantforge: nvcc not found (looked in CUDA_HOME/bin and PATH), and QUANTFORGE_CUDA=1 asks for CUDA kernels; "
            "install the CUDA toolkit (12.4 or later) or set CUDA_HOME to it"
        )
    return found


def nvcc_flags() -> list[str]:
    """Machine code for each of QUANTFORGE_CUDA_ARCH (such as 90, or 80,86), and PTX of the last one.

    What is older than sm_90 comes from one PTX, the oldest's: the compiler's first half, most of its time, runs once for all.
    """
    archs = os.environ.get("QUANTFORGE_CUDA_ARCH", CUDA_ARCHS).replace(".", "").split(",")
    old = sorted((a for a in archs if int(a.rstrip("af")) < 90), key=int)
    groups = [group for group in (old, *([a] for a in archs if a not in old)) if group]
    codes = [f"-gencode=arch=compute_{group[0]},code=[{','.join(f'sm_{a}' for a in group)}]" for group in groups]
    return [*NVCCFLAGS, *codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildKernels(build_ext):
    """Compile the units of a library of kernels side by side and link them: quantforge/_cpu.so, _cuda.so."""

    def build_extension(self, ext: Extension) -> None:
        """Build one of them. Each stands for a whole library."""
        cuda = ext.name.endswith("_cuda")
        command = [nvcc(), *nvcc_flags()] if cuda else [*compiler(), *CXXFLAGS]
        jobs = int(os.environ.get("QUANTFORGE_JOBS", 0)) or (min(4, os.cpu_count() or 1) if cuda else len(ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        objects_dir = Path(self.build_temp) / "kernels"
        objects_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [str(objects_dir / (Path(source).name + ".o")) for source in ext.sources]
        commands = [[*command, "-c", source, "-o", obj] for source, obj in zip(ext.sources, objects, strict=True)]
        with ThreadPoolExecutor(jobs) as pool:
            for compile, code in zip(commands, pool.map(lambda c: subprocess.call(c, cwd=ROOT), commands), strict=True):
                if code:
                    sys.exit(f"quantforge: compiling the kernels failed: {shlex.join(compile)}")
        # linked aside and renamed, so that a process which has the old library mapped keeps it whole
        fresh = target.with_name(target.name + ".new")
        link = [*command, "-shared", *objects, "-o", str(fresh)]
        if subprocess.call(link, cwd=ROOT):
            sys.exit(f"quantforge: linking the kernels failed: {shlex.join(link)}")
        os.replace(fresh, target)

    def get_ext_filename(self, fullname: str) -> str:
        """A plain .so: the library has no Python ABI to name."""
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: compiled code, but any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Drop the interpreter and ABI from the tag."""
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """A distribution that is never pure Python."""

    def has_ext_modules(self) -> bool:
        """Always: the kernels."""
        return True


if platform.system() == "Windows":
    sys.exit("quantforge: the kernels build with GCC or Clang on Linux and macOS; on Windows use WSL")

cpu = [f"kernels/cpu/{unit}" for unit in CPU_UNITS if (ROOT / "kernels/cpu" / unit).exists()]
libraries = [Extension("quantforge._cpu", cpu)]
if os.environ.get("QUANTFORGE_CUDA", "0") not in ("", "0"):
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "kernels/cuda").glob("*.cu"))
    # QUANTFORGE_CUDA=only: beside CPU kernels that are built already
    libraries = [*(libraries if os.environ["QUANTFORGE_CUDA"] != "only" else []), Extension("quantforge._cuda", cuda)]

setup(
    ext_modules=libraries,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
