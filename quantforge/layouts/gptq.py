"""GPTQ as AutoGPTQ and GPTQModel write it: fields run down the input dimension, zeros along the output.

    w[n, k] = scales[g, n] · (q[k, n] − z[g, n]),  g = g_idx[k]

The v1 layout ("gptq") stores z − 1, v2 ("gptq_v2") z itself. A zero of 0 cannot be told in v1: its
readers disagree, and AutoGPTQ's own packer spoils the zeros beside it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .. import __version__, codecs
from ..arrays import Array, Parts, TensorInfo
from ..codecs import Codec
from ..codecs.integers import ActOrderCodec, IntegerCodec, pack_bits, unpack_bits
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
    settings_of,
    stems,
    words,
)

logger = logging.getLogger(__name__)

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


def _zeros(qzeros: Array, bits: int, n: int, version: str) -> Array:
    """Zeros u8[groups, n] of int32[groups, n·bits/32]."""
    zeros = unpack_bits(octets(qzeros), bits, n)
    return zeros if version == V2 else (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)


def _version_by_zeros(qzeros: Array, bits: int, version: str) -> str:
    """The version in which symmetric zeros are stored, which is not always the one that the config names.

    All zeros 2**(bits − 1) is v2, all one less is v1; symmetric weights have no others.
    """
    middle = 1 << (bits - 1)
    for known, stored in ((V1, middle - 1), (V2, middle)):
        if (octets(qzeros) == pack_bits(np.full(32, stored, np.uint8), bits)[np.arange(qzeros.shape[-1] * 4) % (4 * bits)]).all():
            return known
    return version


def _unpack(codec: IntegerCodec | ActOrderCodec, version: str, arrays: Parts) -> Parts:
    plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
    parts = {"codes": octets(arrays["qweight"].T), "scale": np.ascontiguousarray(arrays["scales"].T)}
    if not plain.symmetric:
        n = arrays["scales"].shape[1]
        parts["zero"] = np.ascontiguousarray(_zeros(arrays["qzeros"], plain.bits, n, version).T)
    if codec is not plain:
        parts["group"] = np.ascontiguousarray(arrays["g_idx"])
    return parts


@dataclass(frozen=True, slots=True)
class Gptq(Layout):
    """GPTQ; version: "gptq", "gptq_v2", or None for v1 where symmetric (most readers) and v2 where not."""

    name: ClassVar[str] = "gptq"
    version: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def ordered(self, codec: Codec) -> Codec:
        """g_idx says it."""
        return codecs.get(f"{codec.name}-act") if isinstance(codec, IntegerCodec) and codec.group else codec

    def calibrated(self, settings: Mapping[str, Any]) -> Layout:
        """See `Layout.calibrated`."""
        return replace(self, settings=settings)

    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """See `Layout.find`. Bits, groups and act-order are taken from the arrays."""
        version = config.get("checkpoint_format") or config.get("format") or V1
        if version not in (V1, V2) or config.get("is_marlin_format"):
            shown = "marlin" if config.get("is_marlin_format") else version
            raise UnsupportedError(
                f"GPTQ checkpoint_format {shown!r}: gptq and gptq_v2 are read; save it as one of them with GPTQModel"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise UnsupportedError(f"GPTQ pack_dtype {config['pack_dtype']!r}: int32 is read; pack it so with GPTQModel")
        tensors, other = {}, 0
        for stem in stems(arrays, "qweight"):
            tensors[f"{stem}.weight"], stored = self._gather(stem, settings_of(config, stem), version, arrays, load)
            other += stored != version
        if other:
            logger.warning(
                "checkpoint_format says %s, but %d of %d matrices store their zeros as %s does; they are read so",
                version,
                other,
                len(tensors),
                V2 if version == V1 else V1,
            )
        biases = {f"{stem}.bias" for stem in stems(arrays, "qweight")} & arrays.keys()
        # AutoGPTQ gives every layer a bias, of zeros where the model has none
        optional = {b for b in biases if not load(b).any()}
        return Found(tensors, frozenset(), frozenset(optional))

    def _gather(self, stem: str, config: Mapping[str, Any], version: str, arrays: Arrays, load: Load) -> tuple[Gathered, str]:
        """A matrix, and the version in which it stores its zeros."""
        names = {k: f"{stem}.{k}" for k in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{k}" in arrays}
        if missing := {"qweight", "qzeros", "scales"} - names.keys():
            raise ShapeError(f"{stem}: {', '.join(sorted(missing))} missing beside qweight")
        shapes = {k: arrays[v].shape for k, v in names.items()}
        groups, n = shapes["scales"] if len(shapes["scales"]) == 2 else (0, 0)
        bits = shapes["qzeros"][-1] * 32 // n if n and shapes["qzeros"] else 0
        inputs = shapes["qweight"][0] * 32 // bits if bits and shapes["qweight"] else 0
        wanted = {"qweight": (inputs * bits // 32, n), "qzeros": (groups, n * bits // 32), "g_idx": (inputs,)}
        scale = SCALES.get(arrays[names["scales"]].dtype)
        if bits not in BITS or not groups or scale is None or any(shapes.get(k, v) != v for k, v in wanted.items()):
            raise ShapeError(
                f"{stem}: arrays { ({k: list(v) for k, v in shapes.items()}) } are no GPTQ weights of {config.get('bits')} bits"
            )
        symmetric = config.get("sym") is not False
        if symmetric:
            qzeros = load(names["qzeros"])
            version = _version_by_zeros(qzeros, bits, version)
            symmetric = bool((_zeros(qzeros, bits, n, version) == 1 << (bits - 1)).all())
        g_idx = load(names["g_idx"]) if groups > 1 and "g_idx" in names else None
        stated = [config.get("group_size")]
        if g_idx is not None and g_idx.any():  # all zeros say nothing: exporters leave them so
            stated = [int(np.bincount(g_idx.clip(0, groups)).max())]
        size = group_size(stem, inputs, groups, stated)
        act = "" if g_idx is None or not g_idx.any() or np.array_equal(g_idx, np.arange(inputs) // size) else "-act"
        per = f"g{size}" if groups > 1 else "channel"
        codec = codecs.get(f"int{bits}-{per}-{'sym' if symmetric else 'asym'}-{scale}{act}")
        assert isinstance(codec, IntegerCodec | ActOrderCodec)
        return Gathered(codec, (n, inputs), names, partial(_unpack, codec, version)), version

    def choose(
        self, kind: str | None, bits: int | None, group_size: int | None, symmetric: bool | None, scale: str
    ) -> tuple[Layout, Codec]:
        """Symmetric 4 bits in groups of 128 unless said otherwise; scales are f16."""
        if kind is not None:
            return self._for(codecs.get(kind))
        group_size = 128 if group_size is None else group_size
        per = "channel" if group_size == -1 else f"g{group_size}"
        bits = 4 if bits is None else bits
        if bits not in BITS:
            raise UnsupportedError(f"GPTQ checkpoints have 2, 3, 4 or 8 bits, not {bits}")
        return self._for(codecs.get(f"int{bits}-{per}-{'asym' if symmetric is False else 'sym'}"))

    def _for(self, codec: Codec) -> tuple[Layout, Codec]:
        """One asymmetric type makes the whole checkpoint v2."""
        plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
        asymmetric = isinstance(plain, IntegerCodec) and not plain.symmetric
        return replace(self, version=V2) if asymmetric and self.version is None else self, codec

    def sides(self, codec: Codec) -> tuple[int, int]:
        """As its kernels want them."""
        return 32, 32

    def arrays(self, codec: Codec, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """qweight, qzeros, scales and g_idx."""
        plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
        if not isinstance(plain, IntegerCodec) or plain.bits not in BITS or plain.per == "tensor":
            raise UnsupportedError(
                f"GPTQ checkpoints cannot hold {codec.name}; they hold int2, int3, int4 and int8 by group or row"
            )
        if self.version == V1 and not plain.symmetric:
            raise UnsupportedError(
                f"{codec.name} in the v1 layout: asymmetric zeros of 0 are lost there and GPTQModel refuses the file; "
                "choose gptq_v2, or --sym"
            )
        if len(shape) != 2 or shape[0] % 32 or shape[1] % 32:
            raise ShapeError(f"GPTQ checkpoints hold matrices whose sides are multiples of 32, not {list(shape)}")
        n, k = shape
        groups = plain.layout(shape)["scale"].shape[1]
        i32 = np.dtype(np.int32)
        return {
            "qweight": TensorInfo(i32, (k * plain.bits // 32, n)),
            "qzeros": TensorInfo(i32, (groups, n * plain.bits // 32)),
            "scales": TensorInfo(plain.scale_dtype, (groups, n)),
            "g_idx": TensorInfo(i32, (k,)),
        }

    def pack(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """See `Layout.pack`."""
        plain = codec.plain if isinstance(codec, ActOrderCodec) else codec
        assert isinstance(plain, IntegerCodec)
        scale = parts["scale"]
        zero = np.full(scale.shape, plain.middle, np.uint8) if plain.symmetric else parts["zero"]
        stored = zero.T - np.uint8(self._version(plain.symmetric) == V1)
        columns = np.arange(shape[1], dtype=np.int32)
        return {
            "qweight": np.ascontiguousarray(words(parts["codes"]).T),
            "qzeros": words(pack_bits(stored, plain.bits)),
            "scales": np.ascontiguousarray(scale.T),
            "g_idx": parts["group"] if codec is not plain else columns // np.int32(plain.group or shape[1]),
        }

    def _version(self, symmetric: bool) -> str:
        return self.version or (V1 if symmetric else V2)

    def config(self, modules: Mapping[str, Codec], kept: Iterable[str]) -> dict[str, Any]:
        """See `Layout.config`. Other types than most modules have, and layers kept in floats, are GPTQModel's `dynamic`."""
        plain = {m: c.plain if isinstance(c, ActOrderCodec) else c for m, c in modules.items()}
        main = Counter(plain.values()).most_common(1)[0][0]
        assert isinstance(main, IntegerCodec)
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": main.bits,
            "group_size": main.group or -1,
            "desc_act": any(isinstance(c, ActOrderCodec) for c in modules.values()),
            "sym": main.symmetric,
            "lm_head": False,
            "checkpoint_format": self._version(main.symmetric),
            **self.settings,
            "meta": {"quantizer": [f"quantforge:{__version__}"]},
        }
        dynamic: dict[str, Any] = {
            f"+:^{re.escape(m)}$": {"bits": c.bits, "group_size": c.group or -1, "sym": c.symmetric}
            for m, c in sorted(plain.items())
            if c is not main and isinstance(c, IntegerCodec)
        }
        if inside := in_blocks(kept):
            dynamic |= left_out(inside)
            # what transformers (optimum) has for the same
            settings["modules_in_block_to_quantize"] = [sorted(modules)]
        return settings | {"dynamic": dynamic} if dynamic else settings

    def warnings(self, modules: Mapping[str, Codec]) -> list[str]:
        """Who reads a mixture of types or experts."""
        warnings = []
        if len({c.name.removesuffix("-act") for c in modules.values()}) > 1:
            warnings.append("a GPTQ checkpoint of several types is read by GPTQModel and vLLM (dynamic), not by transformers")
        return warnings + expert_readers(modules)

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """quantize_config.json, without which AutoGPTQ 0.7 does not open a checkpoint."""
        return {"quantize_config.json": {**config, "model_file_base_name": "model"}}


LAYOUT = Gptq
