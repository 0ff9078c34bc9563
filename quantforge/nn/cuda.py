"""The operators on a GPU: which kernel takes how many activations. Everything runs on the caller's stream."""

from __future__ import annotations

import logging
from functools import cache

import torch

from .. import codecs, native
from ..codecs.integers import ActOrderCodec
from ..errors import UnsupportedError
from . import ops, products, stored
from .planes import family, restore, unpack
from .planes import kind as kind_of

_log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

COLUMNS = 16
"""Activations that the matrix-vector kernels take at once."""


@cache
def _warn_once(reason: str, instead: str) -> None:
    _log.warning("%s: quantized weights on the GPU %s", reason, instead)


def _run(kind: str, op: str, inputs: list[torch.Tensor], out: torch.Tensor) -> None:
    with torch.cuda.device(out.device):
        native.cuda_call(kind, op, inputs, [out], torch.cuda.current_stream().cuda_stream)


def _together(first: torch.Tensor, others: list[torch.Tensor]) -> None:
    """An address that a kernel cannot read would end the process' use of the GPU."""
    for t in others:
        if t.device != first.device:
            raise UnsupportedError(f"weights and activations are on {t.device} and {first.device}; move them to one device")


@cache
def _plain(codec: str) -> str:
    """Of a codec whose last plane says in which order columns are stored (act-order), the one without; else empty."""
    known = codecs.get(codec)
    return known.plain.name if isinstance(known, ActOrderCodec) and family(codec) else ""


@ops.dequantize.register_kernel("cuda")
def dequantize(planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a matrix in planes: [out_features, in_features] of `dtype`."""
    _together(planes[0], planes)
    kind, device, shape = kind_of(codec), planes[0].device, (out_features, in_features)
    if not native.cuda_has(kind, "dequantize"):
        w = stored.decode(codec, planes, shape) if family(codec) is None else None
        if w is not None:
            return w.to(dtype)
        _warn_once(native.cuda_missing() or f"no kernel for {codec}", "are decoded by the CPU")
        weights = unpack(restore(planes, codec, shape).to("cpu"))
        return torch.from_numpy(weights.decode(threads=torch.get_num_threads())).to(device, dtype)
    out = torch.empty(shape, dtype=dtype if dtype in _FLOATS else torch.float32, device=device)
    ordered = bool(_plain(codec))
    _run(kind, "dequantize", planes[:-1] if ordered else planes, out)
    if ordered:
        out = torch.empty_like(out).index_copy_(1, planes[-1].long(), out)
    return out.to(dtype)


@ops.linear.register_kernel("cuda")
def linear(
    x: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, *, activations: str = "float"
) -> torch.Tensor:
    """x wᵀ for a matrix in planes. `activations` changes nothing here: 8-bit ones would not be faster."""
    ops.check(x, out_features, in_features)
    _together(x, planes)
    kind = kind_of(codec)
    rows = x.reshape(-1, in_features)
    if plain := _plain(codec):
        rows, planes, codec = rows.index_select(1, planes[-1]), planes[:-1], plain
    if native.cuda_has(kind, "linear"):
        way = products.choose(kind, rows.shape[0], in_features, x.dtype)
    elif products.fusible(kind, in_features, x.dtype):
        _warn_once(native.cuda_missing(), "are multiplied by Triton's kernels alone")
        way = "fused"
    else:
        way = "slabs"
    if not rows.shape[0]:
        y = x.new_empty((0, out_features))
    elif way == "matvec":
        y = _joined([_few(part, planes, kind, out_features) for part in torch.split(rows, COLUMNS)])
    elif way == "fused":
        y = products.fused(rows, planes, kind, out_features)
    else:
        y = products.slabs(rows, planes, codec, out_features)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


@ops.linear_backward.register_kernel("cuda")
def linear_backward(
    grad: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int
) -> torch.Tensor:
    """grad w for a matrix in planes."""
    _together(grad, planes)
    result = products.backward(grad.reshape(-1, out_features), planes, codec, in_features)
    return result.reshape(*grad.shape[:-1], in_features)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)  # of one it would be a copy: a kernel more


def _few(x: torch.Tensor, planes: list[torch.Tensor], kind: str, out_features: int) -> torch.Tensor:
    """The matrix-vector kernel on x: [m, in], m <= 16."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return _launch(x, planes, kind, out_features, x.dtype)
    # 16 of a float's 24 bits, as two rows of bf16: the kernel's columns are there anyway
    sums = []
    for part in torch.split(x.float(), COLUMNS // 2):
        high = part.bfloat16()
        both = _launch(torch.cat([high, (part - high.float()).bfloat16()]), planes, kind, out_features, torch.float32)
        sums.append(both[: len(part)] + both[len(part) :])
    return _joined(sums)


def _launch(x: torch.Tensor, planes: list[torch.Tensor], kind: str, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    if not x.shape[1]:
        return torch.zeros((x.shape[0], out_features), dtype=dtype, device=x.device)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x.contiguous()
    if x.data_ptr() % 16:  # kernels load vectors
        x = x.clone()
    out = torch.empty((x.shape[0], out_features), dtype=dtype, device=x.device)
    _run(kind, "linear", [x, *planes], out)
    return out
