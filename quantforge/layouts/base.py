"""What a layout is: a codec's parts under a library's own tensor names, and config.json's quantization_config.
A layout is one module here, found by the config's `quant_method`; it knows no files."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays import BF16, Array, Parts, TensorInfo
from ..codecs import Codec
from ..codecs.fp8 import Fp8Codec, widened
from ..codecs.integers import IntegerCodec
from ..discovery import Registry
from ..errors import ShapeError, UnsupportedError

SCALES = {np.dtype(np.float16): "f16", BF16: "bf16", np.dtype(np.float32): "f32"}
"""Dtypes of scales and how codecs' names call them."""

_ACTIVATIONS = ("activation_scale", "input_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale")

Arrays = Mapping[str, TensorInfo]
Load = Callable[[str], Array]


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor that several arrays of a checkpoint hold together."""

    codec: Codec
    shape: tuple[int, ...]
    arrays: Mapping[str, str]
    """What `unpack` calls an array -> its name in the checkpoint."""
    unpack: Callable[[Parts], Parts]
    """The arrays as the codec's parts."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a layout makes of a checkpoint's arrays; arrays of neither field are tensors of their own."""

    tensors: Mapping[str, Gathered]
    dropped: frozenset[str] = frozenset()
    """Arrays that say nothing about weights, such as scales of activations."""
    optional: frozenset[str] = frozenset()
    """Tensors that a model may lack: biases of zero."""


class Layout(ABC):
    """One library's layout. Instances carry what is chosen when writing."""

    name: ClassVar[str]
    """`quant_method` in config.json, and --format."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other values of `quant_method` that are read so."""

    @property
    def writes(self) -> bool:
        """Can it be written? One that is only read implements `find`."""
        return type(self).pack is not Layout.pack

    @abstractmethod
    def find(self, config: Mapping[str, Any], arrays: Arrays, load: Load) -> Found:
        """The quantized tensors of a checkpoint.

        config: the quantization_config; load: an array by name, for the small ones that decide
        what the codec is. Raises UnsupportedError, ShapeError.
        """

    def choose(
        self, kind: str | None, bits: int | None, group_size: int | None, symmetric: bool | None, scale: str
    ) -> tuple[Layout, Codec]:
        """What --type, --bits, --group-size (−1: rows) and --sym mean here: this layout with the choices that are its own.

        scale: the model's dtype, "bf16". Raises UnsupportedError, saying what there is.
        """
        raise self._only_read()

    def sides(self, codec: Codec) -> tuple[int, int]:
        """What the rows and the columns of a matrix have to be multiples of; another one stays in floats."""
        return 1, 1

    def arrays(self, codec: Codec, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Suffix ("qweight") -> dtype and shape of what `pack` gives. Raises UnsupportedError, ShapeError."""
        raise self._only_read()

    def pack(self, codec: Codec, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """The arrays of a whole tensor, by suffix."""
        raise self._only_read()

    def config(self, modules: Mapping[str, Codec], kept: Iterable[str]) -> dict[str, Any]:
        """The quantization_config. modules: the quantized ones; kept: those that are linear and not quantized.

        Raises UnsupportedError for a mixture that the library does not know.
        """
        raise self._only_read()

    def _only_read(self) -> UnsupportedError:
        return UnsupportedError(f"{self.name} checkpoints are read, not written; --format has {', '.join(names())}")

    def sharing(self, modules: Mapping[str, Codec]) -> list[list[str]]:
        """Groups of modules that have to have one scale for all, because kernels join them."""
        return []

    def ordered(self, codec: Codec) -> Codec:
        """`codec` where columns belong to groups in any order; as it is where files cannot say so."""
        return codec

    def calibrated(self, settings: Mapping[str, Any]) -> Layout:
        """This layout for a method whose `Method.settings` these are."""
        return self

    def warnings(self, modules: Mapping[str, Codec]) -> list[str]:
        """What users should know about these modules and types in this layout."""
        return []

    def files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """More JSON files, by name, for this quantization_config."""
        return {}


def one_type(modules: Mapping[str, Codec], what: str) -> Codec:
    """The codec of all modules. Raises UnsupportedError if there are several."""
    used = {c.name: c for c in modules.values()}
    if len(used) != 1:
        raise UnsupportedError(f"{what} holds one type, not {', '.join(sorted(used))}; other layers can only stay in floats")
    return next(iter(used.values()))


def experts(modules: Mapping[str, Codec]) -> dict[str, Codec]:
    """Those modules that are experts of a mixture, one by one."""
    return {m: c for m, c in modules.items() if ".experts." in m}


def expert_readers(modules: Mapping[str, Codec]) -> list[str]:
    """Warnings of who does not read quantized experts as GPTQ and AWQ have them."""
    stacked = experts(modules)
    if any(m.endswith((".w1", ".w2", ".w3")) for m in stacked):
        return ["quantized experts named w1, w2, w3 are read by vLLM, not by transformers 5 or GPTQModel 7"]
    return ["quantized experts are read by GPTQModel and vLLM, not by transformers 5"] if stacked else []


def in_blocks(modules: Iterable[str]) -> list[str]:
    """Those modules that are part of a numbered block, sorted."""
    return sorted(m for m in modules if any(part.isdigit() for part in m.split(".")))


def left_out(modules: Iterable[str]) -> dict[str, Any]:
    """GPTQModel's `dynamic` for modules that are not quantized."""
    return {f"-:^{re.escape(m)}$": {} for m in modules}


def stems(arrays: Arrays, suffix: str) -> list[str]:
    """Modules that have an array of that name: "model.layers.0.mlp.up_proj"."""
    return [k[: -len(suffix) - 1] for k in arrays if k.endswith(f".{suffix}")]


def group_size(module: str, columns: int, groups: int, stated: Iterable[Any]) -> int:
    """Columns of a group, where `groups` of them make a row; the last may be short: 192 columns are 128 + 64.

    stated: sizes that the config speaks of. Raises ShapeError where none of them, or more than one, gives so many groups.
    """
    sizes = sorted({g for g in stated if type(g) is int and g > 0})
    fits = [g for g in sizes if -(-columns // g) == groups] if sizes else [columns // groups] if columns % groups == 0 else []
    if groups == 1:
        return columns
    if len(fits) != 1:
        raise ShapeError(
            f"{module}: {groups} groups in rows of {columns} columns; the config's group_size is {sizes or 'not given'}"
        )
    return fits[0]


def whole_groups(codec: IntegerCodec, shape: tuple[int, ...]) -> int:
    """Groups of a row in a layout that has no short ones. Raises ShapeError."""
    if codec.group and shape[-1] % codec.group:
        raise ShapeError(
            f"{codec.name}: rows of {shape[-1]} weights are not a multiple of the group size {codec.group}; "
            "choose a group size that divides them, or one group per row (--group-size -1)"
        )
    return shape[-1] // codec.group if codec.group else 1


def settings_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The config with what its `dynamic` (GPTQModel: the first regex that matches from the module's beginning) or
    `extra_config` (AutoRound: names or regexes) says of one module."""
    rules: list[tuple[str, Any]] = [(k.removeprefix("+:"), v) for k, v in (config.get("dynamic") or {}).items() if k[:2] != "-:"]
    rules += [(re.escape(k) + "$" if "*" not in k else k, v) for k, v in (config.get("extra_config") or {}).items()]
    for pattern, own in rules:
        try:
            if isinstance(own, Mapping) and re.match(pattern, module):
                return {**config, **own}
        except re.error:
            raise UnsupportedError(f"{module}: the config's regular expression {pattern!r} cannot be read") from None
    return config


def unpack_fp8(codec: Fp8Codec, shape: tuple[int, ...], arrays: Parts) -> Parts:
    """Parts of the arrays `weight` and `scale`."""
    return {"codes": arrays["weight"], "scale": widened(arrays["scale"]).reshape(codec.layout(shape)["scale"].shape)}


def activations(arrays: Arrays) -> frozenset[str]:
    """Arrays that are scales of activations and caches."""
    return frozenset(a for a in arrays if a.rpartition(".")[2].rpartition("_proj_")[2] in _ACTIVATIONS)


def words(packed: Array) -> Array:
    """A row-wise stream of bytes u8[..., n] as little-endian int32[..., n/4]."""
    return np.ascontiguousarray(packed).view("<i4").astype(np.int32, copy=False)


def octets(packed: Array) -> Array:
    """Inverse of `words`."""
    return np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)


def _check(given: Any) -> type[Layout]:
    if not (isinstance(given, type) and issubclass(given, Layout)):
        raise UnsupportedError(f"{given!r} is no class of quantforge.layouts.Layout")
    return given


_registry: Registry[type[Layout]] = Registry(__package__, "checkpoint format", _check, marker="LAYOUT")
register = _registry.register


def names() -> list[str]:
    """Names of the layouts that can be written."""
    return [name for name, kind in _registry.all().items() if kind().writes]


def readable() -> list[str]:
    """Names of all layouts."""
    return list(_registry.all())


def get(name: str, **options: Any) -> Layout:
    """The layout of that name, with what is chosen when writing. Raises UnsupportedError."""
    return _registry.get(name)(**options)


def find(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a quantization_config speaks of, or None."""
    method = config.get("quant_method")
    return next((kind() for kind in _registry.all().values() if method in (kind.name, *kind.also)), None)
