"""Numbers from stored parts by torch, as a GPU computes them where a codec has no planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs
from quantforge.nn import stored
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
