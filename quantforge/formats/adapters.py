"""Adapters as PEFT saves them (LoRA, DoRA): what they do to which tensor, under the names of their own modules."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .. import codecs
from ..arrays import SAFETENSORS_DTYPES, Array, is_finite
from ..codecs import Encoded
from ..errors import FormatError, NonFiniteError, ShapeError, UnsupportedError
from .base import Place
from .diagnosis import ADAPTER, ADAPTER_CONFIG, located
from .files import MappedFile
from .low_rank import Change
from .safetensors import read_header, read_json

_WRAPPERS = re.compile(
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+|(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\."
)
_LOW_RANK = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.(?!(?:weight|bias)$)[^.]+)?\.(?P<leaf>[^.]+)")
_EXPERTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of transformers' experts, in the order in which its modules define them and PEFT wraps them."""
_OTHER_METHODS = ("use_qalora", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "layer_replication")
"""Settings of PEFT that make LoRA another thing."""
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that took something out of the base model before the adapter was trained."""


@dataclass(slots=True)
class Update:
    """What an adapter does to one tensor; the strings are names in the adapter's file."""

    name: str
    """The tensor: "model.layers.0.self_attn.q_proj.weight"."""
    replaced: str | None = None
    """It is this one."""
    own: bool = False
    """Trained as a module by itself (modules_to_save): a tensor tied to it keeps what it was."""
    a: str | None = None
    b: str | None = None
    scaling: float = 1.0
    rank: int = 0
    kind: str = "linear"
    """"embedding": A is [rank, rows] and B [in, rank]; "stacked": A and B hold those of all experts."""
    magnitude: str | None = None
    added: str | None = None
    """A vector that is added, times `scaling`."""
    tokens: str | None = None
    """Rows that are others: those of `indices`."""
    indices: tuple[int, ...] = ()

    @property
    def low_rank(self) -> bool:
        """Is there something to multiply out?"""
        return self.a is not None


@dataclass(eq=False)
class Adapter:
    """A directory with adapter_config.json and adapter_model.safetensors, opened."""

    path: Path
    config: Mapping[str, Any]
    updates: Mapping[str, Update]
    """By the tensor's name."""
    scale: float = 1.0
    """Times its own scaling."""
    _places: Mapping[str, Place] = field(default_factory=dict)
    _file: MappedFile | None = None
    _experts_flipped: bool | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], scale: float = 1.0) -> Adapter:
        """Read configuration and headers. Raises FormatError, UnsupportedError."""
        path = located(Path(path))
        config_path = path / ADAPTER_CONFIG
        if not config_path.is_file():
            what = "not an adapter of PEFT" if path.is_dir() else "no such directory" if not path.exists() else "not a directory"
            raise FormatError(path, f"{what}: give a directory with {ADAPTER_CONFIG} and {ADAPTER}")
        config = read_json(config_path)
        _check(path, config)
        if not (path / ADAPTER).is_file():
            pickled = (path / "adapter_model.bin").is_file()
            why = "an adapter in a pickle, which is not loaded, because unpickling runs code from the file" if pickled else ""
            raise FormatError(path, f"{why or f'has no {ADAPTER}'}; save it again with PEFT: model.save_pretrained(OUT)")
        file = MappedFile(path / ADAPTER)
        places, _ = read_header(file)
        for key, place in places.items():
            if place.info.dtype not in _FLOATS:
                raise FormatError(file.path, f"tensor {key} is of {place.info.dtype}, not of floats", place.offset)
        made = cls(path, config, _updates(path, config, places), scale, places, file)
        if not made.updates:
            raise FormatError(file.path, "holds no change of any tensor")
        if scale != 1 and (dora := next((u for u in made.updates.values() if u.magnitude), None)):
            raise UnsupportedError(
                f"{path}: DoRA ({dora.name}) as it is, or not at all: a scale of {scale:g} has no meaning for it"
            )
        return made

    @property
    def base(self) -> str:
        """What it says it is an adapter of, for messages."""
        return str(self.config.get("base_model_name_or_path") or "another model")

    @property
    def base_class(self) -> str | None:
        """The architecture that it is an adapter of, where it says so, or the model that it names is here."""
        said = self.config.get("auto_mapping")
        if isinstance(said, Mapping) and said.get("base_model_class"):
            return str(said["base_model_class"])
        named = Path(self.base) / "config.json"
        try:
            known = read_json(named).get("architectures") if named.is_file() else None
        except (FormatError, OSError):
            return None
        return str(known[0]) if isinstance(known, list) and known else None

    def read(self, key: str) -> Encoded:
        """One of its tensors: a view of the file."""
        assert self._file is not None
        place = self._places[key]
        return Encoded(_FLOATS[place.info.dtype], place.info.shape, {"data": self._file.array(place.offset, place.info)})

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one of its tensors."""
        return self._places[key].info.shape

    def finite(self, key: str) -> Array:
        """One of its tensors, in its own dtype. Raises NonFiniteError."""
        data = self.read(key).parts["data"]
        if not (fine := is_finite(data)).all():
            index = tuple(int(i) for i in np.argwhere(~fine)[0])
            raise NonFiniteError(f"{self.path}: {key}: number {list(index)} is {data[index]}; the adapter is damaged", index)
        return data

    def orient(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See which axis of stacked experts PEFT took for the inputs, which its versions do differently; shapes: by tensor."""
        for name, shape in shapes.items():
            u = self.updates[name]
            if u.kind == "stacked" and len(shape) == 3 and shape[1] != shape[2] and u.a is not None:
                self._experts_flipped = self.shape(u.a)[-1] == shape[1]

    def _flipped(self, u: Update, shape: tuple[int, ...], crosswise: bool) -> bool:
        """Are the tensor's rows what goes in, and not what comes out?"""
        if u.kind != "stacked" or len(shape) != 3:
            return crosswise or u.kind == "embedding"
        if shape[1] != shape[2]:
            return self.shape(str(u.a))[-1] == shape[1]
        if self._experts_flipped is None:
            raise UnsupportedError(
                f"{self.path}: {u.name} is square, and nothing tells which axis PEFT took for the inputs; "
                "merge with PEFT: merge_and_unload().save_pretrained(OUT)"
            )
        return self._experts_flipped

    def check(self, u: Update, shape: tuple[int, ...], crosswise: bool) -> None:
        """Raise ShapeError where `change` would not fit a tensor of that shape."""
        experts = _experts(u, shape)
        if len(shape) != (3 if experts > 1 else 2):
            raise ShapeError(f"{self.path}: {u.name}: a change of low rank, but {list(shape)} is no matrix")
        out, n = shape[-2:][::-1] if self._flipped(u, shape, crosswise) else shape[-2:]
        a, b, rank = self.shape(str(u.a)), self.shape(str(u.b)), u.rank * experts
        if a != (rank, n) or b != (out, rank):
            raise ShapeError(
                f"{self.path}: {u.name}: lora_A {list(a)} and lora_B {list(b)} of rank {u.rank} do not fit "
                f"{list(shape)}: is it an adapter of this model? It names {self.base}"
            )
        lengths = prod(self.shape(u.magnitude)) if u.magnitude is not None else 0
        if u.magnitude is not None and (experts > 1 or lengths != out):
            raise ShapeError(f"{self.path}: {u.name}: {lengths} magnitudes do not fit {list(shape)}")

    def change(self, u: Update, shape: tuple[int, ...], crosswise: bool) -> Change:
        """What is added to a tensor of `shape`, rows merged. crosswise: it is stored with inputs before outputs.

        Raises ShapeError where it is another model's, NonFiniteError.
        """
        self.check(u, shape, crosswise)
        a, b, experts = self.finite(str(u.a)), self.finite(str(u.b)), _experts(u, shape)
        magnitude = None if u.magnitude is None else self.finite(u.magnitude).astype(np.float32).reshape(-1)
        scale = np.full(experts, u.scaling * self.scale, np.float32)
        which = np.arange(experts).repeat(prod(shape[:-1]) // experts)
        down = a.reshape(experts, u.rank, -1)  # [experts, rank, in]
        up = b.reshape(len(b), u.rank, experts).transpose(2, 0, 1)  # [experts, out, rank]
        if turned := self._flipped(u, shape, crosswise):
            up, down = down.swapaxes(1, 2), up.swapaxes(1, 2)
        rows = up.reshape(-1, u.rank)
        across = np.ascontiguousarray(down, np.float32)
        return Change(across, rows, which, scale, None if turned else magnitude, magnitude if turned else None)

    def close(self) -> None:
        """Unmap the file."""
        if self._file is not None:
            self._file.close()


def _experts(u: Update, shape: tuple[int, ...]) -> int:
    return shape[0] if u.kind == "stacked" and len(shape) == 3 else 1


_FLOATS = {SAFETENSORS_DTYPES[k]: codecs.get(k) for k in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")}


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what is not LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type {kind!r}: of PEFT's adapters, LoRA and DoRA are read")
    for key in _OTHER_METHODS:
        if config.get(key):
            raise UnsupportedError(f"{path}: {ADAPTER_CONFIG} has {key}: of PEFT's variants of LoRA, DoRA and rsLoRA are read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise UnsupportedError(
            f"{path}: init_lora_weights {start!r} changed the base model before training; save the adapter as plain LoRA with "
            "PEFT: save_pretrained(OUT, path_initial_model_for_weight_conversion=...)"
        )


def _updates(path: Path, config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Update]:
    """What is in the file, by the names of tensors. Raises FormatError, UnsupportedError."""
    updates: dict[str, Update] = {}
    low: dict[str, dict[str, str]] = {}

    def of(name: str) -> Update:
        return updates.setdefault(name, Update(name))

    for key in places:
        name = _WRAPPERS.sub("", key)
        if match := _LOW_RANK.fullmatch(name):
            part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
            held = low.setdefault(match["module"], {})
            if part in held:
                raise FormatError(path, f"{key} and {held[part]} are one and the same; save one adapter alone")
            held[part] = key
        elif match := _TOKENS.fullmatch(name):
            u = of(f"{match['module']}.weight")
            u.tokens, u.indices = key, _indices(path, config, match["module"])
        elif ".lora_" in name or (".token_adapter." in name and not name.endswith(".base_layer.weight")):
            raise UnsupportedError(f"{path}: {key}: of PEFT's variants of LoRA, DoRA and rsLoRA are read")
        elif ".original_module." not in name:
            match = _SAVED.fullmatch(name)
            plain = f"{match['module']}.{match['leaf']}" if match else name
            base = re.sub(r"\.(?:token_adapter\.)?base_layer(?=\.)", "", plain)
            if (
                match is None or base not in updates or updates[base].replaced is None
            ):  # some versions save a module twice; PEFT reads the plain name
                u = of(base)
                u.replaced, u.own = key, match is not None or (plain == base and _listed(base, config.get("modules_to_save")))
    for module, parts in low.items():
        _add_low_rank(path, config, of, module, parts, low)
    return updates


def _add_low_rank(
    path: Path, config: Mapping[str, Any], of: Callable[[str], Update], module: str, parts: Mapping[str, str], all_: Iterable[str]
) -> None:
    plain = re.sub(r"(?:\.base_layer)+$", "", module)
    embedding = "embedding_A" in parts or "embedding_B" in parts
    a, b = (parts.get(f"embedding_{k}" if embedding else k) for k in "AB")
    if a is None or b is None:
        raise FormatError(path, f"{module}: of lora_A and lora_B, only one is there: {', '.join(parts.values())}")
    wrapped = [m for m in all_ if re.sub(r"(?:\.base_layer)+$", "", m) == plain]
    targets = _parameters(config, plain)
    if targets or len(wrapped) > 1:
        depth = module.count(".base_layer", len(plain))
        if len(wrapped) != len(targets):
            raise UnsupportedError(
                f"{path}: {plain}: {len(wrapped)} changes, but target_parameters names {', '.join(targets) or 'none'} there"
            )
        u = of(f"{plain}.{targets[len(targets) - 1 - depth]}")
        u.kind, spoken = "stacked", u.name
    else:
        u = of(f"{plain}.weight")
        u.kind, spoken = "embedding" if embedding else "linear", plain
    rank, alpha = (
        _pattern(path, config, "rank_pattern", "r", spoken),
        _pattern(path, config, "alpha_pattern", "lora_alpha", spoken),
    )
    if rank < 1 or rank != int(rank):
        raise FormatError(path / ADAPTER_CONFIG, f"{spoken}: a rank of {rank:g}")
    u.a, u.b, u.rank = a, b, int(rank)
    u.scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    u.magnitude = parts.get("magnitude_vector")
    if bool(config.get("use_dora")) != (u.magnitude is not None):
        lacking = "has a" if u.magnitude else "lacks its"
        raise FormatError(path, f"{module} {lacking} lora_magnitude_vector, but use_dora is {bool(config.get('use_dora'))}")
    if (key := parts.get("B.bias")) is not None:
        v = of(f"{plain}.bias")
        v.added, v.scaling = key, u.scaling


def _parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """Parameters of a module that target_parameters names, in the order in which PEFT wraps them."""
    names = set()
    for target in config.get("target_parameters") or ():
        owner, _, parameter = str(target).rpartition(".")
        here = f".{module}".endswith(f".{owner}") if owner else module.endswith(".experts")
        if here and parameter not in ("weight", "bias"):
            names.add(parameter)
    return sorted(names, key=lambda p: (_EXPERTS.index(p) if p in _EXPERTS else -1, p))


def _pattern(path: Path, config: Mapping[str, Any], patterns: str, default: str, name: str) -> float:
    """A number of the configuration that may be another for some modules: PEFT takes the first pattern that matches."""
    value = config.get(default, 8)
    try:
        for pattern, other in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                value = other
                break
    except (re.error, AttributeError, RecursionError):
        raise FormatError(path / ADAPTER_CONFIG, f"{patterns} is no map of regular expressions to numbers") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FormatError(path / ADAPTER_CONFIG, f"{default} of {name} is {value!r}, not a number")
    return float(value)


def _listed(name: str, modules: Sequence[str] | None) -> bool:
    """Is a tensor inside of one of the modules?"""
    return any(f".{name}".endswith(f".{m}.{name.rpartition('.')[2]}") or f".{m}." in f".{name}" for m in modules or ())


def _indices(path: Path, config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows of a module that `trainable_token_indices` names. Raises FormatError."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), None)
    if not isinstance(given, list) or not all(type(i) is int and i >= 0 for i in given) or len(set(given)) < len(given):
        raise FormatError(path / ADAPTER_CONFIG, f"trainable_token_indices has no list of tokens, each once, for {module}")
    return tuple(given)
