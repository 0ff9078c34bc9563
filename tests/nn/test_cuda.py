"""On a GPU: every kernel against float64, what it leaves alone, graphs, torch.compile. `make gpu-test` runs this file,
and once more under compute-sanitizer where that is installed."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from quantforge import codecs, native
from quantforge.codecs.base import Encoded
from quantforge.errors import UnsupportedError
from quantforge.nn import QuantLinear, cuda, planes, products
from tests.nn.test_planes import FP8, INTEGERS, random_matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(bool(native.cuda_missing()), reason=native.cuda_missing() or "CUDA kernels"),
]

FAST = [*planes.FAMILIES, *INTEGERS, *FP8]
STORED = [
    "TQ1_0",
    *("BF16", "fp8-block64", "int3-g64-asym", "int5-channel-sym"),
]
TOLERANCE = 2e-3  # of |x|·|w| where sums cancel, of the norm at all
ROUNDED = 4e-3  # beyond COLUMNS activations of bf16: weights are rounded too, and what cuBLAS adds up of split columns


def matrix(codec: str, rows: int, n: int, seed: int = 0) -> Encoded:
    """Random bits where a test can make them, else an encoded random matrix."""
    found = codecs.get(codec)
    if codec in INTEGERS | FP8 or isinstance(found, codecs.base.AffineCodec):
        return random_matrix(codec, rows, n, seed)
    w = np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)
    importance = np.ones(n, np.float32) if found.needs_importance else None
    return codecs.quantize(w, found, importance=importance)


def length(codec: str, least: int) -> int:
    """A row's length from `least` on that the codec can hold: a multiple of its block and of no more."""
    block = codecs.get(codec).block_size
    return max(1, -(-least // block)) * block


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, rounded: bool = False) -> None:
    exact = x.double() @ w.double().T
    assert y.shape == exact.shape and y.isfinite().all()
    error = (y.double() - exact).abs()
    bar = ROUNDED if x.dtype == torch.bfloat16 and (rounded or len(x) > cuda.COLUMNS) else TOLERANCE
    assert (error <= bar * (x.double().abs() @ w.double().abs().T)).all()
    if exact.numel() > 64:
        assert error.norm() <= bar * exact.norm()


@pytest.mark.parametrize("codec", FAST + STORED)
def test_dequantize(codec):
    for seed, (rows, least) in enumerate([(1, 1), (33, 700), (129, 2048)]):
        e = matrix(codec, rows, length(codec, least), seed)
        packed = planes.pack(e).to("cuda")
        w = torch.from_numpy(e.decode())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = torch.ops.quantforge.dequantize(list(packed.tensors.values()), codec, *e.shape, dtype)
            assert torch.equal(got.cpu(), w.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", FAST + STORED)
def test_linear(codec, dtype):
    generator = torch.Generator().manual_seed(1)
    for seed, (rows, least) in enumerate([(1, 1), (33, 700), (1000, 1100), (5, 9000), (4100, 256)]):
        e = matrix(codec, rows, length(codec, least), seed)
        layer = QuantLinear.from_encoded(e).cuda()
        w = torch.from_numpy(e.decode()).cuda()
        for m in (1, 2, 3, 5, 8, 9, 33, 300):  # test_triton has Triton's: it would compile for minutes here
            x = torch.randn((m, e.shape[1]), generator=generator).to("cuda", dtype)
            with products.way("slabs") if m > products.REPEATED else nullcontext():
                check(layer(x), x, w)


@pytest.mark.parametrize("codec", FAST)
def test_what_is_around_stays(codec):
    """Outputs are poisoned, with guards around them; inputs lie between NaNs."""
    e = matrix(codec, 37, length(codec, 500))
    packed = planes.pack(e).to("cuda")
    tensors = [t for k, t in packed.tensors.items() if k != "group"]
    n = e.shape[1] + -e.shape[1] % 8
    for m in (1, 4, 8, 16):
        x = torch.full((m + 2, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        x[1:-1] = torch.randn((m, n), device="cuda")
        x[1:-1, e.shape[1] :] = 0
        out = torch.full((m + 2, 37), float("nan"), dtype=torch.float32, device="cuda")
        native.cuda_call(packed.kind, "linear", [x[1:-1], *tensors], [out[1:-1]], torch.cuda.current_stream().cuda_stream)
        assert out[0].isnan().all() and out[-1].isnan().all() and out[1:-1].isfinite().all()


@pytest.mark.parametrize("codec", ["Q4_0", "Q6_K", "IQ2_XXS", "int4-g128-asym-act"])
def test_shapes_of_activations(codec):
    e = matrix(codec, 40, 512)
    layer, w = QuantLinear.from_encoded(e).cuda(), torch.from_numpy(e.decode()).cuda()
    wide = torch.randn((6, 1024), device="cuda").bfloat16()
    for x in (wide[:, :512], wide[:, 1:513], wide.T[:512].T, wide[::2, ::2], wide[:4, 3:515].reshape(2, 2, 512)):
        check(layer(x).reshape(-1, 40), x.reshape(-1, 512), w)
    assert layer(wide[:0, :512]).shape == (0, 40)


@pytest.mark.parametrize("m", [1, 8, 40])
@pytest.mark.parametrize("codec", ["Q4_K", "Q8_0", "IQ4_XS", "nf4-dq", "int4-g128-sym"])
def test_graph(codec, m):
    e = matrix(codec, 256, 1024)
    layer, w = QuantLinear.from_encoded(e).cuda(), torch.from_numpy(e.decode()).cuda()
    x = torch.randn((m, 1024), device="cuda").bfloat16()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(2):
        x.copy_(torch.randn((m, 1024), generator=torch.Generator().manual_seed(seed)))
        y.fill_(float("nan"))
        graph.replay()
        check(y, x, w)


@pytest.mark.parametrize("codec", ["Q4_0", "Q6_K", "int8-g128-asym"])
def test_compiled(codec):
    e = matrix(codec, 64, 512)
    layer, w = QuantLinear.from_encoded(e).cuda(), torch.from_numpy(e.decode()).cuda()
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True)
    x = torch.randn((3, 512), device="cuda").bfloat16()
    check(compiled(x) / 2, x, w)


@pytest.mark.parametrize("codec", ["Q4_K", "IQ2_XXS"])
def test_compiled_into_graphs(codec):
    """Nothing that the kernels keep is memory of a graph: torch.compile would refuse."""
    e = matrix(codec, 256, 4096)
    layer, w = QuantLinear.from_encoded(e).cuda(), torch.from_numpy(e.decode()).cuda()
    for m in (1, 40):
        compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, mode="reduce-overhead", dynamic=False)
        for seed in range(4):
            x = torch.randn((m, 4096), generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()
            check(compiled(x).clone() / 2, x, w)


def test_the_callers_stream():
    """Work is put on the current stream, and nothing waits for it."""
    e = matrix("Q4_0", 4096, 4096)
    layer, w = QuantLinear.from_encoded(e).cuda(), torch.from_numpy(e.decode()).cuda()
    x = torch.zeros((1, 4096), device="cuda", dtype=torch.bfloat16)
    fresh = torch.randn((1, 4096), device="cuda").bfloat16()
    layer(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(fresh)
        y = layer(x)
        assert not stream.query()
    stream.synchronize()
    check(y, fresh, w)


@pytest.mark.parametrize("codec", ["Q4_K", "nf4-dq", "int4-g128-asym-act", "Q5_0"])
def test_gradients_and_states(codec):
    """Activations get gradients; what was saved on a GPU loads on a CPU, and the other way round."""
    e = matrix(codec, 100, 512)
    here = QuantLinear.from_encoded(e)
    there = QuantLinear.from_encoded(e).cuda()
    w = torch.from_numpy(e.decode()).cuda()
    x = torch.randn((3, 5, 512), device="cuda").bfloat16().requires_grad_()
    upstream = torch.randn((3, 5, 100), device="cuda").bfloat16()
    there(x).backward(upstream)
    check(x.grad.reshape(-1, 512), upstream.reshape(-1, 100), w.T, rounded=True)
    fresh = QuantLinear.from_encoded(matrix(codec, 100, 512, seed=1))
    fresh.load_state_dict({k: v.cpu() for k, v in there.state_dict().items()})
    assert fresh.encoded().tobytes() == e.tobytes()
    fresh = QuantLinear.from_encoded(matrix(codec, 100, 512, seed=1)).cuda()
    fresh.load_state_dict(here.state_dict())
    assert fresh.encoded().tobytes() == e.tobytes() and torch.equal(fresh(x), there(x))


def test_two_devices_are_an_error():
    layer = QuantLinear.from_encoded(matrix("Q4_0", 32, 256))
    with pytest.raises(UnsupportedError, match="move them to one device"):
        layer(torch.ones(1, 256, device="cuda").bfloat16())
    with pytest.raises(UnsupportedError, match="move them to one device"):
        layer.cuda()(torch.ones(1, 256).bfloat16())
    with pytest.raises(UnsupportedError, match="move them to one device"), torch.no_grad():
        layer(torch.ones(1, 256).bfloat16())
