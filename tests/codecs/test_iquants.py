"""The IQ types against ggml (through xllamacpp) and gguf-py: decode bit for bit, error never above ggml's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from quantforge import codecs, native

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")


@pytest.fixture(params=native.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_ISA", request.param)
    return request.param


@pytest.mark.parametrize("name", TYPES)
def test_decode_of_any_bytes_equals_gguf_py(name, isa):
    codec = codecs.get(name)
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, codec.layout((24, 1024))["data"].shape, np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(data, gguf.GGMLQuantizationType[name])
    got = codec.decode({"data": data}, (24, 1024))
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
