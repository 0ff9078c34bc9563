"""K-quants against ggml where their searches go astray: groups of unlike kinds and scales in one super-block.

The contract test holds ordinary weights. These rows drive the searches out of their grids: a group
whose stored scale is 0 keeps the codes of its search, a fitted min may land on the group's maximum,
sums overflow or vanish, a negative scale wraps in its byte.
"""

from __future__ import annotations

import numpy as np
import pytest

from quantforge import native
from quantforge.arrays import F32
from quantforge.codecs import get
from tests import ggml_oracle

N, ROWS = 512, 24
KINDS = 11


def rows_of_unlike_groups(rng: np.random.Generator, size: int, low: float, high: float) -> F32:
    """f32[ROWS, N]: every `size` weights are of a random kind, scaled by 10**(low..high)."""
    g = rng.standard_normal((ROWS * N // size, size))
    ulps = 1 + rng.integers(-2, 3, g.shape) * 2.0**-23
    kinds = [
        g,
        np.broadcast_to(np.sign(g[:, :1]), g.shape),
        g * (rng.random(g.shape) < 0.15),
        ulps,
        -ulps,
        np.abs(g),
        -np.abs(g),
        rng.integers(-8, 8, g.shape) / 2,
        g * 0,
        g * 10.0 ** rng.uniform(-12, 0, g.shape),
        np.where(rng.random(g.shape) < 0.06, g * 1e4, g),
    ]
    assert len(kinds) == KINDS
    w = np.choose(rng.integers(0, KINDS, (len(g), 1)), kinds) * 10.0 ** rng.uniform(low, high, (len(g), 1))
    return np.clip(w, -3.4e38, 3.4e38).astype(np.float32).reshape(ROWS, N)


def importances(rng: np.random.Generator) -> dict[str, F32 | None]:
    q = rng.lognormal(0, 1, N)
    found = {
        "ordinary": q,
        "mostly zero": q * (rng.random(N) < 0.1),
        "zero groups": q * np.repeat(rng.integers(0, 2, N // 16), 16),
        "peaked": np.where(rng.random(N) < 0.05, q * 1e8, q),
        "wide": 10.0 ** rng.uniform(-20, 20, N),
        "whole range": 10.0 ** rng.uniform(-44, 38, N),
    }
    return {"none": None} | {k: v.astype(np.float32) for k, v in found.items()}


@pytest.mark.skipif(not ggml_oracle.available, reason=ggml_oracle.reason)
@pytest.mark.parametrize(("low", "high"), [(0, 0), (-3, 3), (-44, 38)])
@pytest.mark.parametrize("size", [16, 32, 256])
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.usefixtures("unchecked")
def test_unlike_groups(name: str, size: int, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng([size, int(high)])
    w = rows_of_unlike_groups(rng, size, low, high)
    for kind, q in importances(rng).items():
        theirs = ggml_oracle.encode(name, w, q)
        for isa in native.isas():
            monkeypatch.setenv("QUANTFORGE_ISA", isa)
            ours = get(name).encode(w, q)["data"]
            blocks = np.flatnonzero((ours != theirs).reshape(-1, get(name).nbytes((256,))).any(1))
            assert not len(blocks), f"importance {kind}, {isa}: blocks {blocks[:5].tolist()} differ"


@pytest.mark.skipif(not ggml_oracle.available, reason=ggml_oracle.reason)
def test_search_far_outside_its_grid() -> None:
    """A min fitted to just below the maximum: ggml clamps such codes before it rounds them."""
    weights = {20: -0.21, 24: 0.417, 45: 1.13, 46: 0.855, 54: -0.876, 109: 0.321, 121: 0.433, 145: -1.32, 150: -0.238}
    weights |= {182: -1.35, 233: 0.751, 242: 0.266}
    w, q = np.zeros((1, 256), np.float32), np.ones(256, np.float32)
    w[0, list(weights)] = list(weights.values())
    q[144:152] = [6.4e5, 3e-17, 1.7e-5, 1.6e13, 1e7, 9.8e17, 4600, 1.2e-7]
    q[152:160] = [2.5e15, 1.6e-9, 3.9e-7, 23000, 4.6e-12, 2.4e-9, 1.9e-18, 9.7e-8]
    np.testing.assert_array_equal(get("Q2_K").encode(w, q)["data"], ggml_oracle.encode("Q2_K", w, q))
