"""NVFP4's scale per tensor: small errors at every magnitude, and the weights that llama.cpp computes with."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge import codecs, native
from quantforge.errors import ShapeError
from tests import ggml_oracle


def relative_error(w: np.ndarray, importance: np.ndarray | None = None, measure: np.ndarray | float = 1.0) -> float:
    d = codecs.quantize(w, "NVFP4", importance=importance).decode()
    return float(np.sqrt(np.sum(measure * (d - w) ** 2.0) / np.sum(measure * w**2.0)))


@pytest.fixture
def normal() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(64, 1024))


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("sigma", [1e-20, 1e-4, 1e-3, 0.002, 0.02, 0.3, 1, 10, 1e4])
def test_error_does_not_depend_on_magnitude(normal: np.ndarray, sigma: float, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTFORGE_ISA", isa)
    assert relative_error((normal * sigma).astype(np.float32)) < 0.09


def test_rows_of_different_magnitude_share_the_scale(normal: np.ndarray) -> None:
    w = (normal * np.geomspace(1e-3, 1, 64)[:, None]).astype(np.float32)
    d = codecs.quantize(w, "NVFP4").decode()
    error = np.sqrt(((d - w) ** 2).mean(1) / (w**2).mean(1))
    assert error.max() < 0.11


def test_importance_lowers_the_weighted_error(normal: np.ndarray) -> None:
    w, q = normal.astype(np.float32), np.exp(2 * np.random.default_rng(6).normal(size=1024)).astype(np.float32)
    assert relative_error(w, q, q) < 0.97 * relative_error(w, None, q)


@pytest.mark.skipif(not ggml_oracle.available, reason=ggml_oracle.reason)
def test_decode_is_ggmls_times_the_scale(normal: np.ndarray) -> None:
    e = codecs.quantize((normal * 0.002).astype(np.float32), "NVFP4")
    np.testing.assert_array_equal(e.decode(), ggml_oracle.decode("NVFP4", e.parts["data"], e.shape) * e.parts["scale"][0])
    theirs = {"data": ggml_oracle.encode("NVFP4", normal.astype(np.float32))}
    np.testing.assert_array_equal(e.codec.decode(theirs, normal.shape), ggml_oracle.decode("NVFP4", theirs["data"], normal.shape))


def test_each_expert_has_its_scale(normal: np.ndarray) -> None:
    w = (normal.reshape(4, 16, 1024) * np.array([1e-3, 1, 0, 40])[:, None, None]).astype(np.float32)
    whole = codecs.quantize(w, "NVFP4", threads=2)
    assert whole.parts["scale"].shape == (4,)
    for i in range(4):
        one = codecs.quantize(w[i], "NVFP4")
        assert one.parts["scale"] == whole.parts["scale"][i]
        np.testing.assert_array_equal(one.decode(), whole.decode()[i])
    with pytest.raises(ShapeError, match="scale"):
        whole.codec.decode(whole.parts | {"scale": np.ones(3, np.float32)}, w.shape)


def test_the_largest_floats_stay_finite() -> None:
    w = np.full((2, 64), np.finfo(np.float32).max)
    d = codecs.quantize(w, "NVFP4").decode()
    assert np.isfinite(d).all() and d.min() > 0.99 * w.max()
