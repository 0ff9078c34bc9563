"""The IQ types against ggml: an error below ggml's on any input; what is theirs alone.

Layout, threads, every ISA's bytes, decode of any bytes and non-finite input are in test_contract.py,
the grids on torch tensors in test_grid.py.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

import quantforge as qf
from quantforge import codecs, native
from quantforge.codecs.iquants import IQCodec
from quantforge.errors import ShapeError
from tests import ggml_oracle

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
SIGNED = {"IQ2_XXS": 7, "IQ2_XS": 7, "IQ3_XXS": 7}
N = 512

oracle = pytest.mark.skipif(not ggml_oracle.available, reason=ggml_oracle.reason)
every_type = pytest.mark.parametrize("name", TYPES)


def iq(name: str) -> IQCodec:
    codec = codecs.get(name)
    assert isinstance(codec, IQCodec)
    return codec


def lognormal(n: int = N, seed: int = 1, sigma: float = 1.0) -> np.ndarray:
    return np.exp(sigma * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


def error(codec: IQCodec, data: np.ndarray, w: np.ndarray, q: np.ndarray | None) -> float:
    decoded = codec.decode({"data": data}, w.shape).astype(np.float64)
    return float((np.square(decoded - w) * (1.0 if q is None else q.astype(np.float64))).sum())


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    shape = (24, N)
    normal = rng.normal(size=shape)
    w = {
        "gaussian": lambda: normal * 0.02,
        "laplace": lambda: rng.laplace(size=shape) * 3,
        "student-t4": lambda: rng.standard_t(4, size=shape) * 1e-3,
        "outliers": lambda: np.where(rng.random(shape) < 0.004, 40, 1) * normal,
        "column scales": lambda: normal * lognormal(N, 9),
        "one sign": lambda: np.abs(normal) + 0.1,
    }[kind]()
    return np.ascontiguousarray(w, np.float32)


@oracle
@every_type
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "student-t4", "outliers", "column scales", "one sign"])
def test_error_is_below_ggmls(name: str, kind: str) -> None:
    codec, w = iq(name), weights(kind)
    importance = [lognormal(), lognormal(sigma=2.5, seed=2), np.ones(N, np.float32)]
    for q in importance if ggml_oracle.needs_importance(name) else [*importance, None]:
        ours, theirs = error(codec, codec.encode(w, q)["data"], w, q), error(codec, ggml_oracle.encode(name, w, q), w, q)
        assert ours < theirs, (ours / theirs, None if q is None else float(q.std()))


@oracle
@every_type
def test_error_is_below_ggmls_on_the_shipped_model(name: str) -> None:
    from safetensors import safe_open

    from quantforge.calibration import importance

    model = files("quantforge") / "data/demo-model"
    measured = importance.read(str(model / "llama.cpp-imatrix.gguf"))
    codec, ratios = iq(name), []
    with safe_open(str(model / "model.safetensors"), "pt") as f:
        for theirs, hf in {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj"}.items():
            for layer in (0, 3):
                w = f.get_tensor(f"model.layers.{layer}.{hf}.weight").float().numpy()[:96]
                q = measured.of(f"blk.{layer}.{theirs}.weight", w.shape)
                assert q is not None and w.shape[1] % 256 == 0
                ratios.append(error(codec, codec.encode(w, q)["data"], w, q) / error(codec, ggml_oracle.encode(name, w, q), w, q))
    assert max(ratios) < 0.99 and np.mean(ratios) < 0.97, ratios


@every_type
def test_hostile_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = iq(name)
    normal = np.random.default_rng(4).normal(size=N)
    rows = [np.zeros(N), np.full(N, 0.7), np.full(N, -0.7), np.abs(normal) + 1, -np.abs(normal) - 1]
    rows += [normal * s for s in (1e-44, 1e-38, 1e-20, 1e-6, 1e3, 1e5)]
    rows += [np.where(np.arange(N) == 300, 1.0, 0.0), np.where(np.arange(N) == 300, -3e4, normal), -0.0 * np.ones(N)]
    w = np.ascontiguousarray(np.clip(rows, -3.4e38, 3.4e38), np.float32)
    flat = np.zeros(N, np.float32)
    for q in (None, lognormal(), flat, np.where(np.arange(N) < 256, 0, 1), lognormal() * 1e-38, lognormal() * 1e34):
        q = None if q is None else q.astype(np.float32)
        data = codec.encode(w, q)["data"]
        decoded = codec.decode({"data": data}, w.shape)
        assert np.isfinite(decoded).all()
        assert not decoded[[0, -1]].any()
        c = 1 if q is None or not q.any() else q.astype(np.float64)
        lost, energy = (np.square(x.astype(np.float64)) * c for x in (decoded.astype(np.float64) - w, w))
        assert (lost.sum(1) <= energy.sum(1) * 1.0001).all(), lost.sum(1) / energy.sum(1)


@every_type
def test_columns_that_do_not_matter_do_not_matter(name: str) -> None:
    """A wild weight without importance must not cost the others anything."""
    codec, w, q = iq(name), weights("gaussian"), np.ones(N, np.float32)
    q[::16] = 0
    wild = w.copy()
    wild[:, ::16] *= 8
    calm = error(codec, codec.encode(w, q)["data"], w, q)
    assert error(codec, codec.encode(wild, q)["data"], wild, q) <= 1.1 * calm


@every_type
def test_importance_of_each_weight(name: str) -> None:
    codec, w = iq(name), weights("laplace")
    q = np.stack([lognormal(seed=i) for i in range(len(w))])
    whole = codec.encode(w, q, threads=2)["data"]
    for i in (0, 7, 23):
        np.testing.assert_array_equal(codec.encode(w[i : i + 1], q[i])["data"], whole[i : i + 1])


@every_type
def test_scale_of_weights_and_importance_is_free(name: str) -> None:
    """Powers of two change d alone: the search does not depend on units."""
    codec, w, q = iq(name), weights("student-t4"), lognormal()
    expected = codec.decode(codec.encode(w, q), w.shape)
    np.testing.assert_array_equal(codec.encode(w, q * np.float32(2**40))["data"], codec.encode(w, q)["data"])
    scaled = codec.decode(codec.encode(w * np.float32(16), q), w.shape)
    np.testing.assert_allclose(scaled, expected * 16, rtol=2e-3, atol=0.05)


@pytest.mark.parametrize("name", [n for n in TYPES if n in SIGNED])
def test_minuses_come_in_even_numbers(name: str) -> None:
    codec = iq(name)
    w = codecs.quantize(weights("gaussian"), codec, importance=lognormal()).decode()
    assert not (np.signbit(w).reshape(-1, 8).sum(1) & 1).any()


def test_what_llama_quantize_refuses_without_importance() -> None:
    assert {n for n in TYPES if iq(n).needs_importance} == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    for name in TYPES:
        e = qf.quantize(weights("gaussian"), name)
        assert np.isfinite(e.decode()).all() and not iq(name).ggml_bytes


@every_type
def test_wrong_tables_are_refused(name: str) -> None:
    codec, w = iq(name), weights("gaussian")[:1]
    out = np.empty(codec.layout(w.shape)["data"].shape, np.uint8)
    none, entries = np.empty(0, np.float32), codec.entries
    for tables in ([entries[:-1]], [entries.astype(np.float32)], [entries.T.copy()], [], [entries, entries]):
        with pytest.raises(native.KernelError):
            native.call(name, "encode", [w, none, *tables], [out])
        with pytest.raises(native.KernelError):
            native.call(name, "decode", [out, *tables], [w.copy()])
    if len(entries) > 16:
        with pytest.raises(native.KernelError):  # more levels than the type has
            native.call(name, "encode", [w, none, np.arange(entries.size).astype(np.int8).reshape(entries.shape)], [out])


@every_type
def test_round_between_vectors_only(name: str) -> None:
    import torch

    codec = iq(name)
    w = torch.from_numpy(weights("gaussian"))
    params = codec.fit(w)
    if codec.vector > 1:
        with pytest.raises(ShapeError, match=name):
            codec.round(w[:, :12], params, codec.vector // 2)
        with pytest.raises(ShapeError, match=name):
            codec.round(w[:, : codec.vector + 1], params)
