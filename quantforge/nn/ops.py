"""torch operators over stored tensors: they work under torch.compile, their kernels know NumPy or CUDA.

    quantforge::linear(x, planes, codec, out_features, in_features, *, activations) -> x wᵀ
    quantforge::linear_backward(grad, planes, codec, out_features, in_features) -> grad w
    quantforge::dequantize(planes, codec, out_features, in_features, dtype) -> w

planes: on the CPU a tensor's parts in its codec's order, as they are stored; on CUDA what
`planes.pack` makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .. import codecs
from ..arrays import F32, Parts
from ..codecs.base import DECODED_AT_ONCE
from ..errors import ShapeError, UnsupportedError


def parts_of(planes: list[torch.Tensor], codec: codecs.Codec, shape: tuple[int, ...]) -> Parts:
    """The parts as NumPy arrays, which share the tensors' memory."""
    arrays: Parts = {}
    for (k, info), p in zip(codec.layout(shape).items(), planes, strict=True):
        if not p.is_cpu:
            raise UnsupportedError(f"{codec.name}: weights are on {p.device}, activations on the CPU; move them to one device")
        if p.nbytes != info.nbytes:
            raise ShapeError(f"{codec.name}: part {k} of weights {list(shape)} has {p.nbytes} bytes, needs {info.nbytes}")
        arrays[k] = p.reshape(-1).view(torch.uint8).numpy().view(info.dtype).reshape(info.shape)
    return arrays


def check(x: torch.Tensor, out_features: int, in_features: int) -> None:
    """Raises ShapeError or UnsupportedError for activations that have no product with weights [out, in]."""
    if x.shape[-1:] != (in_features,):
        raise ShapeError(f"activations of {list(x.shape)} do not fit weights {[out_features, in_features]}")
    if not x.is_floating_point():
        raise UnsupportedError(f"activations of {x.dtype} times quantized weights: give them as floats (x.float())")


@torch.library.custom_op("quantforge::linear", mutates_args=(), device_types="cpu")
def linear(
    x: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, *, activations: str = "float"
) -> torch.Tensor:
    """x wᵀ for a matrix w as it is stored: x: [..., in_features] of any float dtype -> [..., out_features], of x's dtype.

    activations: "float": x enters with its own precision; "int8": rounded to 8 bits first, where the codec has a
    kernel for that. See `Codec.matmul`.
    """
    return product(x, planes, codec, out_features, in_features, activations)


def product(
    x: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, activations: str
) -> torch.Tensor:
    """`linear` on the CPU, without the dispatcher."""
    kind, shape = codecs.get(codec), (out_features, in_features)
    check(x, *shape)
    rows: F32 = x.detach().reshape(-1, in_features).float().contiguous().numpy()
    y = kind.matmul(rows, parts_of(planes, kind, shape), shape, threads=torch.get_num_threads(), activations=activations)
    return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], out_features)


def undispatched(x: torch.Tensor) -> bool:
    """True where `product` may stand for `linear`: nobody traces, transforms or differentiates. The dispatcher and the
    operator's Python layers take as long as a product of some hundred rows with one activation."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._C._len_torch_dispatch_stack()
    )


@linear.register_fake
def _(
    x: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, *, activations: str = "float"
) -> torch.Tensor:
    check(x, out_features, in_features)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("quantforge::linear_backward", mutates_args=(), device_types="cpu")
def linear_backward(
    grad: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int
) -> torch.Tensor:
    """What `linear`'s activations get of a gradient [..., out_features]: grad w: [..., in_features], of grad's dtype."""
    kind, shape = codecs.get(codec), (out_features, in_features)
    whole = codecs.Encoded(kind, shape, parts_of(planes, kind, shape))
    rows = grad.detach().reshape(-1, out_features).float()
    result = torch.zeros(rows.shape[0], in_features)
    step = max(1, DECODED_AT_ONCE // max(1, in_features)) if kind.sliceable else max(1, out_features)
    for at in range(0, out_features, step):
        part = whole.rows(slice(at, at + step)) if step < out_features else whole
        w = np.require(part.decode(threads=torch.get_num_threads()), requirements=["C", "W"])
        result.addmm_(rows[:, at : at + step], torch.from_numpy(w))
    return result.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


@linear_backward.register_fake
def _(grad: torch.Tensor, planes: list[torch.Tensor], codec: str, out_features: int, in_features: int) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Mapping[str, Any], output: torch.Tensor) -> None:
    _, planes, *ctx.matrix = inputs
    ctx.save_for_backward(*planes)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    planes = list(ctx.saved_tensors)
    return linear_backward(grad, planes, *ctx.matrix), [None] * len(planes), None, None, None


# activations get gradients, whatever was rounded on the way; stored weights have none
linear.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("quantforge::dequantize", mutates_args=(), device_types="cpu")
def dequantize(planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a stored matrix: [out_features, in_features] of `dtype`."""
    kind, shape = codecs.get(codec), (out_features, in_features)
    w = kind.decode(parts_of(planes, kind, shape), shape, threads=torch.get_num_threads())
    return torch.from_numpy(np.require(w, requirements=["C", "W", "O"])).to(dtype)


@dequantize.register_fake
def _(planes: list[torch.Tensor], codec: str, out_features: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    return planes[0].new_empty(out_features, in_features, dtype=dtype)
