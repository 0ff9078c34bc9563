"""What every registered codec must hold, whoever wrote it: the oracle for ggml types is ggml itself."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from quantforge import codecs, native
from quantforge.codecs.base import GgmlCodec
from quantforge.codecs.plain import PlainCodec
from quantforge.errors import NonFiniteError, RangeError, ShapeError, UnsupportedError
from tests import ggml_oracle

FAMILIES = (  # codecs described by their names
    *(f"int{b}-g64-{s}" for b, s in ((2, "sym"), (3, "asym"), (4, "sym"), (4, "asym"), (5, "sym"), (8, "sym"))),
    *("int2-channel-sym", "int4-channel-asym-bf16", "int8-channel-sym-f32", "int3-tensor-asym", "int8-tensor-sym"),
    *("fp8-tensor", "fp8-channel-bf16", "fp8-g32"),
)
ALL = [*codecs.names(), *FAMILIES]
ENCODERS = [n for n in ALL if codecs.get(n).encodes]
BLOCKS = [n for n in ENCODERS if not isinstance(codecs.get(n), PlainCodec) and native.has(n, "encode")]
WEIGHTED = [n for n in BLOCKS if getattr(codecs.get(n), "takes_importance", False)]
GGML = [n for n in ALL if codecs.get(n).ggml_type is not None and (n in ("F32", "F16", "BF16") or codecs.get(n).block_size > 1)]
SAME_BYTES = [n for n in ENCODERS if codecs.get(n).ggml_bytes]
IN = 512

oracle = pytest.mark.skipif(not ggml_oracle.available, reason=ggml_oracle.reason)


def _cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    normal = rng.normal(size=(6, IN))
    sparse = np.where(rng.random((6, IN)) < 0.95, 0, normal)
    sparse[0, ::3] = -0.0
    spike = normal * 1e-3
    spike[:, 77] = 40
    edges = np.where(rng.random((6, IN)) < 0.5, -1, 1) * rng.choice([0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8], (6, IN))
    scales = normal * np.repeat(10.0 ** rng.uniform(-8, 6, (6, IN // 32)), 32, axis=1)
    cases = {
        "sigma 1e-4": normal * 1e-4,
        "sigma 0.02": normal * 0.02,
        "sigma 30": normal * 30,
        "heavy-tailed": rng.standard_t(1.5, (6, IN)),
        "one sign": np.abs(normal) + 0.1,
        "other sign": -np.abs(normal) - 0.1,
        "sparse": sparse,
        "constant": np.repeat([[0.7], [-0.7], [1e-20], [3e20], [-1], [1 / 3]], IN, axis=1),
        "zero": np.zeros((2, IN)),
        "spike": spike,
        "ties": edges,
        "block scales": scales,
        "huge": np.clip(normal * 1e38, -3.4e38, 3.4e38),
        "large": normal * 1e19,
        "tiny": normal * 1e-20,
        "tinier": normal * 1e-37,
        "denormal": normal * 1e-41,
        "powers of two": np.sign(normal) * 2.0 ** rng.integers(-20, 20, (6, IN)),
        "below powers of two": normal.clip(-1, 1)
        * np.nextafter(2.0 ** rng.integers(-125, 126, (6, IN // 32)), 0, dtype=np.float32).repeat(32, 1),
    }
    return {k: np.ascontiguousarray(v, np.float32) for k, v in cases.items()}


CASES = _cases()
_rng = np.random.default_rng(21)
IMPORTANCE = {
    "lognormal": np.exp(_rng.normal(size=IN)),
    "ones": np.ones(IN),
    "half zero": np.where(_rng.random(IN) < 0.5, 0, _rng.random(IN)),
    "blocks of zero": np.exp(_rng.normal(size=IN)) * np.repeat([0, 1, 1, 0], IN // 4),
    "tiny": np.exp(_rng.normal(size=IN)) * 1e-30,
}
IMPORTANCE = {k: v.astype(np.float32) for k, v in IMPORTANCE.items()}


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QUANTFORGE_ISA", request.param)
    return str(request.param)


def weights(name: str, rows: int = 33, seed: int = 1) -> np.ndarray:
    """Gaussian weights; small integers for codecs that store integers."""
    w = np.random.default_rng(seed).normal(size=(rows, IN)) * 0.02
    if isinstance(c := codecs.get(name), PlainCodec) and c.dtype.kind == "i":
        w = np.round(w * 1000)
    return w.astype(np.float32)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def differing(ours: np.ndarray, theirs: np.ndarray) -> str:
    bad = np.flatnonzero(ours.view(np.uint8).reshape(-1) != theirs.view(np.uint8).reshape(-1))
    return f"{len(bad)} of {ours.nbytes} bytes differ, the first at {bad[:4].tolist()}"


@pytest.mark.parametrize("name", ENCODERS)
def test_parts_are_what_layout_says(name: str) -> None:
    codec = codecs.get(name)
    for shape in [(IN,), (3, IN), (2, 3, IN)]:
        w = weights(name, 6)[: int(np.prod(shape[:-1]))].reshape(shape)
        parts, layout = codec.encode(w), codec.layout(shape)
        assert list(parts) == list(layout)
        for k, info in layout.items():
            assert (parts[k].dtype, parts[k].shape) == (info.dtype, info.shape), k
        assert codec.nbytes(shape) == sum(p.nbytes for p in parts.values())
        assert codec.decode(parts, shape).shape == shape


@pytest.mark.parametrize("name", ENCODERS)
def test_decoded_weights_are_near(name: str) -> None:
    codec, w = codecs.get(name), weights(name)
    e = codecs.quantize(w, name, importance=np.ones(IN, np.float32))
    d = e.decode()
    assert d.dtype == np.float32
    if isinstance(codec, PlainCodec):
        np.testing.assert_array_equal(d, w.astype(codec.dtype).astype(np.float32))
        return
    error = np.sqrt(np.mean((d - w) ** 2) / np.mean(w**2))
    assert error < (0.85 if e.bpw < 3 else 0.03 if name.startswith("fp8") else 1.6 * 2.0 ** (1 - e.bpw)), error


@pytest.mark.parametrize("name", ENCODERS)
def test_one_block_odd_rows_and_threads(name: str) -> None:
    codec, w = codecs.get(name), weights(name)
    whole = codec.encode(w)
    for threads in (2, 7):
        assert equal(codec.encode(w, threads=threads), whole)
        np.testing.assert_array_equal(codec.decode(whole, w.shape, threads=threads), codec.decode(whole, w.shape))
    one = w[:1, : codec.block_size]
    assert codec.decode(codec.encode(one), one.shape).shape == one.shape
    if not codec.row_local:
        return
    for rows in (1, 3, 17, 32):
        assert equal(codec.encode(w[:rows]), {k: p[:rows] for k, p in whole.items()}), rows
    flat = codecs.Encoded(codec, w.shape, whole)
    np.testing.assert_array_equal(flat.rows(slice(3, 9)).decode(), flat.decode()[3:9])
    if codec.block_size == 1 and not isinstance(codec, PlainCodec):
        return  # parameters are a whole row's
    np.testing.assert_array_equal(
        codec.decode(codec.encode(one), one.shape), codec.decode(whole, w.shape)[:1, : codec.block_size]
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_any_array_of_the_same_numbers(name: str) -> None:
    codec, w = codecs.get(name), weights(name, 5)
    expected = codec.encode(w)
    wide = np.zeros((5, 2 * IN), np.float32)
    wide[:, ::2] = w
    kept = wide.copy()
    assert equal(codec.encode(wide[:, ::2]), expected)
    assert equal(codec.encode(np.asfortranarray(w)), expected)
    assert equal(codec.encode(w.astype(np.float64)), expected)
    np.testing.assert_array_equal(wide, kept)
    read_only = w.copy()
    read_only.flags.writeable = False
    assert equal(codec.encode(read_only), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_rows(name: str) -> None:
    codec = codecs.get(name)
    w = np.zeros((0, IN), np.float32)
    assert codec.decode(codec.encode(w), w.shape).shape == w.shape


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(name: str, bad: float) -> None:
    w = weights(name, 33)
    for at in [(0, 0), (16, 255), (32, IN - 1)]:
        damaged = w.copy()
        damaged[at] = bad
        damaged[32, IN - 1] = bad
        with pytest.raises(NonFiniteError) as e:
            codecs.get(name).encode(damaged, threads=2)
        assert e.value.index == at
        assert str(list(at)) in str(e.value)


@pytest.mark.parametrize("name", ALL)
def test_wrong_sizes_are_shape_errors(name: str) -> None:
    codec = codecs.get(name)
    if codec.block_size > 1 and not codec.short_blocks:
        for shape in [(codec.block_size + 1,), (2, codec.block_size - 1), (2, 0), ()]:
            with pytest.raises(ShapeError, match=name):
                codec.layout(shape)
            if codec.encodes:
                with pytest.raises(ShapeError, match=name):
                    codec.encode(np.zeros(shape, np.float32))
    parts = {k: np.zeros(i.shape, i.dtype) for k, i in codec.layout((4, IN)).items()}
    for shape in [(5, IN), (3, IN), (4, 2 * IN)]:
        with pytest.raises(ShapeError, match=name):
            codec.decode(parts, shape)


@pytest.mark.parametrize("name", WEIGHTED)
def test_unfit_importance_is_refused(name: str) -> None:
    codec, w = codecs.get(name), weights(name, 6).reshape(3, 2, IN)
    for q in [np.ones(IN - 1), np.ones(IN + 32), np.ones((4, IN))]:
        with pytest.raises(ShapeError, match=name):
            codec.encode(w, q.astype(np.float32))
    for bad in (np.nan, np.inf, -1.0):
        q = np.ones(IN, np.float32)
        q[5] = bad
        with pytest.raises(NonFiniteError, match="importance"):
            codec.encode(w, q)


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_of_each_expert(name: str) -> None:
    codec, w = codecs.get(name), weights(name, 9).reshape(3, 3, IN)
    q = np.stack([IMPORTANCE[k] for k in ("lognormal", "ones", "half zero")])
    whole = codecs.quantize(w, name, importance=q, threads=2).decode()
    if codec.row_local:
        for i in range(3):
            np.testing.assert_array_equal(codecs.quantize(w[i], name, importance=q[i]).decode(), whole[i])
    uniform = codec.encode(w, IMPORTANCE["lognormal"])
    assert equal(codec.encode(w, np.repeat(IMPORTANCE["lognormal"][None], 3, 0)), uniform)


def encoded(codec: codecs.Codec, w: np.ndarray, importance: np.ndarray | None = None) -> dict[str, np.ndarray] | None:
    """None where the type cannot hold these weights."""
    try:
        return codec.encode(w, importance)
    except RangeError:
        return None


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("magnitude", [7e4, 1e6, 1e7, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_weights_are_held_or_refused(name: str, magnitude: float, weighted: bool) -> None:
    codec, w = codecs.get(name), weights(name, 33)
    if name == "BOOL":
        pytest.skip("true and false have no magnitude")
    w[17, 40:70] = np.linspace(-magnitude, magnitude, 30)
    q = np.ones(IN, np.float32) if weighted else None
    if (parts := encoded(codec, w, q)) is None:
        with pytest.raises(RangeError, match="BF16") as refused:
            codec.encode(w, q, threads=2)
        row, column = refused.value.index
        assert row == 17 and 40 <= column < 70 and refused.value.value == w[row, column] and name in refused.value.reason
        return
    codec.check_finite(parts, w.shape)
    d = codec.decode(parts, w.shape)
    assert np.isfinite(d).all()
    error = np.sqrt(np.mean((d[17, 40:70] / magnitude - w[17, 40:70] / magnitude) ** 2))
    assert error < 0.6, "finite, but another number"


@pytest.mark.parametrize("name", ENCODERS)
def test_stored_scales_that_are_not_finite_are_told(name: str) -> None:
    """Bytes that are copied are not decoded: `check_finite` is what sees them."""
    codec, w = codecs.get(name), weights(name, 4)
    parts = {k: p.copy() for k, p in codec.encode(w).items()}
    codec.check_finite(parts, w.shape)
    for i, scale in enumerate(codec.scales(parts, w.shape)):
        if scale.dtype.kind in "iub":
            continue
        damaged = {k: p.copy() for k, p in parts.items()}
        if name == "IQ1_M":
            damaged["data"].reshape(-1, codec.type_size)[0, 49::2] |= 0xF0
        else:
            codec.scales(damaged, w.shape)[i][..., :1] = np.array(np.nan).astype(scale.dtype)
        made_finite = name in ("MXFP4", "NVFP4", "nf4-dq", "fp4-dq")  # by ggml's decoder, or by a limit
        assert made_finite or not np.isfinite(codec.decode(damaged, w.shape)).all()
        with pytest.raises(NonFiniteError, match=name):
            codec.check_finite(damaged, w.shape)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_isa_writes_the_same(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codecs.get(name)
    q = IMPORTANCE["lognormal"]
    for case, w in CASES.items():
        got = [encoded(codec, w), encoded(codec, w, q)]
        decoded = [None if p is None else codec.decode(p, w.shape) for p in got]
        with monkeypatch.context() as m:
            m.setenv("QUANTFORGE_ISA", "scalar")
            for parts, d, weighted in zip(got, decoded, (None, q), strict=True):
                again = encoded(codec, w, weighted)
                if parts is None or again is None or d is None:
                    assert parts is again, case
                    continue
                assert equal(parts, again), case
                np.testing.assert_array_equal(d.view(np.uint32), codec.decode(parts, w.shape).view(np.uint32), err_msg=case)


@oracle
@pytest.mark.parametrize("name", SAME_BYTES)
def test_bytes_are_ggmls(name: str, isa: str) -> None:
    codec = codecs.get(name)
    for case, w in CASES.items():
        if not codec.needs_importance and (parts := encoded(codec, w)):
            (data,) = parts.values()
            theirs = ggml_oracle.encode(name, w)
            assert data.tobytes() == theirs.tobytes(), f"{case}: {differing(data, theirs)}"
        for kind, q in IMPORTANCE.items() if name in WEIGHTED else ():
            if not (parts := encoded(codec, w, q)):
                continue
            (data,) = parts.values()
            theirs = ggml_oracle.encode(name, w, q)
            assert data.tobytes() == theirs.tobytes(), f"{case}, importance {kind}: {differing(data, theirs)}"
    if name in WEIGHTED:
        w = weights(name, 9).reshape(3, 3, IN)
        q = np.stack([IMPORTANCE[k] for k in ("lognormal", "ones", "half zero")])
        assert codec.encode(w, q)["data"].tobytes() == ggml_oracle.encode(name, w, q).tobytes()


def _random_bytes(codec: GgmlCodec | PlainCodec, rows: int = 9) -> np.ndarray:
    n = codec.nbytes((rows, IN)) if not isinstance(codec, GgmlCodec) else rows * IN // codec.block_size * codec.type_size
    return np.random.default_rng(3).integers(0, 256, (rows, n // rows), np.uint8)


def _assert_same_numbers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Bit for bit, but one NaN is as good as another."""
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


def _parts(codec: codecs.Codec, data: np.ndarray) -> dict[str, np.ndarray]:
    """`data` as the codec's parts; a scale per tensor, where there is one, is 1."""
    parts = {k: np.ones(i.shape, i.dtype) for k, i in codec.layout((len(data), IN)).items()}
    info = codec.layout((len(data), IN))["data"]
    return parts | {"data": data.view(info.dtype).reshape(info.shape)}


@oracle
@pytest.mark.parametrize("name", GGML)
def test_decode_of_any_bytes_equals_ggml(name: str, isa: str) -> None:
    codec = codecs.get(name)
    data = _random_bytes(codec)
    _assert_same_numbers(codec.decode(_parts(codec, data), (9, IN)), ggml_oracle.decode(name, data, (9, IN)))


@pytest.mark.parametrize("name", [n for n in GGML if n in gguf.GGMLQuantizationType.__members__])
def test_decode_of_any_bytes_equals_gguf_py(name: str, isa: str) -> None:
    codec, kind = codecs.get(name), gguf.GGMLQuantizationType[name]
    data = _random_bytes(codec)
    try:
        with np.errstate(all="ignore"):
            theirs = gguf.quants.dequantize(data, kind)
    except NotImplementedError:
        pytest.skip(f"gguf-py cannot decode {name}")
    _assert_same_numbers(codec.decode(_parts(codec, data), (9, IN)), np.asarray(theirs, np.float32).reshape(9, IN))


def test_names_are_found_in_any_case_and_misspellings_hinted() -> None:
    for name in ALL:
        assert codecs.get(name.lower()) is codecs.get(name)
    with pytest.raises(UnsupportedError, match="Q4_K"):
        codecs.get("Q4_KM")
