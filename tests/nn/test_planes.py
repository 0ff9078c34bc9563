"""The kernels' layout on GPUs and the arithmetic on it, without a GPU: kernels/cuda's headers run on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs, native
from quantforge.codecs.base import Encoded
from quantforge.nn import lookups, planes
from quantforge.nn.base import tensor
from tests import cuda_host

FAST = [name for name in planes.FAMILIES if name not in lookups.FAMILIES]
SHAPES = [(1, 1), (16, 4), (33, 5), (7, 12)]  # rows, blocks


def random_bytes(codec: str, rows: int, n: int, seed: int = 0) -> Encoded:
    """A matrix of any bits: every code and every sub-scale occurs; f16s are finite and of all signs."""
    found = codecs.get(codec)
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, n)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)
    e = codecs.quantize(w, found)
    grid = found.grid
    noise = torch.from_numpy(rng.integers(0, 256, (rows, n // found.block_size, grid.type_size), np.uint8))
    stored = tensor(e.parts["data"]).reshape(noise.shape)
    for at in grid.floats.values():
        noise[..., at : at + 2] = stored[..., at : at + 2]
    return Encoded(found, (rows, n), {"data": noise.reshape(rows, -1).numpy()})


def cases(seed: int = 0):
    for codec in FAST:
        for i, (rows, blocks) in enumerate(SHAPES):
            yield pytest.param(codec, rows, blocks * codecs.get(codec).block_size, seed + i, id=f"{codec}-{rows}x{blocks}")


@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases())
def test_planes_come_back_bit_by_bit(codec, rows, n, seed):
    e = random_bytes(codec, rows, n, seed)
    packed = planes.pack(e)
    back = planes.unpack(packed)
    assert all(np.array_equal(back.parts[k], e.parts[k]) for k in e.parts)
    again = planes.restore(list(packed.tensors.values()), codec, e.shape)
    assert planes.unpack(again).tobytes() == e.tobytes()
    padded = -(-rows // 16) * 16 * (-(-n // planes.family(codec).chunk) * planes.family(codec).chunk)
    assert packed.nbytes * rows * n == e.nbytes * padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(4))
def test_dequantize_is_decode(codec, rows, n, seed, dtype):
    e = random_bytes(codec, rows, n, seed)
    packed = planes.pack(e)
    guarded = torch.full((rows + 2, n), float("nan"), dtype=dtype)
    out = guarded[1:-1]
    assert cuda_host.call(packed.kind, "dequantize", list(packed.tensors.values()), out) == native.OK
    assert torch.equal(out, torch.from_numpy(e.decode()).to(dtype))
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(8))
def test_linear_is_the_product(codec, rows, n, seed, dtype):
    e = random_bytes(codec, rows, n, seed)
    packed = planes.pack(e)
    for m in (1, 3, 8):
        x = torch.randn((m, n), generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = torch.full((m, rows), float("nan"))
        assert cuda_host.call(packed.kind, "linear", [x, *packed.tensors.values()], out) == native.OK
        w = torch.from_numpy(e.decode()).double()
        # what is taken off the raised codes is up to 1000 times as large as they are
        assert ((out - x.double() @ w.T).abs() <= 1e-4 * (x.double().abs() @ w.abs().T)).all()


def test_two_tiles_a_block():
    """Many rows: the kernel that shares activations between two tiles."""
    for codec in FAST:
        rows, n = 16 * 16, 2 * planes.family(codec).chunk
        e = random_bytes(codec, rows, n, 3)
        x = torch.randn((5, n)).bfloat16()
        out = torch.full((5, rows), float("nan"), dtype=torch.bfloat16)
        packed = planes.pack(e)
        assert cuda_host.call(packed.kind, "linear", [x, *packed.tensors.values()], out) == native.OK
        exact = x.double() @ torch.from_numpy(e.decode()).double().T
        assert (out.double() - exact).norm() <= 2e-3 * exact.norm()


def test_wrong_arguments_are_refused():
    e = random_bytes("Q4_0", 16, 128)
    tensors = list(planes.pack(e).tensors.values())
    out = torch.empty((1, 16))
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 256).bfloat16(), *tensors], out) == native.ESHAPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(9, 128).bfloat16(), *tensors], torch.empty(9, 16)) == native.ESHAPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 128), *tensors], out) == native.EDTYPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 128).bfloat16(), *tensors[:1]], out) == native.ESHAPE
    assert cuda_host.call("q4_0", "dequantize", tensors, torch.empty((33, 128))) == native.ESHAPE
