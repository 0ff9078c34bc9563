"""Numbers of codecs without planes, on a GPU: from the stored parts, without a copy to the CPU.

ggml types by the decode kernels of kernels/cuda, the rest by torch's own: fp8, integers of any width, plain numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from .. import codecs, native
from ..codecs.base import Codec, GgmlCodec
from ..codecs.fp8 import Fp8Codec
from ..codecs.integers import ActOrderCodec, IntegerCodec
from ..codecs.iquants import KSIGNS, IQCodec
from ..codecs.plain import PlainCodec

_TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


@cache
def _tables(codec: IQCodec) -> list[torch.Tensor]:
    """The codebook and the signs, on the CPU: they travel with the launch."""
    return [torch.from_numpy(codec.entries.copy()), torch.from_numpy(KSIGNS.copy())]


def _ggml(codec: Codec, parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
    if not parts[0].is_cuda or not native.cuda_has(codec.name, "decode"):
        return None
    out = torch.empty(shape, dtype=torch.float32, device=parts[0].device)
    data = _bytes(parts[0]).reshape(shape[0], -1)
    tables = _tables(codec) if isinstance(codec, IQCodec) else []
    with torch.cuda.device(out.device):
        native.cuda_call(codec.name, "decode", [data, *tables], [out], torch.cuda.current_stream().cuda_stream)
    return out


def _fp8(codec: Codec, parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
    assert isinstance(codec, Fp8Codec)
    codes = _bytes(parts[0]).view(torch.float8_e4m3fn).float().reshape(shape)
    scale = parts[1].float()
    if codec.group:
        scale = scale.reshape(shape[0], -1).repeat_interleave(codec.group, 1)[:, : shape[1]]
    if codec.side:
        scale = scale.repeat_interleave(codec.side, 0).repeat_interleave(codec.side, 1)[: shape[0], : shape[1]]
    return codes * scale


def _plain(codec: Codec, parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
    dtype = _TORCH.get(codec.name)
    return None if dtype is None else _bytes(parts[0]).view(dtype).float().reshape(shape)


def _integers(codec: Codec, parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
    plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
    assert isinstance(plain, IntegerCodec)
    (out, n), bits = shape, plain.bits
    packed = _bytes(parts[0]).reshape(out, -1)
    if bits != 8:
        # a code lies in one byte or in two neighbours
        at = torch.arange(n, device=packed.device) * bits
        wide = torch.nn.functional.pad(packed, (0, 1)).int()
        packed = ((wide[:, at // 8] | wide[:, at // 8 + 1] << 8) >> (at % 8).int()) & ((1 << bits) - 1)
    scale, *zero = [p.reshape(-1, p.shape[-1]).float() for p in parts[1 : 2 + (not plain.symmetric)]]
    if isinstance(codec, ActOrderCodec):
        group = parts[-1].long()
    else:
        group = torch.arange(n, device=packed.device) // (plain.group or max(1, n))
    offset = zero[0][:, group] if zero else float(plain.middle)
    return (packed.float() - offset) * scale[:, group]


_WAYS: dict[type[Codec], Callable[[Codec, list[torch.Tensor], tuple[int, int]], torch.Tensor | None]] = {
    Fp8Codec: _fp8,
    PlainCodec: _plain,
    IntegerCodec: _integers,
    ActOrderCodec: _integers,
    GgmlCodec: _ggml,
}


def decode(codec: str, parts: list[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor | None:
    """f32[shape] on the parts' device, bit-equal to the codec's decode; None where only the codec itself can do it."""
    known = codecs.get(codec)
    way = next((way for kind, way in _WAYS.items() if isinstance(known, kind)), None)
    return way(known, parts, shape) if way else None
