"""What every GridCodec keeps: codes and params are the stored bytes, expand is decode, fit is no worse than encode."""

from __future__ import annotations

from importlib.resources import files

import gguf
import numpy as np
import pytest
import torch

import quantforge.codecs as codecs
from quantforge import native
from quantforge.codecs import GridCodec
from quantforge.codecs.base import GgmlCodec, Params
from quantforge.errors import NonFiniteError, RangeError, ShapeError

GRIDS = [c for c in map(codecs.get, codecs.names()) if isinstance(c, GridCodec)]
GGML = [c for c in GRIDS if isinstance(c, GgmlCodec)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.usefixtures("one_thread")  # torch's threads wait for each other on a busy machine


def ggml(codec: GridCodec, op: str) -> GgmlCodec:
    if not isinstance(codec, GgmlCodec) or not native.has(codec.name, op):
        pytest.skip(f"no {op} kernel for {codec.name}")
    return codec


def on(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


def gaussian(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.02, (rows, n)).astype(np.float32))


def importance(n: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, n).astype(np.float32))


def shipped(n: int) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(str(files("quantforge") / "data/demo-model/model.safetensors"), "pt") as f:
        return f.get_tensor("model.layers.1.mlp.up_proj.weight").float().reshape(-1)[: 96 * n].reshape(96, n)


def same_bits(a: torch.Tensor, b: torch.Tensor | np.ndarray) -> bool:
    """Equal bit by bit, any NaN equal to any NaN."""
    x, y = a.cpu().numpy(), np.asarray(b)
    return x.shape == y.shape and bool(((x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))).all())


def rows_of(params: Params, rows: object) -> Params:
    return {k: p[rows] for k, p in params.items()}


def test_all_affine_ggml_types_are_grids() -> None:
    affine = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert affine <= {c.name for c in GRIDS}


@pytest.mark.parametrize("codec", GGML, ids=repr)
class TestStored:
    def random(self, codec: GridCodec) -> tuple[np.ndarray, tuple[int, int]]:
        shape = (7, 768)
        info = codec.layout(shape)["data"]
        return np.random.default_rng(5).integers(0, 256, info.shape).astype(np.uint8), shape

    def test_unpack_then_pack_gives_the_bytes(self, codec: GridCodec) -> None:
        data, shape = self.random(codec)
        data.setflags(write=False)  # as a view of a memory map
        codes, params = codec.unpack({"data": data}, shape)
        assert codes.shape == (shape[0], shape[1] // codec.vector)
        assert all(p.shape[0] == shape[0] for p in params.values())
        parts = codec.pack(codes, params)
        assert list(parts) == ["data"] and parts["data"].dtype == np.uint8
        np.testing.assert_array_equal(parts["data"], data)

    def test_expand_is_gguf_dequantize(self, codec: GridCodec) -> None:
        data, shape = self.random(codec)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(codec.ggml_type))
        assert same_bits(codec.expand(*codec.unpack({"data": data}, shape)), expected)

    def test_expand_is_decode(self, codec: GridCodec) -> None:
        data, shape = self.random(codec)
        decoded = ggml(codec, "decode").decode({"data": data}, shape)
        assert same_bits(codec.expand(*codec.unpack({"data": data}, shape)), decoded)

    def test_encoded_bytes_come_back(self, codec: GridCodec) -> None:
        w = gaussian(5, 768)
        parts = ggml(codec, "encode").encode(w.numpy(), importance(768).numpy())
        np.testing.assert_array_equal(codec.pack(*codec.unpack(parts, (5, 768)))["data"], parts["data"])


@pytest.mark.parametrize("codec", GRIDS, ids=repr)
@pytest.mark.parametrize("device", DEVICES)
class TestGrid:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_pack_decodes_to_expand(self, codec: GridCodec, device: str, weighted: bool) -> None:
        w = gaussian(9, 768).to(on(device))
        params = codec.fit(w, importance(768).to(device) if weighted else None)
        codes = codec.round(w, params)
        parts = codec.pack(codes, params)
        expected = codec.decode(parts, (9, 768))
        if codec in GGML:
            expected = gguf.quants.dequantize(parts["data"], gguf.GGMLQuantizationType(codec.ggml_type))
        assert same_bits(codec.expand(codes, params), expected)
        codes2, params2 = codec.unpack(codec.pack(codes, params), (9, 768))
        assert torch.equal(codes.cpu(), codes2)
        assert all(torch.equal(params[k].cpu(), params2[k]) for k in params | params2)

    def test_columns_anywhere(self, codec: GridCodec, device: str) -> None:
        w = gaussian(6, 768).to(on(device))
        params = codec.fit(w)
        codes, v = codec.round(w, params), codec.vector
        whole = codec.expand(codes, params)
        edges = [(i, i + 1) for i in (0, 5, 15, 16, 31, 32, 255, 256, 300, 767)]
        edges += [(3, 9), (10, 40), (30, 290), (16, 48), (255, 257), (250, 768), (0, 512), (257, 258), (511, 768)]
        for a, b in edges:
            a, b = a // v * v, -(-b // v) * v
            part = codec.round(w[:, a:b], params, a)
            assert torch.equal(part, codes[:, a // v : b // v]), (a, b)
            assert same_bits(codec.expand(part, params, a), whole[:, a:b].cpu().numpy()), (a, b)

    def test_rows_are_independent(self, codec: GridCodec, device: str) -> None:
        w, q = gaussian(6, 768).to(on(device)), importance(768).to(device)
        params = codec.fit(w, q)
        rows = torch.tensor([4, 1], device=device)
        part = codec.fit(w[rows], q)
        assert all(torch.equal(p[rows], part[k]) for k, p in params.items())
        assert torch.equal(codec.round(w, params)[rows], codec.round(w[rows], rows_of(params, rows)))

    def test_round_is_nearest(self, codec: GridCodec, device: str) -> None:
        w = gaussian(6, 768).to(on(device))
        params = codec.fit(w)

        def error(codes: torch.Tensor) -> torch.Tensor:
            return (codec.expand(codes, params) - w).square().reshape(6, -1, codec.vector).sum(-1)

        best = error(codec.round(w, params))
        noise = gaussian(6, 768, seed=9).to(device)
        for scale in (-0.5, -0.05, 0.02, 0.2, 1.0):
            other = error(codec.round(w + scale * noise, params))
            assert bool((best <= other * (1 + 1e-5) + 1e-12).all())

    def test_degenerate_blocks(self, codec: GridCodec, device: str) -> None:
        n, g = 512, gaussian(1, 512)[0]
        cases = torch.stack(
            [torch.zeros(n), torch.full((n,), 0.3), torch.full((n,), -0.3), g.abs() + 0.1, -g.abs() - 0.1]
            + [g * s for s in (1e-38, 1e-9, 1e-5, 1e5)]
            + [torch.nn.functional.one_hot(torch.tensor(7), n).float(), torch.where(torch.arange(n) % 37 == 0, 100 * g, g)]
        ).to(on(device))
        for q in (None, importance(n), torch.zeros(n), importance(n) * 1e30, importance(n) * 1e-30, torch.eye(1, n)[0]):
            params = codec.fit(cases, None if q is None else q.to(device))
            w = codec.expand(codec.round(cases, params), params)
            assert bool(w.isfinite().all())
            if q is None:
                # never worse than storing 0, at any scale that f16 reaches
                error, energy = (w - cases).double().square().sum(1), cases.double().square().sum(1)
                assert bool((error <= energy * 1.001).all())

    def test_weights_beyond_the_scales(self, codec: GridCodec, device: str) -> None:
        w = (gaussian(2, 512) * 1e20).to(on(device))
        if getattr(codec, "scale_dtype", None) == np.float32:
            pytest.skip("f32 scales reach there")
        with pytest.raises(RangeError, match="up to 65504"):
            codec.fit(w)

    def fitted(self, codec: GridCodec, w: torch.Tensor) -> tuple[torch.Tensor, Params]:
        params = codec.fit(w)
        return codec.round(w, params), params

    def test_refuses(self, codec: GridCodec, device: str) -> None:
        w = gaussian(2, 512).to(on(device))
        if not codec.short_blocks:
            with pytest.raises(ShapeError):
                codec.fit(w[:, :40])
        with pytest.raises(ShapeError):
            codec.fit(w.reshape(2, 2, 256))
        with pytest.raises(ShapeError):
            codec.fit(w, importance(256).to(device))
        with pytest.raises(ShapeError):
            codec.unpack(codec.pack(*self.fitted(codec, w)), (2, 768))
        w[1, 3] = torch.inf
        with pytest.raises(NonFiniteError) as e:
            codec.fit(w)
        assert e.value.index == (1, 3)


@pytest.mark.parametrize("codec", GRIDS, ids=repr)
@pytest.mark.parametrize("weights", ["gaussian", "laplace", "shipped"])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_no_worse_than_encode(codec: GridCodec, weights: str, weighted: bool) -> None:
    rows, n = 96, 768
    w = {
        "gaussian": lambda: gaussian(rows, n),
        "laplace": lambda: torch.from_numpy(np.random.default_rng(2).laplace(0, 0.02, (rows, n)).astype(np.float32)),
        "shipped": lambda: shipped(n),
    }[weights]()
    if codec.vector > 1 and weighted:
        pytest.skip("encode weighs the weights of a vector, round takes the nearest one")
    q = importance(n) if weighted else None
    c = torch.ones(n) if q is None else q
    parts = ggml(codec, "encode").encode(w.numpy(), None if q is None else q.numpy())
    theirs = codec.expand(*codec.unpack(parts, (rows, n)))
    params = codec.fit(w, q)
    ours = codec.expand(codec.round(w, params), params)
    error, reference = (((x - w).double().square() * c).sum().item() for x in (ours, theirs))
    assert error <= reference * 1.01


@pytest.mark.parametrize("codec", GRIDS, ids=repr)
def test_fit_does_not_depend_on_threads(codec: GridCodec) -> None:
    w, q = gaussian(64, 1024), importance(1024)
    one = codec.fit(w, q)
    torch.set_num_threads(3)
    three = codec.fit(w, q)
    assert all(torch.equal(one[k], three[k]) for k in one)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", GRIDS, ids=repr)
def test_cuda_fits_the_same(codec: GridCodec) -> None:
    w, q = gaussian(64, 1024).to(on("cuda")), importance(1024)
    gpu, cpu = codec.fit(w, q.to("cuda")), codec.fit(w.cpu(), q)
    assert all(torch.equal(cpu[k], gpu[k].cpu()) for k in cpu)
    assert torch.equal(codec.round(w.cpu(), cpu), codec.round(w, gpu).cpu())
