"""The NEON unit is the same source: it compiles with a cross compiler, and under qemu it writes the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from quantforge import codecs
from quantforge.codecs.base import GgmlCodec
from quantforge.codecs.plain import PlainCodec

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
ROWS, IN = 7, 512

# For every line "codec row_bytes takes_importance" on stdin: what encode, encode with importance
# and decode give, raw on stdout. w and importance are read from the file named.
DRIVER = r"""
#include <stdlib.h>
#include <stdio.h>
#include <string>
#include <vector>
#include "quantforge.h"
static qf_fn find(const qf_table *t, const std::string &codec, const std::string &op) {
    for (int i = 0; i < t->n; i++) if (codec == t->kernels[i].codec && op == t->kernels[i].op) return t->kernels[i].fn;
    return nullptr;
}
int main(int argc, char **argv) {
    const int64_t rows = atoll(argv[3]), in = atoll(argv[4]);
    const qf_table *t = qf_open(argv[1]);
    if (argc != 5 || !t) return 2;
    std::vector<float> w(rows * in), q(in), back(rows * in);
    FILE *f = fopen(argv[2], "rb");
    if (!f || fread(w.data(), 4, w.size(), f) != w.size() || fread(q.data(), 4, q.size(), f) != q.size()) return 3;
    char name[64];
    long long row_bytes;
    int weighted;
    while (scanf("%63s %lld %d", name, &row_bytes, &weighted) == 3) {
        std::vector<uint8_t> data(rows * row_bytes);
        qf_array inputs[2] = {{w.data(), {rows, in}, 2, QF_F32}, {q.data(), {in}, 1, QF_F32}};
        qf_array bytes = {data.data(), {rows, row_bytes}, 2, QF_U8}, weights = {back.data(), {rows, in}, 2, QF_F32};
        for (int n = 1; n <= 1 + weighted; n++) {
            if (find(t, name, "encode")(inputs, n, &bytes, 1, nullptr) != QF_OK) return 4;
            fwrite(data.data(), 1, data.size(), stdout);
        }
        if (find(t, name, "decode")(&bytes, 1, &weights, 1, nullptr) != QF_OK) return 5;
        fwrite(back.data(), 4, back.size(), stdout);
    }
}
"""


@pytest.mark.skipif(not shutil.which(CROSS), reason=f"no {CROSS} (Debian: apt-get install g++-aarch64-linux-gnu)")
def test_neon_compiles_and_writes_the_same_bytes(tmp_path: Path) -> None:
    driver = tmp_path / "driver.cpp"
    driver.write_text(DRIVER)
    sources = [str(KERNELS / "cpu" / f"{unit}.cpp") for unit in ("dispatch", "scalar", "neon")]
    program = tmp_path / "driver"
    subprocess.run([CROSS, *FLAGS, f"-I{KERNELS}", "-static", str(driver), *sources, "-o", str(program)], check=True)
    if not shutil.which(QEMU):
        pytest.skip(f"compiled, but no {QEMU} to run it (Debian: apt-get install qemu-user)")

    rng = np.random.default_rng(5)
    # neither huge nor denormal: where a sum becomes NaN, its sign is the hardware's
    w = (rng.normal(size=(ROWS, IN)) * np.logspace(-10, 4, ROWS)[:, None]).astype(np.float32)
    w[2] = 0
    w[3, ::2] = rng.integers(-8, 9, IN // 2)
    q = np.exp(rng.normal(size=IN)).astype(np.float32)
    (tmp_path / "w").write_bytes(w.tobytes() + q.tobytes())
    known = [codecs.get(n) for n in codecs.names()]
    # those whose kernels take no more than weights and importance
    blocks = [c for c in known if isinstance(c, GgmlCodec) and type(c).encode is GgmlCodec.encode and c.encodes and not c.tables]
    floats = [c for c in known if isinstance(c, PlainCodec) and c.ggml_bytes]
    lines, expected = "", b""
    for codec in [*blocks, *floats]:
        weighted = isinstance(codec, GgmlCodec) and codec.takes_importance
        lines += f"{codec.name} {codec.nbytes((IN,))} {int(weighted)}\n"
        for importance in [None, q][: 1 + weighted]:
            parts = codec.encode(w, importance)
            expected += parts["data"].tobytes()
        expected += codec.decode(parts, w.shape).tobytes()
    for isa in ("neon", "scalar"):
        command = [QEMU, str(program), isa, str(tmp_path / "w"), str(ROWS), str(IN)]
        got = subprocess.run(command, input=lines.encode(), stdout=subprocess.PIPE, check=True).stdout
        assert got == expected, isa
