"""Builds kernels/ into the package as plain shared libraries with a C ABI (no Python or torch ABI)."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
CPU_UNITS = ["dispatch.cpp", "scalar.cpp", "avx2.cpp", "avx512.cpp", "neon.cpp"]
CXXFLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # float32 sums keep ggml's order and rounding: never contract a*b+c
    "-ffp-contract=off",
    # GCC's own AVX-512 headers trip these
    "-Wno-maybe-uninitialized", "-Wno-uninitialized",
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


class BuildKernels(build_ext):
    """Compile the CPU units in parallel and link them into quantforge/_cpu.so."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension, which stands for the library of CPU kernels."""
        cxx = compiler()
        target = Path(self.get_ext_fullpath(ext.name))
        objects_dir = Path(self.build_temp) / "kernels"
        objects_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs: list[tuple[list[str], subprocess.Popen[bytes]]] = []
        objects = []
        for source in ext.sources:
            obj = objects_dir / (Path(source).stem + ".o")
            objects.append(str(obj))
            command = [*cxx, *CXXFLAGS, "-c", source, "-o", str(obj)]
            jobs.append((command, subprocess.Popen(command, cwd=ROOT)))
        for command, job in jobs:
            if job.wait():
                sys.exit(f"quantforge: compiling the kernels failed: {shlex.join(command)}")
        # linked aside and renamed, so that a process which has the old library mapped keeps it whole
        fresh = target.with_name(target.name + ".new")
        link = [*cxx, "-shared", *objects, "-o", str(fresh)]
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

setup(
    ext_modules=[
        Extension("quantforge._cpu", [f"kernels/cpu/{unit}" for unit in CPU_UNITS if (ROOT / "kernels/cpu" / unit).exists()])
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
