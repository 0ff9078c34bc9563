"""The kernels' layout on GPUs and the arithmetic on it, without a GPU: kernels/cuda's headers run on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs, native
from quantforge.codecs.base import AffineCodec, Encoded
from quantforge.nn import lookups, planes
from quantforge.nn.base import tensor
from tests import cuda_host

INTEGERS = {  # rows' lengths
    "int4-g128-sym": (128, 512, 1536),
    "int4-g128-asym": (128, 512, 1536),
    "int4-g128-asym-bf16": (512,),
    "int4-g256-asym": (256, 768),
    "int4-g384-sym": (384, 1152),
    "int4-g64-asym": (64, 192, 512),
    "int4-g32-sym-bf16": (32, 160, 256),
    "int4-g96-asym": (96, 288, 384),
    "int4-channel-sym-f32": (8, 100, 1000),
    "int4-channel-asym": (12, 256),
    "int4-tensor-asym": (256,),
    "int4-g128-asym-act": (128, 512),
    "int4-g64-sym-act": (512,),
    "int8-g128-asym": (128, 512),
    "int8-g64-sym": (192,),
    "int8-g32-asym-bf16": (96,),
    "int8-channel-sym": (1, 24, 1001),
    "int8-channel-asym-f32": (300,),
    "int8-row": (8, 100, 512),
    "int8-g128-asym-act": (256,),
}
FP8 = {
    "fp8-channel": (1, 24, 300, 1000),
    "fp8-channel-bf16": (512,),
    "fp8-tensor": (96, 513),
    "fp8-tensor-f16": (128,),
    "fp8-block128": (128, 500, 1300),
    "fp8-block256-bf16": (640,),
    "fp8-block512": (640, 1500),
}
FAST = [name for name in planes.FAMILIES if name not in lookups.FAMILIES]
SHAPES = [(1, 1), (16, 4), (33, 5), (7, 12)]  # rows, blocks


def random_matrix(codec: str, rows: int, n: int, seed: int = 0) -> Encoded:
    """A matrix of any bits: every code and every sub-scale occurs; floats are finite and of all signs."""
    found = codecs.get(codec)
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, n)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)
    e = codecs.quantize(w, found)
    if isinstance(found, AffineCodec):
        grid = found.grid
        noise = torch.from_numpy(rng.integers(0, 256, (rows, n // found.block_size, grid.type_size), np.uint8))
        stored = tensor(e.parts["data"]).reshape(noise.shape)
        for at in grid.floats.values():
            noise[..., at : at + 2] = stored[..., at : at + 2]
        return Encoded(found, (rows, n), {"data": noise.reshape(rows, -1).numpy()})
    if codec in planes.FAMILIES:
        data = e.parts["data"].reshape(rows, -1, found.type_size)
        noise = rng.integers(0, 256, data.shape, np.uint8)
        (d,) = planes.FAMILIES[codec].params
        noise[..., d] = data[..., d]
        return Encoded(found, (rows, n), {"data": noise.reshape(rows, -1)})
    parts = dict(e.parts)
    for name in ("codes", "zero"):
        if name in parts:
            top = 16 if name == "zero" and codec.startswith("int4") else 256
            parts[name] = rng.integers(0, top, parts[name].shape, np.uint8).view(parts[name].dtype)
    if codec in FP8:
        codes = rng.integers(0, 255, parts["codes"].shape, np.uint8)
        parts["codes"] = np.where(codes == 127, 0, codes).astype(np.uint8).view(parts["codes"].dtype)  # both NaNs aside
    if codec.startswith("int4") and n % 2:
        parts["codes"][..., -1] &= 15
    if "group" in parts:
        parts["group"] = rng.permutation(parts["group"])
    return Encoded(found, (rows, n), parts)


def cases(seed: int = 0):
    for codec in FAST:
        for i, (rows, blocks) in enumerate(SHAPES):
            yield pytest.param(codec, rows, blocks * codecs.get(codec).block_size, seed + i, id=f"{codec}-{rows}x{blocks}")
    for codec, lengths in (INTEGERS | FP8).items():
        for i, n in enumerate(lengths):
            rows = (33, 1, 16, 530 if "block" in codec else 7)[(seed + i) % 4]
            yield pytest.param(codec, rows, n, seed + i, id=f"{codec}-{rows}x{n}")


def in_planes(e: Encoded) -> tuple[str, list[torch.Tensor], torch.Tensor | None]:
    """The kernel's name, what it takes, and the order of its columns."""
    packed = planes.pack(e)
    tensors = list(packed.tensors.values())
    return (packed.kind, tensors[:-1], tensors[-1].long()) if "group" in packed.tensors else (packed.kind, tensors, None)


@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases())
def test_planes_come_back_bit_by_bit(codec, rows, n, seed):
    e = random_matrix(codec, rows, n, seed)
    packed = planes.pack(e)
    back = planes.unpack(packed)
    assert all(np.array_equal(back.parts[k], e.parts[k]) for k in e.parts)
    again = planes.restore(list(packed.tensors.values()), codec, e.shape)
    assert planes.unpack(again).tobytes() == e.tobytes()
    if codec in FAST:
        padded = -(-rows // 16) * 16 * (-(-n // planes.family(codec).chunk) * planes.family(codec).chunk)
        assert packed.nbytes * rows * n == e.nbytes * padded
    elif rows % 16 == 0 and n % 512 == 0 and "tensor" not in codec and codec not in FP8:
        assert packed.nbytes == e.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(4))
def test_dequantize_is_decode(codec, rows, n, seed, dtype):
    e = random_matrix(codec, rows, n, seed)
    kind, tensors, order = in_planes(e)
    guarded = torch.full((rows + 2, n), float("nan"), dtype=dtype)
    out = guarded[1:-1]
    assert cuda_host.call(kind, "dequantize", tensors, out) == native.OK
    w = torch.from_numpy(e.decode()).to(dtype)
    assert torch.equal(out, w if order is None else w[:, order])
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("codec", "rows", "n", "seed"), cases(8))
def test_linear_is_the_product(codec, rows, n, seed, dtype):
    e = random_matrix(codec, rows, n, seed)
    kind, tensors, order = in_planes(e)
    w = torch.from_numpy(e.decode()).double()
    for m in (1, 3, 8, 13):
        x = torch.randn((m, n), generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = torch.full((m, rows), float("nan"))
        given = torch.nn.functional.pad(x if order is None else x[:, order], (0, -n % 8)).contiguous()
        assert cuda_host.call(kind, "linear", [given, *tensors], out) == native.OK
        # what is taken off the raised codes is up to 1000 times as large as they are
        assert ((out - x.double() @ w.T).abs() <= 1e-4 * (x.double().abs() @ w.abs().T)).all()


def test_a_code_that_is_no_number_makes_none():
    """E4M3's NaNs are not 480."""
    codes = np.zeros((16, 128), np.uint8)
    codes[3, 17], codes[5, 100] = 0x7F, 0xFF
    found = codecs.get("fp8-channel")
    e = Encoded(
        found, (16, 128), {"codes": codes.view(found.layout((16, 128))["codes"].dtype), "scale": np.ones((16, 1), np.float32)}
    )
    for dtype in (torch.bfloat16, torch.float16):
        w, y = torch.empty(16, 128), torch.empty(1, 16)
        tensors = list(planes.pack(e).tensors.values())
        assert cuda_host.call("fp8-row", "dequantize", tensors, w) == native.OK
        assert cuda_host.call("fp8-row", "linear", [torch.ones(1, 128, dtype=dtype), *tensors], y) == native.OK
        assert w.isnan().nonzero().tolist() == [[3, 17], [5, 100]]
        assert y.isnan().nonzero().tolist() == [[0, 3], [0, 5]]


def test_two_tiles_a_block():
    """Many rows: the kernel that shares activations between two tiles."""
    for codec in ("Q4_0", "Q4_1"):
        rows, n = 16 * 5, 2 * planes.family(codec).chunk
        e = random_matrix(codec, rows, n, 3)
        x = torch.randn((5, n), generator=torch.Generator().manual_seed(3)).bfloat16()
        out = torch.full((5, rows), float("nan"), dtype=torch.bfloat16)
        packed = planes.pack(e)
        assert cuda_host.call(packed.kind, "linear", [x, *packed.tensors.values()], out) == native.OK
        exact = x.double() @ torch.from_numpy(e.decode()).double().T
        assert (out.double() - exact).norm() <= 2e-3 * exact.norm()


def test_wrong_arguments_are_refused():
    e = random_matrix("Q4_0", 16, 128)
    tensors = list(planes.pack(e).tensors.values())
    out = torch.empty((1, 16))
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 256).bfloat16(), *tensors], out) == native.ESHAPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(17, 128).bfloat16(), *tensors], torch.empty(17, 16)) == native.ESHAPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 128), *tensors], out) == native.EDTYPE
    assert cuda_host.call("q4_0", "linear", [torch.zeros(1, 128).bfloat16(), *tensors[:1]], out) == native.ESHAPE
    assert cuda_host.call("q4_0", "dequantize", tensors, torch.empty((33, 128))) == native.ESHAPE
