"""Runs the Triton kernels in Triton's interpreter: prints a JSON list of [case, relative error].

A process of its own: the interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from quantforge import codecs
from quantforge.nn import planes
from quantforge.nn.triton_kernels import FAMILIES, Config, gemm

CASES = [
    # rows, columns, activations, dtype, configuration: up to 64 activations (some: 128) sums are scaled, beyond that weights
    (37, 512, 17, torch.bfloat16, Config(32, 64, 2, 4, 2)),
    (71, 256, 45, torch.float16, Config(64, 64, 1, 4, 2)),
    (45, 512, 99, torch.bfloat16, Config(128, 64, 2, 4, 2)),
    (129, 512, 70, torch.bfloat16, Config(64, 128, 1, 8, 2)),
    (71, 256, 130, torch.float16, Config(128, 64, 1, 4, 2)),
]
MANY = ("Q4_K", "nf4", "int4-g32-asym-bf16")
"""Codecs that take all cases; the others three, as the interpreter is slow."""


def random_matrix(codec: codecs.Codec, rows: int, n: int) -> codecs.Encoded:
    rng = np.random.default_rng(rows)
    return codecs.quantize((rng.standard_normal((rows, n)) * rng.lognormal(0, 0.3, (rows, 1)) * 0.02).astype(np.float32), codec)


def main(names: list[str]) -> None:
    found = []
    for name in names:
        codec, kind = codecs.get(name), planes.kind(name)
        for i, (rows, n, m, dtype, config) in enumerate(CASES if name in MANY else CASES[:3]):
            if codec.block_size < FAMILIES[kind].chunk:
                n -= max(8, codec.block_size)  # K is a multiple of the block only
            e = random_matrix(codec, rows, n)
            x = torch.randn((m, n), generator=torch.Generator().manual_seed(i)).to(dtype)
            wide = torch.full((m, n + 8), float("nan"), dtype=dtype)
            wide[:, :n] = x  # rows that do not follow each other
            exact = x.double() @ torch.from_numpy(e.decode()).double().T
            y = gemm(wide[:, :n], list(planes.pack(e).tensors.values()), kind, rows, config)
            assert y.dtype == dtype and y.shape == exact.shape
            found.append([f"{name}-{i}", float((y.double() - exact).norm() / exact.norm())])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
