"""Gathers what a machine with a GPU lacks, so that nothing is built or fetched there: `make gpu-pack`.

    python benchmarks/gpu_pack.py OUT [--peers DIR] [--arch 90]

    OUT/lib     _cuda.so for one kind of GPU, _cpu.so
    OUT/site    Python packages beside torch, Triton and transformers: gguf, and bitsandbytes for one CUDA
    OUT/peers   kernels of other libraries, from sources in DIR: marlin (IST-DASLab/marlin), ggml or llama.cpp

What is built already is built again only when its sources have changed. Fails where all of it and the tree, which travels
with it, are more than 64 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LIMIT = 64 << 20
PACKAGES = ("gguf", "bitsandbytes")
CUDA = "cuda130"
"""Of bitsandbytes' libraries, the one for torch's CUDA there."""


def sh(*command: object, **variables: str) -> None:
    if subprocess.call([str(c) for c in command], cwd=ROOT, env=os.environ | variables):
        sys.exit(f"gpu-pack: failed: {' '.join(map(str, command))}")


def older(target: Path, sources: Iterable[Path]) -> bool:
    return not target.exists() or target.stat().st_mtime < max(s.stat().st_mtime for s in sources)


def libraries(lib: Path, arch: str) -> None:
    """Both of ours."""
    lib.mkdir(parents=True, exist_ok=True)
    sources = [p for p in (ROOT / "kernels").rglob("*") if p.is_file()]
    for name, choice in (("_cuda.so", "only"), ("_cpu.so", "0")):
        mine = sources if name == "_cuda.so" else [p for p in sources if p.parent.name != "cuda"]
        if older(lib / name, [*mine, ROOT / "setup.py"]):
            build = ROOT / "build" / f"gpu-pack-{arch}"
            command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", build, "--build-temp", build / "temp"]
            sh(*command, QUANTFORGE_CUDA=choice, QUANTFORGE_CUDA_ARCH=arch)
            shutil.copyfile(build / "quantforge" / name, lib / name)


def packages(site: Path) -> None:
    """What pip has, without what they require."""
    if not older(site / "gguf", [ROOT / "constraints.txt"]):
        return
    shutil.rmtree(site, ignore_errors=True)
    options = ["-q", "--no-deps", "--no-compile", "-c", "constraints.txt", "--target", site]
    sh(sys.executable, "-m", "pip", "install", *options, *PACKAGES)
    for library in (site / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if library.stem.rpartition("_")[2] not in (CUDA, "cpu"):
            library.unlink()
    os.utime(site / "gguf")


def marlin(source: Path, out: Path) -> None:
    """Its one kernel, without torch's headers, and what packs weights for it."""
    shutil.copytree(source / "marlin", out / "marlin", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.cu", "*.cpp"))
    if older(out / "libmarlin.so", [source / "marlin" / "marlin_cuda_kernel.cu"]):
        from benchmarks.on_gpu.peers import compile_marlin

        compile_marlin(source / "marlin" / "marlin_cuda_kernel.cu", out / "libmarlin.so")


def ggml(source: Path, out: Path, arch: str) -> None:
    """Only what multiplies matrices. cuBLAS is torch's, where the toolkit has none."""
    build, blas = ROOT / "build" / "ggml", []
    toolkit = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parents[1]
    if not list(toolkit.glob("lib64/libcublas.so*")):
        found = [p for path in sys.path for p in Path(path).glob("nvidia/*/lib/libcublas.so*")]
        if not found:
            sys.exit("gpu-pack: ggml needs cuBLAS: the toolkit's, or the package nvidia-cublas in this Python's environment")
        lib, include = found[0].parent, found[0].parents[1] / "include"
        blas = [f"-DCUDA_{name}_LIBRARY={next(lib.glob(f'lib{name}.so*'))}" for name in ("cublas", "cublasLt")]
        blas.append(f"-DCMAKE_CUDA_FLAGS=-I{include}")
    switches = {
        "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
        "CMAKE_CUDA_ARCHITECTURES": f"{arch}-real", "GGML_CUDA": "ON", "GGML_CUDA_GRAPHS": "ON", "GGML_CUDA_FA": "OFF",
        "GGML_CUDA_NCCL": "OFF", "GGML_CUDA_NO_VMM": "ON", "GGML_CCACHE": "OFF", "GGML_NATIVE": "OFF", "GGML_AVX2": "ON",
        "GGML_BUILD_TESTS": "OFF", "GGML_BUILD_EXAMPLES": "OFF",
    }  # fmt: skip
    sh("cmake", "-S", source, "-B", build, *(f"-D{k}={v}" for k, v in switches.items()), *blas)
    sh("cmake", "--build", build, "--target", "ggml", "-j", os.cpu_count() or 1)


def size(files: Iterable[Path]) -> int:
    return sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=lambda text: Path(text).resolve())
    p.add_argument("--peers", type=lambda text: Path(text).resolve(), help="a folder with sources of other libraries")
    p.add_argument("--arch", default="90", help="compute capability, without its dot")
    a = p.parse_args()
    libraries(a.out / "lib", a.arch)
    packages(a.out / "site")
    if a.peers and (a.peers / "marlin").is_dir():
        marlin(a.peers / "marlin", a.out / "peers" / "marlin")
    for name in ("ggml", "llama.cpp"):
        if a.peers and (a.peers / name).is_dir():
            ggml(a.peers / name, a.out / "peers" / "ggml", a.arch)
            break
    for part in sorted(a.out.glob("*/*")):
        print(f"{size([part, *part.rglob('*')]) / 1e6:8.1f} MB  {part.relative_to(a.out)}")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tree, pack = size(ROOT / name for name in listed.split("\0") if name), size(a.out.rglob("*"))
    print(f"{(tree + pack) / 1e6:8.1f} MB  with the tree's {tree / 1e6:.1f}")
    if tree + pack > LIMIT:
        sys.exit(f"gpu-pack: more than {LIMIT / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
