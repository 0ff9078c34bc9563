"""torchao's tensors as it keeps them in safetensors: X.weight is X._weight_qdata, X._weight_scale and so on, and the header
says of which class it is.

    w = qdata · scale;  (qdata − zero_point) · scale;  Int4Tensor: qdata · scale + zero_point
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import Array, Parts, TensorInfo
from ..codecs.fp8 import fp8_under
from ..codecs.integers import IntegerCodec, pack_bits, unpack_bits
from ..errors import ShapeError, UnsupportedError
from .base import SCALES, Arrays, Found, Gathered, Layout, Load, group_size, unpack_fp8

_PARTS = ("qdata", "scale", "zero_point", "act_pre_scale", "act_quant_scale", "per_tensor_scale", "scale_and_zero")
Info = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class TorchAo(Layout):
    """torchao: Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor and Int4Tensor."""

    name: ClassVar[str] = "torchao"

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        tensors = {}
        stated = config.get("metadata") or {}
        for tensor in [k for k in stated if "." in k and not k.startswith("_")]:
            said = json.loads(stated[tensor])
            if said.get("_type") in (None, "Tensor"):
                continue
            stem, _, leaf = tensor.rpartition(".")
            names = {k: n for k in _PARTS if (n := f"{stem}._{leaf}_{k}") in arrays}
            read = _KINDS.get(said["_type"])
            if read is None or "act_pre_scale" in names:
                what = "an act_pre_scale" if read else said["_type"]
                raise UnsupportedError(
                    f"{tensor}: torchao's tensors with {what} are not read, {', '.join(_KINDS)} are; give the model unquantized"
                )
            if missing := {"qdata", "scale"} - names.keys():
                raise ShapeError(f"{tensor}: {stem}._{leaf}_{min(missing)} is missing")
            tensors[tensor] = read(tensor, names, {k: arrays[v] for k, v in names.items()}, said.get("_data") or {}, load)
        used = {n for g in tensors.values() for n in g.arrays.values()}
        if left := next((a for a in arrays if a not in used and a.endswith("_qdata")), None):
            raise UnsupportedError(f"{left}: the safetensors header does not say what it is: save the model again with torchao")
        return Found(tensors, frozenset(a for a in arrays if a.endswith("_act_quant_scale")))


def _float8(tensor: str, names: Mapping[str, str], info: Info, said: Mapping[str, Any], load: Load) -> Gathered:
    codec, shape = fp8_under(info["scale"], info["qdata"], tensor), info["qdata"].shape
    places = {"weight": names["qdata"], "scale": names["scale"]}
    return Gathered(codec, shape, places, partial(unpack_fp8, codec, shape))


def _integers(tensor: str, names: Mapping[str, str], info: Info, said: Mapping[str, Any], load: Load) -> Gathered:
    """Signed integers, one in each byte; target_dtype says of how many bits they are."""
    shape, scale = info["qdata"].shape, info["scale"]
    bits = int(str((said.get("target_dtype") or {}).get("_data", "int8")).removeprefix("int"))
    kind = SCALES.get(scale.dtype)
    zeros = load(names["zero_point"]) if "zero_point" in names else np.zeros(1, np.int8)
    if len(shape) != 2 or info["qdata"].dtype != np.int8 or kind is None or not 2 <= bits <= 8 or zeros.dtype.kind != "i":
        raise ShapeError(f"{tensor}: qdata {info['qdata'].dtype}{list(shape)} and scale {scale.dtype} are no integers of torchao")
    if scale.shape in ((shape[0], 1), (shape[0],)):
        per = "channel"
    elif scale.shape in ((), (1,), (1, 1)):
        per = "tensor"
    elif len(scale.shape) == 2 and scale.shape[0] == shape[0]:
        per = f"g{group_size(tensor, shape[1], scale.shape[1], [(said.get('block_size') or [None])[-1]])}"
    else:
        raise ShapeError(f"{tensor}: a scale of {list(scale.shape)} does not fit weights {list(shape)}")
    codec = codecs.get(f"int{bits}-{per}-{'asym' if zeros.any() else 'sym'}-{kind}")
    assert isinstance(codec, IntegerCodec)
    return Gathered(codec, shape, names, partial(_unpack_integers, codec, shape))


def _unpack_integers(codec: IntegerCodec, shape: tuple[int, ...], arrays: Parts) -> Parts:
    def unsigned(a: Array) -> Array:
        return (a.astype(np.int16) + codec.middle).astype(np.uint8)

    layout = codec.layout(shape)
    parts = {"codes": pack_bits(unsigned(arrays["qdata"]), codec.bits), "scale": arrays["scale"].reshape(layout["scale"].shape)}
    return parts if codec.symmetric else parts | {"zero": unsigned(arrays["zero_point"]).reshape(layout["zero"].shape)}


def _int4(tensor: str, names: Mapping[str, str], info: Info, said: Mapping[str, Any], load: Load) -> Gathered:
    """Two signed integers a byte, the even one low; scale and zero_point, a number to add, are [in / group, out]."""
    packed, scale = info["qdata"].shape, info["scale"]
    groups = scale.shape[0] if len(scale.shape) == 2 else 0
    shape = (packed[0], packed[-1] * 2)
    fits = len(packed) == 2 and groups and not shape[1] % groups and scale.shape[1] == shape[0] and scale.dtype in SCALES
    if not fits or info.get("zero_point") != scale or info["qdata"].dtype.itemsize != 1:
        raise ShapeError(f"{tensor}: qdata {list(packed)}, scale {list(scale.shape)} and zero_point are no Int4Tensor of torchao")
    return Gathered(codecs.get(f"int4-g{shape[1] // groups}-min-f32"), shape, names, partial(_unpack_int4, shape[1]))


def _unpack_int4(columns: int, arrays: Parts) -> Parts:
    signed = unpack_bits(np.ascontiguousarray(arrays["qdata"]).view(np.uint8), 4, columns)
    scale, zero = (np.ascontiguousarray(arrays[k].T).astype(np.float32) for k in ("scale", "zero_point"))
    return {"codes": pack_bits(signed ^ np.uint8(8), 4), "scale": scale, "min": zero - 8 * scale}


_KINDS: dict[str, Callable[[str, Mapping[str, str], Info, Mapping[str, Any], Load], Gathered]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
    "Int4Tensor": _int4,
}

LAYOUT = TorchAo
