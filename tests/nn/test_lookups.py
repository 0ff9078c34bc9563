"""Planes and kernels of the types whose codes are entries of a table, on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs, native
from quantforge.codecs.base import Encoded
from quantforge.nn import lookups, planes
from tests import cuda_host

SHAPES = [(1, 1), (16, 4), (33, 5), (7, 12)]  # rows, blocks


def random_matrix(codec: str, rows: int, n: int, seed: int) -> Encoded:
    """A matrix with any indices, signs and small scales; f16 and f32 scales come from an encoder."""
    found = codecs.get(codec)
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, n)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)
    e = codecs.quantize(w, found, importance=np.ones(n, np.float32))
    parts = dict(e.parts)
    if "codes" in parts:
        parts["codes"] = rng.integers(0, 256, parts["codes"].shape, np.uint8)
    else:
        data = parts["data"].reshape(rows, -1, found.type_size)
        noise = rng.integers(0, 256, data.shape, np.uint8)
        keep = {"MXFP4": 1, "NVFP4": 0}.get(codec, 2)
        noise[..., :keep] = data[..., :keep]
        if codec == "IQ1_M":  # its f16 lies in the upper halves of four bytes
            noise[..., 49::2] = noise[..., 49::2] & 15 | data[..., 49::2] & 240
        if codec == "IQ1_M":  # its f16 lies in the upper halves of four bytes
            noise[..., 49::2] = noise[..., 49::2] & 15 | data[..., 49::2] & 240
        parts["data"] = noise.reshape(rows, -1)
    return Encoded(found, (rows, n), parts)


def cases(seed: int = 0):
    for codec in lookups.FAMILIES:
        for i, (rows, blocks) in enumerate(SHAPES):
            yield pytest.param(codec, rows, blocks * codecs.get(codec).block_size, seed + i, id=f"{codec}-{rows}x{blocks}")


@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases())
def test_planes_come_back_bit_by_bit(codec, rows, n, seed):
    e = random_matrix(codec, rows, n, seed)
    packed = planes.pack(e)
    back = planes.unpack(packed)
    assert back.parts.keys() == e.parts.keys()
    assert all(np.array_equal(back.parts[k], e.parts[k]) for k in e.parts)
    again = planes.restore(list(packed.tensors.values()), codec, e.shape)
    assert planes.unpack(again).tobytes() == e.tobytes()


def test_bytes_are_the_files():
    """But for the table, which all matrices share, and the eighth sign of eight."""
    for codec, f in lookups.FAMILIES.items():
        e = random_matrix(codec, 32, 512, 1)
        packed = planes.pack(e)
        own = sum(t.nbytes for k, t in packed.tensors.items() if k not in ("table", "whole1"))
        stored = sum(p.nbytes for k, p in e.parts.items() if k != "nested_offset")
        parity = f.signs and codecs.get(codec).fields.signs[1] == 7
        more = {"NVFP4": 4, "IQ1_S": 32 * 2 * 4, "IQ1_M": 32 * 2 * 2}.get(codec, 0)  # a scale of each tile; bits to nibbles
        assert own == stored + parity * 32 * 512 // 64 + more
        assert planes.pack(e).tensors["table"] is packed.tensors["table"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(4))
def test_dequantize_is_decode(codec, rows, n, seed, dtype):
    e = random_matrix(codec, rows, n, seed)
    packed = planes.pack(e)
    guarded = torch.full((rows + 2, n), float("nan"), dtype=dtype)
    out = guarded[1:-1]
    assert cuda_host.call(packed.kind, "dequantize", list(packed.tensors.values()), out) == native.OK
    assert torch.equal(out, torch.from_numpy(e.decode()).to(dtype))
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(8))
def test_linear_is_the_product(codec, rows, n, seed, dtype):
    e = random_matrix(codec, rows, n, seed)
    packed = planes.pack(e)
    w = torch.from_numpy(e.decode()).double()
    for m in (1, 11):
        x = torch.randn((m, n), generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = torch.full((m, rows), float("nan"))
        assert cuda_host.call(packed.kind, "linear", [x, *packed.tensors.values()], out) == native.OK
        exact = x.double() @ w.T
        # NF4's numbers are rounded to the activations' type, the others are integers that it holds
        bound = (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11) if codec.startswith(("nf4", "fp4")) else 1e-5
        assert ((out - exact).abs() <= bound * (x.double().abs() @ w.abs().T)).all()
        if n >= 1024:
            assert (out - exact).norm() <= 1e-3 * exact.norm()  # so that rounding to bf16 makes it no more than 2e-3


@pytest.mark.parametrize("codec", ["IQ4_NL", "IQ2_S", "IQ1_S", "NVFP4"])
def test_tiles_side_by_side(codec):
    """Many rows: blocks of several tiles share a table, the last one has too few."""
    e = random_matrix(codec, 16 * 21 + 3, 512, 5)
    packed = planes.pack(e)
    x = torch.randn((3, 512), generator=torch.Generator().manual_seed(5)).half()
    out = torch.full((3, e.shape[0]), float("nan"))
    assert cuda_host.call(packed.kind, "linear", [x, *packed.tensors.values()], out) == native.OK
    w = torch.from_numpy(e.decode()).double()
    assert ((out - x.double() @ w.T).abs() <= 1e-5 * (x.double().abs() @ w.abs().T)).all()


def test_wrong_arguments_are_refused():
    tensors = list(planes.pack(random_matrix("IQ2_XXS", 16, 256, 0)).tensors.values())
    x, out = torch.zeros(1, 256).bfloat16(), torch.empty((1, 16))
    assert cuda_host.call("iq2_xxs", "linear", [x, *tensors[:-1]], out) == native.ESHAPE
    assert cuda_host.call("iq2_xxs", "linear", [torch.zeros(1, 512).bfloat16(), *tensors], out) == native.ESHAPE
    assert cuda_host.call("iq2_xxs", "dequantize", tensors, torch.empty((33, 256))) == native.ESHAPE
