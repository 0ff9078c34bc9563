"""AWQ as AutoAWQ's "gemm" version: 4 bits, fields along the output dimension, interleaved.

    w[n, k] = (q[k, n] − z[k // g, n]) · scales[k // g, n]

Activation-aware scales are folded into the operation before and are no part of this layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import codecs
from ..arrays import Array, Parts, TensorInfo
from ..codecs import Codec
from ..codecs.integers import IntegerCodec, pack_bits, unpack_bits
from ..errors import ShapeError, UnsupportedError
from .base import (
    SCALES,
    Arrays,
    Found,
    Gathered,
    Layout,
    Load,
    expert_readers,
    group_size,
    in_blocks,
    left_out,
    octets,
    one_type,
    stems,
    whole_groups,
    words,
)

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Field j of a word holds column 8c + _ORDER[j]."""


def _pack(values: Array) -> Array:
    """u8[rows, n] below 16 -> int32[rows, n/8]."""
    return words(pack_bits(values.reshape(len(values), -1, 8)[..., _ORDER].reshape(values.shape), 4))


def _unpack(packed: Array) -> Array:
    """Inverse of `_pack`."""
    values = unpack_bits(octets(packed), 4, packed.shape[1] * 8)
    return values.reshape(len(values), -1, 8)[..., np.argsort(_ORDER)].reshape(values.shape)


def _parts(symmetric: bool, arrays: Parts) -> Parts:
    codes = pack_bits(np.ascontiguousarray(_unpack(arrays["qweight"]).T), 4)
    parts = {"codes": codes, "scale": np.ascontiguousarray(arrays["scales"].T)}
    return parts if symmetric else parts | {"zero": np.ascontiguousarray(_unpack(arrays["qzeros"]).T)}


@dataclass(frozen=True, slots=True)
class Awq(Layout):
    """AWQ, gemm version."""

    name: ClassVar[str] = "awq"

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`."""
        said = config.get("version") or ("llm-awq" if config.get("backend") == "llm-awq" else config.get("format")) or "gemm"
        version, bits = str(said).lower(), config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise UnsupportedError(f"AWQ version {version!r} with {bits} bits: version gemm with 4 bits is read")
        tensors = {}
        for stem in stems(arrays, "qweight"):
            names = {k: f"{stem}.{k}" for k in ("qweight", "qzeros", "scales")}
            if missing := [v for v in names.values() if v not in arrays]:
                raise ShapeError(f"{missing[0]} is missing beside {stem}.qweight")
            infos = {k: arrays[v] for k, v in names.items()}
            scale = SCALES.get(infos["scales"].dtype)
            groups, n = infos["scales"].shape if len(infos["scales"].shape) == 2 else (0, 0)
            k = infos["qweight"].shape[0]
            if scale is None or not groups or infos["qweight"].shape[1:] != (n // 8,) or n % 8:
                shapes = {key: list(i.shape) for key, i in infos.items()}
                raise ShapeError(f"{stem}: arrays {shapes} are no AWQ gemm weights")
            size = group_size(stem, k, groups, [config.get("group_size", config.get("q_group_size"))])
            per = f"g{size}" if groups > 1 else "channel"
            symmetric = not config.get("zero_point", True) and bool((load(names["qzeros"]) == -0x77777778).all())
            codec = codecs.get(f"int4-{per}-{'sym' if symmetric else 'asym'}-{scale}")
            tensors[f"{stem}.weight"] = Gathered(codec, (n, k), names, partial(_parts, symmetric))
        return Found(tensors)

    def choose(
        self, kind: str | None, bits: int | None, group_size: int | None, symmetric: bool | None, scale: str
    ) -> tuple[Layout, Codec]:
        """Asymmetric 4 bits in groups of 128 unless said otherwise; scales are f16."""
        if kind is not None:
            return self, codecs.get(kind)
        if bits not in (None, 4):
            raise UnsupportedError(f"AWQ checkpoints have 4 bits, not {bits}")
        group_size = 128 if group_size is None else group_size
        per = "channel" if group_size == -1 else f"g{group_size}"
        return self, codecs.get(f"int4-{per}-{'sym' if symmetric else 'asym'}")

    def sides(self, codec: Codec) -> tuple[int, int]:
        """Eight codes to a word; columns as its kernels want them."""
        return 8, 8

    def arrays(self, codec: Codec, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """qweight, qzeros and scales."""
        if not isinstance(codec, IntegerCodec) or codec.bits != 4 or codec.per == "tensor":
            raise UnsupportedError(f"AWQ checkpoints cannot hold {codec.name}; they hold int4 by group or row, in order")
        if len(shape) != 2 or shape[0] % 8 or shape[1] % 8:
            raise ShapeError(f"AWQ checkpoints hold matrices whose sides are multiples of 8, not {list(shape)}")
        n, k = shape
        groups = whole_groups(codec, shape)
        i32 = np.dtype(np.int32)
        return {
            "qweight": TensorInfo(i32, (k, n // 8)),
            "qzeros": TensorInfo(i32, (groups, n // 8)),
            "scales": TensorInfo(codec.scale_dtype, (groups, n)),
        }

    def pack(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """See `Layout.pack`."""
        assert isinstance(codec, IntegerCodec)
        scale = parts["scale"]
        zero = np.full(scale.shape, codec.middle, np.uint8) if codec.symmetric else parts["zero"]
        return {
            "qweight": _pack(np.ascontiguousarray(unpack_bits(parts["codes"], 4, shape[1]).T)),
            "qzeros": _pack(np.ascontiguousarray(zero.T)),
            "scales": np.ascontiguousarray(scale.T),
        }

    def warnings(self, modules: Mapping[str, Codec]) -> list[str]:
        """Who does not read experts."""
        return expert_readers(modules)

    def config(self, modules: Mapping[str, Codec], kept: Iterable[str]) -> dict[str, Any]:
        """See `Layout.config`."""
        codec, left = one_type(modules, "an AWQ checkpoint"), in_blocks(kept)
        assert isinstance(codec, IntegerCodec)
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": codec.group or -1,
            "zero_point": not codec.symmetric,
            "version": "gemm",
            "modules_to_not_convert": left or None,
            **({"dynamic": left_out(left)} if left else {}),  # GPTQModel's way to say it
        }


LAYOUT = Awq
