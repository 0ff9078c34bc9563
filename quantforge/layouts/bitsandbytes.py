"""bitsandbytes: NF4 and FP4 with or without double quantization, LLM.int8().

4 bits: w = quant_map[code] · absmax of 64 neighbours;  int8: w = weight · SCB / 127
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import Array, Parts, TensorInfo
from ..codecs import Codec
from ..codecs.lookup import DYNAMIC, NESTED_BLOCK, LookupCodec
from ..errors import ShapeError, UnsupportedError
from .base import Arrays, Found, Gathered, Layout, Load, experts, in_blocks, one_type, stems

_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_U8, _F32 = np.dtype(np.uint8), np.dtype(np.float32)


def _unpack(codec: LookupCodec, shape: tuple[int, ...], offset: float, arrays: Parts) -> Parts:
    layout = codec.layout(shape)
    weight = np.ascontiguousarray(arrays["weight"]).reshape(-1).view(np.uint8)
    parts = {"codes": weight.reshape(layout["codes"].shape), "absmax": arrays["absmax"].reshape(layout["absmax"].shape)}
    if codec.double:
        parts |= {"nested_absmax": arrays["nested_absmax"], "nested_offset": np.array([offset], np.float32)}
    return parts


def _unpack_int8(arrays: Parts) -> Parts:
    return {"codes": arrays["weight"], "absmax": arrays["SCB"].reshape(-1, 1)}


@dataclass(frozen=True, slots=True)
class BitsAndBytes(Layout):
    """bitsandbytes; dtype: torch's name of the type that weights had, and are computed in; threshold: magnitude of
    activations from which on LLM.int8() computes their columns in floats (0: never)."""

    name: ClassVar[str] = "bitsandbytes"
    dtype: str = "bfloat16"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise UnsupportedError(f"LLM.int8() threshold {self.threshold:g}: a magnitude is needed, usual is 6; 0 for none")

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        tensors = {f"{stem}.weight": _four_bits(stem, arrays, load) for stem in stems(arrays, "weight.absmax")}
        for stem in stems(arrays, "SCB"):
            names = {k: f"{stem}.{k}" for k in ("weight", "SCB", "weight_format") if f"{stem}.{k}" in arrays}
            weight = arrays.get(f"{stem}.weight")
            if weight is None or weight.dtype != np.int8 or arrays[names["SCB"]].shape[:1] != weight.shape[:1]:
                raise ShapeError(f"{stem}: SCB has no matrix of int8 beside it")
            if "weight_format" in names and load(names["weight_format"]).any():
                raise UnsupportedError(f"{stem}: weight_format {int(load(names['weight_format']).max())}; 0 (row major) is read")
            tensors[f"{stem}.weight"] = Gathered(codecs.get("int8-row"), weight.shape, names, _unpack_int8)
        return Found(tensors)

    def choose(
        self, kind: str | None, bits: int | None, group_size: int | None, symmetric: bool | None, scale: str
    ) -> tuple[Layout, Codec]:
        """nf4, nf4-dq, fp4, fp4-dq or int8 as --type; or 4 bits, which is nf4, or 8."""
        if kind is None:
            if bits not in (None, 4, 8) or symmetric is False or group_size not in (None, -1 if bits == 8 else 64):
                raise UnsupportedError(
                    "bitsandbytes checkpoints have 4 bits (nf4, fp4; blocks of 64) or 8 bits (per row); choose by --type "
                    "nf4, nf4-dq, fp4, fp4-dq or int8"
                )
            kind = "int8" if bits == 8 else "nf4"
        if self.threshold is not None and kind.lower() not in ("int8", "int8-row"):
            raise UnsupportedError(f"{kind} has no LLM.int8() threshold; it goes with --bits 8 or --type int8")
        codec = codecs.get("int8-row" if kind.lower() == "int8" else kind)
        return replace(self, dtype=_DTYPES.get(scale, "bfloat16")), codec

    def arrays(self, codec: Codec, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """weight and what stands beside it."""
        if len(shape) != 2:
            raise ShapeError(f"bitsandbytes checkpoints hold matrices, not {list(shape)}")
        layout = codec.layout(shape)
        if codec.name == "int8-row":
            return {
                "weight": layout["codes"],
                "SCB": TensorInfo(_F32, shape[:1]),
                "weight_format": TensorInfo(_U8, ()),
            }
        if not isinstance(codec, LookupCodec):
            raise UnsupportedError(f"bitsandbytes checkpoints hold nf4, nf4-dq, fp4, fp4-dq and int8-row, not {codec.name}")
        absmax = layout["absmax"]
        blocks = absmax.shape[0] * absmax.shape[1]
        arrays = {
            "weight": TensorInfo(_U8, (blocks * codec.block_size // 2, 1)),
            "weight.absmax": TensorInfo(absmax.dtype, (blocks,)),
            "weight.quant_map": TensorInfo(_F32, (16,)),
            _STATE + codec.name[:3]: TensorInfo(_U8, (len(self._state(codec, shape, 0.0)),)),
        }
        if codec.double:
            arrays["weight.nested_absmax"] = layout["nested_absmax"]
            arrays["weight.nested_quant_map"] = TensorInfo(_F32, (256,))
        return arrays

    def _state(self, codec: LookupCodec, shape: tuple[int, ...], offset: float) -> bytes:
        """The JSON beside a weight; its length does not depend on the offset."""
        state = {"quant_type": codec.name[:3], "blocksize": codec.block_size, "dtype": self.dtype, "shape": list(shape)}
        text = json.dumps(state)
        if codec.double:
            nested = json.dumps({"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"})
            text = f'{text[:-1]}, {nested[1:-1]}, "nested_offset": {offset:.17e}}}'
        return text.encode()

    def pack(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """See `Layout.pack`."""
        if not isinstance(codec, LookupCodec):
            return {"weight": parts["codes"], "SCB": parts["absmax"].reshape(-1), "weight_format": np.zeros((), np.uint8)}
        offset = float(parts["nested_offset"][0]) if codec.double else 0.0
        made: dict[str, Array] = {
            "weight": parts["codes"].reshape(-1, 1),
            "weight.absmax": parts["absmax"].reshape(-1),
            "weight.quant_map": codec.table,
            _STATE + codec.name[:3]: np.frombuffer(self._state(codec, shape, offset), np.uint8),
        }
        if codec.double:
            made |= {"weight.nested_absmax": parts["nested_absmax"], "weight.nested_quant_map": DYNAMIC}
        return made

    def config(self, modules: Mapping[str, Codec], kept: Iterable[str]) -> dict[str, Any]:
        """See `Layout.config`."""
        codec = one_type(modules, "a bitsandbytes checkpoint")
        if experts(modules):
            raise UnsupportedError(
                "transformers keeps experts in floats under bitsandbytes and does not load quantized ones: add "
                "--tensor-type experts=BF16"
            )
        four = isinstance(codec, LookupCodec)
        inside = in_blocks(kept)
        settings: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
        settings["llm_int8_skip_modules"] = ["lm_head", *inside] if inside else None
        if not isinstance(codec, LookupCodec):
            return settings | {
                "llm_int8_threshold": 6.0 if self.threshold is None else self.threshold,
                "llm_int8_has_fp16_weight": False,
            }
        return settings | {
            "bnb_4bit_quant_type": codec.name[:3],
            "bnb_4bit_use_double_quant": codec.double,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
        }


def _four_bits(stem: str, arrays: Arrays, load: Load) -> Gathered:
    kinds = [k for k in ("nf4", "fp4") if f"{stem}.{_STATE}{k}" in arrays]
    if not kinds or f"{stem}.weight" not in arrays:
        raise ShapeError(f"{stem}: weight or its quant_state is missing beside absmax")
    absmax = arrays[f"{stem}.weight.absmax"]
    if absmax.dtype not in (_F32, _U8) or len(absmax.shape) != 1:
        raise UnsupportedError(
            f"{stem}: absmax is {absmax.dtype}{list(absmax.shape)}: bitsandbytes 0.50 saved this after a forward pass on a CPU, "
            "which spoils the file; save the model again before any forward pass"
        )
    state_name = f"{stem}.{_STATE}{kinds[0]}"
    try:
        state = json.loads(load(state_name).tobytes())
        shape = tuple(int(n) for n in state["shape"])
        block, nested, offset = state["blocksize"], state.get("nested_blocksize"), float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError):
        raise ShapeError(f"{stem}: its quant_state is not the JSON that bitsandbytes writes") from None
    codec = codecs.get(kinds[0] + ("-dq" if absmax.dtype == _U8 else ""))
    assert isinstance(codec, LookupCodec)
    if block != codec.block_size or (codec.double and nested != NESTED_BLOCK):
        raise UnsupportedError(f"{stem}: blocks of {block} and {nested}; {codec.block_size} and {NESTED_BLOCK} are read")
    keys = ["weight", "weight.absmax", "weight.quant_map"]
    tables = {"weight.quant_map": codec.table}
    if codec.double:
        keys += ["weight.nested_absmax", "weight.nested_quant_map"]
        tables["weight.nested_quant_map"] = DYNAMIC
    if missing := [k for k in keys if f"{stem}.{k}" not in arrays]:
        raise ShapeError(f"{stem}.{missing[0]} is missing")
    for key, table in tables.items():
        if not np.allclose(load(f"{stem}.{key}"), table, rtol=0, atol=1e-6):
            raise UnsupportedError(f"{stem}: {key} is not {codec.name}'s")
    layout = codec.layout(shape)
    sizes = {"weight": layout["codes"].nbytes, "weight.absmax": layout["absmax"].nbytes}
    if any(arrays[f"{stem}.{k}"].nbytes != n for k, n in sizes.items()):
        raise ShapeError(f"{stem}: weight or absmax is not of the size of {list(shape)}")
    names = {k.removeprefix("weight."): f"{stem}.{k}" for k in keys} | {"state": state_name}
    return Gathered(codec, shape, names, partial(_unpack, codec, shape, offset))


LAYOUT = BitsAndBytes
