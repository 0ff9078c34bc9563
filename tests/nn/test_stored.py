"""Numbers from stored parts by torch, as a GPU computes them where a codec has no planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs
from quantforge.nn import cuda, planes, products, stored
from quantforge.nn.base import tensor

CODECS = [
    *("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"),
    *("fp8-tensor", "fp8-channel-bf16", "fp8-block128"),
    *("int2-g64-sym", "int3-g64-asym", "int4-g64-asym", "int5-channel-asym", "int6-tensor-sym", "int8-g48-asym-bf16"),
    *("int3-g64-asym-act", "int7-g24-sym-act"),
]


@pytest.mark.parametrize("codec", CODECS)
def test_equals_the_codec(codec):
    rng = np.random.default_rng(5)
    shape = (160, 576)
    e = codecs.quantize((rng.standard_normal(shape) * 0.1).astype(np.float32), codec)
    parts = dict(e.parts)
    if "group" in parts:
        parts["group"] = rng.permutation(parts["group"])
        e = codecs.Encoded(e.codec, shape, parts)
    found = stored.decode(codec, [tensor(parts[k]) for k in e.codec.layout(shape)], shape)
    assert found is not None and torch.equal(found, torch.from_numpy(e.decode()))


@pytest.mark.parametrize("codec", [*CODECS, "fp8-block96", "IQ1_S", "TQ2_0"])
def test_slabs_of_stored_parts(codec):
    """Rows become numbers a slab at a time, so that no matrix is on the device as a whole in bf16."""
    shape = (200, 768)
    e = codecs.quantize((np.random.default_rng(5).standard_normal(shape) * 0.1).astype(np.float32), codec)
    if planes.family(codec) is not None:
        pytest.skip("has planes")
    parts = [tensor(e.parts[k]) for k in e.codec.layout(shape)]
    found = list(products.numbers(parts, codec, shape, torch.float32, slab=40 * 768 * 4))
    assert len(found) >= 2 and [rows.start for rows, _ in found[1:]] == [rows.stop for rows, _ in found[:-1]]
    assert torch.equal(torch.cat([w for _, w in found]), torch.from_numpy(e.decode()))


@pytest.mark.parametrize("codec", ["int3-g64-asym-act", "int3-g64-asym", "IQ1_S"])
def test_products_of_stored_parts(codec):
    """As the operator on a GPU computes them: act-order without planes has its columns in the model's order."""
    shape = (40, 256)
    e = codecs.quantize(np.random.default_rng(5).standard_normal(shape).astype(np.float32), codec)
    if "group" in e.parts:
        e = codecs.Encoded(e.codec, shape, dict(e.parts) | {"group": np.random.default_rng(6).permutation(e.parts["group"])})
    x = torch.randn(20, 256)
    y = cuda.linear(x, [tensor(e.parts[k]) for k in e.codec.layout(shape)], codec, *shape)
    assert torch.allclose(y, x @ torch.from_numpy(e.decode()).T, atol=1e-3)
