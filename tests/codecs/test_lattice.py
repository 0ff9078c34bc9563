"""Blocks on a lattice come back as they were; everything else is what the plain type gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from quantforge import codecs
from quantforge.codecs.base import AffineCodec
from quantforge.codecs.lattice import LatticeCodec, levels, on_lattice, possible

BF16 = ml_dtypes.bfloat16
TYPES = [c for c in map(codecs.get, codecs.names()) if isinstance(c, AffineCodec)]
EACH = pytest.mark.parametrize("codec", TYPES, ids=lambda c: c.name)


def trained(low: int, high: int, group: int, scale: type = np.float32, rows: int = 64, columns: int = 1024) -> np.ndarray:
    """Weights as quantization-aware training leaves them: f32 that are bf16(scale · integer)."""
    rng = np.random.default_rng(low + 1000 * group)
    q = np.clip(np.rint(rng.normal(0, (high - low) / 5, (rows, columns))), low, high)
    q = np.clip(q, low, high)
    step = np.exp(rng.normal(-4, 0.7, (rows, columns // group))).astype(scale).astype(np.float32).repeat(group, 1)
    return (step * q.astype(np.float32)).astype(BF16).astype(np.float32)


def ordinary(rows: int = 64, columns: int = 1024, dtype: type = BF16) -> np.ndarray:
    return np.random.default_rng(1).standard_t(4, (rows, columns)).astype(np.float32).astype(dtype).astype(np.float32) / 64


def limits(codec: AffineCodec) -> tuple[int, int]:
    """The integers that every zero point has room for."""
    top = codec.grid.q.hi
    low, high = (0, top) if top < 7 else (-codec.grid.q.zero or -(top + 1) // 2, top - (codec.grid.q.zero or (top + 1) // 2))
    return max(low, -16), min(high, 15)


def back(codec: AffineCodec, w: np.ndarray) -> float:
    """The part of bf16 weights that come back."""
    decoded = codecs.quantize(w, codec).decode()
    return float((decoded.astype(BF16) == w.astype(BF16)).mean())


@EACH
@pytest.mark.parametrize("scale", [BF16, np.float16, np.float32], ids=lambda t: t.__name__)
def test_lattices_come_back(codec: AffineCodec, scale: type) -> None:
    for group in sorted({codec.block_size, 128, 1024} - set(range(codec.block_size))):
        w = trained(*limits(codec), group, scale)
        assert back(on_lattice(codec), w) > (0.97 if scale is np.float32 else 0.999)
        if codec.name == "Q4_0":
            assert back(codec, w) < 0.5


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 8), (-7, 7), (-4, 3), (-1, 1), (-2, 1)])
def test_q4_0_turns_the_range_around_where_it_has_to(low: int, high: int) -> None:
    assert back(on_lattice(codecs.get("Q4_0")), trained(low, high, 32, BF16)) > 0.999


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-15, 0), (-3, 12), (-11, 4)])
def test_zero_points(low: int, high: int) -> None:
    for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q8_0"):
        w = trained(low, high, 256, BF16)
        decoded = codecs.quantize(w, on_lattice(codecs.get(name))).decode()
        error = np.linalg.norm(decoded - w) / np.linalg.norm(w)
        assert error < (0.005 if name in ("Q4_1", "Q5_1") else 0.002), name


@EACH
def test_other_weights_are_what_the_plain_type_makes_of_them(codec: AffineCodec) -> None:
    importance = np.random.default_rng(2).lognormal(0, 1, 1024).astype(np.float32)
    for w in (ordinary(), ordinary(dtype=np.float16), ordinary(dtype=np.float32)):
        for q in (None, importance):
            mine = codecs.quantize(w, on_lattice(codec), importance=q)
            assert mine.tobytes() == codecs.quantize(w, codec, importance=q).tobytes()


def test_a_block_that_is_on_none_stays_ggmls_beside_those_that_are() -> None:
    w, codec = trained(-8, 7, 32), codecs.get("Q4_0")
    w[::2] = ordinary()[::2]
    mine, plain = codecs.quantize(w, on_lattice(codec)), codecs.quantize(w, codec)
    assert (mine.parts["data"][::2] == plain.parts["data"][::2]).all()
    assert back(on_lattice(codec), w[1::2]) > 0.98


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=lambda t: t.__name__)
def test_ordinary_weights_are_never_taken_for_a_lattice(dtype: type) -> None:
    rng = np.random.default_rng(5)
    for x in (rng.normal(0, 0.02, (1 << 13, 32)), rng.laplace(0, 1, (1 << 12, 32)), rng.uniform(-1, 1, (1 << 12, 32))):
        w = x.astype(dtype).astype(np.float32)
        assert not possible(w[:1024]) and not levels(w[:1024])
        for codec in TYPES:
            if codec.block_size == 32:
                assert not on_lattice(codec)._exact(w)[0].any()


@pytest.mark.parametrize(("low", "high", "n"), [(-8, 7, 16), (-1, 1, 3), (-15, 15, 31), (-2, 1, 4)])
def test_levels(low: int, high: int, n: int) -> None:
    w = trained(low, high, 64).reshape(-1, 32)
    assert possible(w) and levels(w) == n
    assert possible(np.zeros((4, 32), np.float32)) and not levels(np.zeros((4, 32), np.float32))


@EACH
def test_fitted_parameters_are_on_the_lattice(codec: AffineCodec) -> None:
    torch = pytest.importorskip("torch")
    exact = on_lattice(codec)
    w = trained(*limits(codec), 256, BF16, rows=8)
    w[3] = ordinary(8)[3]
    params = exact.fit(torch.from_numpy(w))
    expanded = exact.expand(exact.round(torch.from_numpy(w), params), params).numpy()
    plain = codec.fit(torch.from_numpy(w))
    assert all(torch.equal(params[k][3], plain[k][3]) for k in params)
    on = np.arange(8) != 3
    assert (expanded[on].astype(BF16) == w[on].astype(BF16)).mean() > 0.999


def test_steps_outside_of_f16_are_left_to_the_plain_type() -> None:
    codec = codecs.get("Q8_0")
    w = trained(-8, 7, 32) * np.float32(2.0**-24)
    assert codecs.quantize(w, on_lattice(codec)).tobytes() == codecs.quantize(w, codec).tobytes()


def test_it_is_the_same_type_to_files() -> None:
    for codec in TYPES:
        exact = on_lattice(codec)
        assert isinstance(exact, LatticeCodec) and exact is on_lattice(codec)
        assert (exact.name, exact.ggml_type, exact.layout((4, 512))) == (codec.name, codec.ggml_type, codec.layout((4, 512)))
