"""compressed-tensors, as llm-compressor writes it: pack-quantized, int-quantized, float-quantized and the FP4 formats.

    w = (q − z) · weight_scale;  FP4: w = level · weight_scale [/ weight_global_scale]

Packed integers are stored with 2**(bits − 1) added, along the input dimension; packed zeros along the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import F8_E4M3, Array, Parts, TensorInfo
from ..codecs import Codec
from ..codecs.fp4 import mxfp4_data, nvfp4_data
from ..codecs.fp8 import Fp8Codec, fp8_under
from ..codecs.integers import ActOrderCodec, IntegerCodec, pack_bits, unpack_bits
from ..errors import ShapeError, UnsupportedError, nearest
from .base import (
    SCALES,
    Arrays,
    Found,
    Gathered,
    Layout,
    Load,
    experts,
    group_size,
    octets,
    stems,
    unpack_fp8,
    whole_groups,
    words,
)

SCHEMES = {
    "W4A16": ("int4-g128-sym", False),
    "W4A16_ASYM": ("int4-g128-asym", False),
    "W8A16": ("int8-channel-sym", False),
    "W8A8": ("int8-channel-sym", True),
    "FP8A16": ("fp8-channel", False),
    "FP8_DYNAMIC": ("fp8-channel", True),
    "FP8_BLOCK": ("fp8-block128", True),
    "NVFP4A16": ("NVFP4", False),
    "MXFP4A16": ("MXFP4", False),
}
"""llm-compressor's names of schemes: the codec, and whether activations are quantized too, as they come."""

EXPERTS = r"re:.*\.experts\..*"
"""The target by which transformers knows the type of experts, which it keeps stacked."""
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_I32, _U8, _F32 = np.dtype(np.int32), np.dtype(np.uint8), np.dtype(np.float32)


# ---- FP4: ggml's blocks keep scales beside codes and pair weights half a block apart


def _fp4_codes(pairs: Array, half: int) -> Array:
    """ggml's pairs u8[..., half]: codes u8[..., 2·half] in order."""
    return np.concatenate([pairs & 15, pairs >> 4], -1)


def _from_mxfp4(data: Array) -> Parts:
    blocks = data.reshape(len(data), -1, 17)
    codes = _fp4_codes(blocks[..., 1:], 16).reshape(len(data), -1)
    return {"weight_packed": pack_bits(codes, 4), "weight_scale": np.ascontiguousarray(blocks[..., 0])}


def _to_mxfp4(arrays: Parts) -> Parts:
    return {"data": mxfp4_data(arrays["weight_packed"], arrays["weight_scale"])}


def _from_nvfp4(data: Array, scale: Array) -> Parts:
    blocks = data.reshape(len(data), -1, 36)
    codes = _fp4_codes(blocks[..., 4:].reshape(len(data), -1, 8), 8).reshape(len(data), -1)
    return {
        "weight_packed": pack_bits(codes, 4),
        "weight_scale": blocks[..., :4].reshape(len(data), -1).view(F8_E4M3),
        "weight_global_scale": np.float32(1) / scale,
    }


def _to_nvfp4(arrays: Parts) -> Parts:
    data = nvfp4_data(arrays["weight_packed"], arrays["weight_scale"])
    return {"data": data, "scale": np.float32(1) / arrays["weight_global_scale"].reshape(1).astype(np.float32)}


# ---- reading


def _to_packed(codec: IntegerCodec | ActOrderCodec, shape: tuple[int, int], arrays: Parts) -> Parts:
    plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
    octet_count = plain.layout(shape)["codes"].shape[1]
    info = plain.layout(shape)["scale"]
    parts = {"codes": octets(arrays["weight_packed"])[:, :octet_count], "scale": arrays["weight_scale"].reshape(info.shape)}
    if not plain.symmetric:
        zeros = unpack_bits(octets(arrays["weight_zero_point"].T), plain.bits, shape[0])
        parts["zero"] = np.ascontiguousarray(zeros.T).reshape(info.shape)
    if codec is not plain:
        parts["group"] = arrays["weight_g_idx"].astype(np.int32)
    return {k: np.ascontiguousarray(v) for k, v in parts.items()}


def _to_int8(codec: IntegerCodec, shape: tuple[int, int], arrays: Parts) -> Parts:
    info = codec.layout(shape)["scale"]
    parts = {"codes": arrays["weight"].view(np.uint8) ^ np.uint8(128), "scale": arrays["weight_scale"].reshape(info.shape)}
    if not codec.symmetric:
        parts["zero"] = (arrays["weight_zero_point"].astype(np.int16) + 128).astype(np.uint8).reshape(info.shape)
    return parts


def _per(scale: tuple[int, ...], n: int, k: int, stem: str, sizes: Iterable[int | None] = ()) -> str:
    """What a weight_scale of this shape belongs to: "tensor", "channel", "g128"."""
    if int(np.prod(scale)) == 1 and (len(scale) < 2 or n > 1):
        return "tensor"
    if len(scale) == 2 and scale[0] == n and scale[1]:
        return "channel" if scale[1] == 1 else f"g{group_size(stem, k, scale[1], sizes)}"
    if scale == (n,):
        return "channel"
    raise ShapeError(f"{stem}: a weight_scale of {list(scale)} does not fit weights {[n, k]}")


@dataclass(frozen=True, slots=True)
class CompressedTensors(Layout):
    """compressed-tensors; activations are quantized as they come, to the weights' type."""

    name: ClassVar[str] = "compressed-tensors"
    activations: Mapping[str, bool] = field(default_factory=dict)
    """Name of a codec that was chosen -> are activations quantized too."""

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        groups = (config.get("config_groups") or {}).values()
        schemes = [w for g in groups if isinstance(g, Mapping) and isinstance(w := g.get("weights"), Mapping)]
        bits, sizes = {w["num_bits"] for w in schemes}, {w.get("group_size") for w in schemes if w.get("strategy") == "group"}
        tensors = {}
        for stem in stems(arrays, "weight_scale"):
            names = {k: f"{stem}.{k}" for k in _WEIGHT if f"{stem}.{k}" in arrays}
            codec, shape, unpack = _one(stem, names, arrays, load, bits, sizes)
            tensors[f"{stem}.weight"] = Gathered(codec, shape, names, unpack)
        known = {f"{t.removesuffix('weight')}{a}" for t in tensors for a in _ACTIVATIONS}
        caches = {a for a in arrays if a.endswith((".q_scale", ".k_scale", ".v_scale"))}
        return Found(tensors, frozenset((known & arrays.keys()) | caches))

    def choose(
        self, kind: str | None, bits: int | None, group_size: int | None, symmetric: bool | None, scale: str
    ) -> tuple[Layout, Codec]:
        """A scheme ("W4A16") or type, or symmetric 4 bits in groups of 128, 8 bits in rows; scales are the model's dtype."""
        activations = False
        if kind is not None and kind.upper() in SCHEMES:
            kind, activations = SCHEMES[kind.upper()]
        elif kind is None:
            bits = 4 if bits is None else bits
            group_size = group_size if group_size is not None else 128 if bits == 4 else -1
            per = "channel" if group_size == -1 else f"g{group_size}"
            kind = f"int{bits}-{per}-{'asym' if symmetric is False else 'sym'}"
        try:
            codec = codecs.get(kind)
        except UnsupportedError as e:
            raise UnsupportedError(f"{e}; schemes: {', '.join(SCHEMES)}{nearest(kind, SCHEMES)}") from None
        if isinstance(codec, IntegerCodec) and codec.name == kind and scale != "f16":
            codec = codecs.get(f"{kind}-{scale}")
        if self.activations.get(codec.name, activations) != activations:
            raise UnsupportedError(f"{codec.name} with and without quantized activations in one checkpoint: choose one of them")
        return replace(self, activations={**self.activations, codec.name: activations}), codec

    def sides(self, codec: Codec) -> tuple[int, int]:
        """Packed integers, and zeros along the rows, fill words of 32 bits."""
        if not isinstance(codec, IntegerCodec) or _format(codec) == "int-quantized":
            return 1, 1
        word = 32 // gcd(32, codec.bits)
        return 1 if codec.symmetric else word, word

    def arrays(self, codec: Codec, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """weight or weight_packed, weight_scale and what else the format has."""
        if len(shape) != 2:
            raise ShapeError(f"compressed-tensors checkpoints hold matrices, not {list(shape)}")
        n, k = shape
        layout = codec.layout(shape)
        if codec.name == "NVFP4":
            scales = TensorInfo(F8_E4M3, (n, k // 16))
            return {
                "weight_packed": TensorInfo(_U8, (n, k // 2)),
                "weight_scale": scales,
                "weight_global_scale": TensorInfo(_F32, (1,)),
            }
        if codec.name == "MXFP4":
            return {"weight_packed": TensorInfo(_U8, (n, k // 2)), "weight_scale": TensorInfo(_U8, (n, k // 32))}
        if isinstance(codec, Fp8Codec):
            return {"weight": layout["codes"], "weight_scale": layout["scale"]}
        if not isinstance(codec, IntegerCodec) or codec.bits not in (4, 8):
            raise UnsupportedError(
                f"compressed-tensors checkpoints are written with int4, int8, fp8, NVFP4 or MXFP4, not {codec.name}: "
                "other widths are packed differently by its versions"
            )
        if _format(codec) == "int-quantized":
            return {"weight": TensorInfo(np.dtype(np.int8), shape), "weight_scale": layout["scale"]}
        whole_groups(codec, shape)
        if k * codec.bits % 32:
            raise ShapeError(f"{codec.name}: rows of {k} weights do not fill 32-bit words; choose a float type")
        arrays = {
            "weight_packed": TensorInfo(_I32, (n, k * codec.bits // 32)),
            "weight_scale": layout["scale"],
            "weight_shape": TensorInfo(np.dtype(np.int64), (2,)),
        }
        if not codec.symmetric:
            if n * codec.bits % 32 or codec.per == "tensor":
                raise ShapeError(f"{codec.name}: zeros of {n} rows do not fill 32-bit words; choose --sym")
            arrays["weight_zero_point"] = TensorInfo(_I32, (n * codec.bits // 32, layout["zero"].shape[1]))
        return arrays

    def pack(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """See `Layout.pack`."""
        if codec.name == "NVFP4":
            return _from_nvfp4(parts["data"], parts["scale"])
        if codec.name == "MXFP4":
            return _from_mxfp4(parts["data"])
        if isinstance(codec, Fp8Codec):
            return {"weight": parts["codes"], "weight_scale": parts["scale"]}
        assert isinstance(codec, IntegerCodec)
        if _format(codec) == "int-quantized":
            return {"weight": (parts["codes"] ^ np.uint8(128)).view(np.int8), "weight_scale": parts["scale"]}
        made = {
            "weight_packed": words(parts["codes"]),
            "weight_scale": parts["scale"],
            "weight_shape": np.array(shape, np.int64),
        }
        if not codec.symmetric:
            made["weight_zero_point"] = np.ascontiguousarray(words(pack_bits(parts["zero"].T, codec.bits)).T)
        return made

    def config(self, modules: Mapping[str, Codec], kept: Iterable[str]) -> dict[str, Any]:
        """See `Layout.config`. The type that most modules have is every linear layer's; others are named."""
        used = [c for c, _ in Counter(modules.values()).most_common()]
        groups = {}
        for i, codec in enumerate(used):
            named = sorted(m for m, c in modules.items() if c is codec)
            weights = _arguments(codec)
            inputs = None
            if self.activations.get(codec.name):
                inputs = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
                if weights["strategy"] == "block":
                    inputs |= {"strategy": "group", "group_size": 128}
            if i and named == sorted(experts(modules)):
                named = [EXPERTS]
            group = {"targets": named if i else ["Linear"], "format": _format(codec), "weights": weights}
            groups[f"group_{i}"] = {**group, "input_activations": inputs, "output_activations": None}
        formats = {g["format"] for g in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": sorted({"lm_head", *kept}),
            "config_groups": groups,
            "kv_cache_scheme": None,
        }

    def sharing(self, modules: Mapping[str, Codec]) -> list[list[str]]:
        """NVFP4's global scale is one for what vLLM joins."""
        groups: dict[tuple[str, int], list[str]] = {}
        for module in (m for m, c in modules.items() if c.name == "NVFP4"):
            stem, _, leaf = module.rpartition(".")
            for i, leaves in enumerate(_JOINED):
                if leaf in leaves:
                    groups.setdefault((stem, i), []).append(module)
        return [g for g in groups.values() if len(g) > 1]

    def warnings(self, modules: Mapping[str, Codec]) -> list[str]:
        """What clients cannot load."""
        warnings = []
        if any(isinstance(c, IntegerCodec) and not c.symmetric for c in modules.values()):
            warnings.append(
                "transformers 5.23.0 cannot load asymmetric pack-quantized weights (5.17 to 5.22.2 can); --sym loads everywhere"
            )
        odd = {c.name for c in experts(modules).values() if not _as_expert(c)}
        if odd:
            warnings.append(
                f"experts as {', '.join(sorted(odd))} are laid out as vLLM reads them; transformers 5.23.0 does not load them "
                "right: it knows experts in W4A16, W8A16 by group and FP8"
            )
        return warnings


def _as_expert(codec: Codec) -> bool:
    """Can transformers 5.23 load an expert of this type?"""
    if isinstance(codec, Fp8Codec):
        return not codec.side and not codec.group
    return isinstance(codec, IntegerCodec) and codec.symmetric and _format(codec) == "pack-quantized"


_WEIGHT = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


def _one(
    stem: str, names: Mapping[str, str], arrays: Arrays, load: Load, bits: set[int], sizes: set[int | None]
) -> tuple[Codec, tuple[int, int], Callable[[Parts], Parts]]:
    """Codec, shape and unpack of one module."""
    info = {k: arrays[v] for k, v in names.items()}
    scale = info["weight_scale"]
    kind = SCALES.get(scale.dtype, "")
    unpack: Any
    if "weight_packed" in info and info["weight_packed"].dtype == np.uint8:
        n, half = info["weight_packed"].shape
        k = half * 2
        name, unpack, per = ("MXFP4", _to_mxfp4, 32) if scale.dtype == np.uint8 else ("NVFP4", _to_nvfp4, 16)
        if scale.shape != (n, k // per) or (name == "NVFP4" and ("weight_global_scale" not in info or scale.dtype != F8_E4M3)):
            raise ShapeError(f"{stem}: its scales do not fit {name} weights {[n, k]}")
        codec: Codec = codecs.get(name)
        codec.layout((n, k))
        return codec, (n, k), unpack
    if "weight_packed" in info:
        if "weight_shape" not in info:
            raise ShapeError(f"{stem}: weight_shape is missing beside weight_packed")
        n, k = (int(d) for d in load(names["weight_shape"]).reshape(-1)[:2])
        width = info["weight_packed"].shape[1]
        fits = [b for b in sorted(bits or {4, 8}) if -(-k * b // 32) == width]
        if not fits or info["weight_packed"].shape[0] != n:
            raise UnsupportedError(
                f"{stem}: {width} words a row hold no {k} weights of {sorted(bits)} bits in a dense stream (compressed-tensors "
                "0.18 and later); decompress it with the version that wrote it"
            )
        zero = "asym" if "weight_zero_point" in info else "sym"
        per_what = _per(scale.shape, n, k, stem, sizes)
        act = ""
        if "weight_g_idx" in info and per_what.startswith("g"):
            group = load(names["weight_g_idx"])
            act = "" if np.array_equal(group, np.arange(k) // int(per_what[1:])) or (group < 0).any() else "-act"
        packed = codecs.get(f"int{fits[0]}-{per_what}-{zero}-{kind}{act}")
        assert isinstance(packed, IntegerCodec | ActOrderCodec)
        return packed, (n, k), partial(_to_packed, packed, (n, k))
    if "weight" not in info or len(info["weight"].shape) != 2:
        raise ShapeError(f"{stem}: a weight_scale without a matrix beside it")
    n, k = info["weight"].shape
    if info["weight"].dtype == np.int8:
        zero = "asym" if "weight_zero_point" in info else "sym"
        plain = codecs.get(f"int8-{_per(scale.shape, n, k, stem, sizes)}-{zero}-{kind}")
        assert isinstance(plain, IntegerCodec)
        return plain, (n, k), partial(_to_int8, plain, (n, k))
    codec = fp8_under(scale, info["weight"], stem)
    return codec, (n, k), lambda a: unpack_fp8(codec, (n, k), {"weight": a["weight"], "scale": a["weight_scale"]})


def _format(codec: Codec) -> str:
    """The `format` key."""
    if codec.name in ("NVFP4", "MXFP4"):
        return f"{codec.name.lower()}-pack-quantized"
    if isinstance(codec, Fp8Codec):
        return "float-quantized"
    assert isinstance(codec, IntegerCodec)
    return "int-quantized" if codec.bits == 8 and codec.symmetric and not codec.group else "pack-quantized"


def _arguments(codec: Codec) -> dict[str, Any]:
    """The `weights` of a config group."""
    arguments: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": None}
    arguments |= {"block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax"}
    if codec.name == "NVFP4":
        return arguments | {"strategy": "tensor_group", "group_size": 16}
    if codec.name == "MXFP4":
        return arguments | {"group_size": 32, "scale_dtype": "torch.uint8"}
    if isinstance(codec, Fp8Codec):
        blocks = {"strategy": "block", "block_structure": [codec.side, codec.side]} if codec.side else {"strategy": codec.per}
        return arguments | {"num_bits": 8} | blocks
    assert isinstance(codec, IntegerCodec)
    per = {"strategy": "group", "group_size": codec.group} if codec.group else {"strategy": codec.per}
    return arguments | {"num_bits": codec.bits, "type": "int", "symmetric": codec.symmetric} | per


LAYOUT = CompressedTensors
