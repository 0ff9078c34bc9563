"""What an architecture is: what each tensor is called, which role it plays, which metadata go with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..discovery import Registry
from ..errors import ShapeError, UnsupportedError, nearest
from .rope import ROPE_FREQS, llama3_rope_factors, rope_metadata, rope_settings

logger = logging.getLogger(__name__)

Config: TypeAlias = Mapping[str, Any]
Shape: TypeAlias = tuple[int, ...]

# What gguf's tables were when first imported: building a TensorNameMap for some architectures
# (Arctic) changes the class's own table, and with it every map built later in the process.
_BLOCK_NAMES = dict(gguf.TensorNameMap.block_mappings_cfg)


@dataclass(frozen=True, slots=True)
class Transform:
    """A change between the checkpoint's numbers and GGUF's that works row by row, with its inverse.

    `gguf[i] = value(checkpoint[rows[i]])`; None: unchanged. Rows are those of the tensor with
    all axes before the last merged (for 1-D tensors, its elements). `value` is elementwise.
    """

    rows: NDArray[np.int64] | None = None
    value: Callable[[F32], F32] | None = None
    inverse_value: Callable[[F32], F32] | None = None

    @property
    def inverse(self) -> Transform:
        """The transform from GGUF's numbers back to the checkpoint's."""
        return Transform(None if self.rows is None else np.argsort(self.rows), self.inverse_value, self.value)


IDENTITY = Transform()


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model, as GGUF sees it."""

    name: str
    """GGUF name, "blk.0.attn_q.weight"."""
    shape: Shape
    """[out, in], or [experts, out, in], or [n]."""
    sources: tuple[str, ...]
    """Tensors of the checkpoint that it is made of: one, or several stacked on a new first axis; none if constant."""
    transform: Transform = field(default=IDENTITY)
    constant: F32 | None = None
    """The tensor itself where it is computed from the config (rope_freqs) instead of read."""
    expert: int | None = None
    """The index on the first axis of its source, where it is one of a GGUF file's stacked experts."""

    @property
    def role(self) -> str:
        """GGUF stem without layer and suffix: "attn_q", "token_embd"."""
        stem = self.name.rsplit(".", 1)[0]
        return stem.split(".", 2)[2] if stem.startswith("blk.") else stem

    @property
    def experts(self) -> int:
        """Experts that are stacked in it; 1 where it is one matrix or vector."""
        return self.shape[0] if len(self.shape) > 2 else 1

    @property
    def layer(self) -> int | None:
        """Layer number, or None outside the blocks."""
        return int(self.name.split(".", 2)[1]) if self.name.startswith("blk.") else None


@dataclass(frozen=True, slots=True)
class Tensor:
    """What an architecture says about one role."""

    dims: tuple[str, ...]
    """Names of `Arch.sizes`, outermost first: ("q", "embd")."""
    bias: bool | str = False
    """Is there a bias of size dims[0]: yes, no, or the config key that says so."""
    tied: str = ""
    """The config key that says that this tensor is another one's copy and is not stored."""
    transform: Callable[[Config], Transform] | None = None
    """From the hyperparameters; applies to the weight and to the bias."""
    checkpoint: str = ""
    """The checkpoint's name with {bid}, where gguf's table begins with another model's spelling of it."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that share an input, and the op whose output channels can take a scale out of it."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Arch:
    """One architecture as data; a module of this package holds one as `ARCH`."""

    hf: tuple[str, ...]
    """config.json "architectures"."""
    gguf: gguf.MODEL_ARCH
    tensors: Mapping[str, Tensor]
    """Every role that llama.cpp loads for it, by GGUF stem."""
    scale_groups: tuple[ScaleGroup, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out."""
    metadata_keys: Mapping[str, tuple[str, type]] = field(default_factory=dict)
    """GGUF key (of gguf.Keys, with {arch}) -> config key and type, in the order in which they are written."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Config values that llama.cpp's graph has built in; another value is refused."""
    rope_types: frozenset[str] = frozenset({"default", "linear", "dynamic", "yarn"})
    generated: Callable[[Config], Iterable[Weight]] | None = None
    """Tensors that are computed from the hyperparameters."""
    model_type: str = ""
    """config.json "model_type", where it is not GGUF's name."""
    prefixes: tuple[str, ...] = ("model.", "lm_head.")
    """How tensor names begin. gguf's table also knows other spellings (Meta's own), whose numbers need other transforms."""
    skipped: re.Pattern[str] = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")
    """Buffers of the checkpoint that no model file needs."""

    @property
    def name(self) -> str:
        """GGUF's name, `general.architecture`: "llama"."""
        return str(gguf.MODEL_ARCH_NAMES[self.gguf])

    def hyperparameters(self, config: Config) -> dict[str, Any]:
        """config.json with this architecture's defaults filled in, `rope` in one form, and values checked.

        Raises UnsupportedError for a missing or mistyped value and for what llama.cpp cannot run.
        """
        given = {k: v for k, v in {**config, **(config.get("text_config") or {})}.items() if v is not None}
        h: dict[str, Any] = {**self.defaults, **given}
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            _number(h, key, int)
        h.setdefault("num_key_value_heads", h["num_attention_heads"])
        heads, kv = h["num_attention_heads"], _number(h, "num_key_value_heads", int)
        if heads % kv:
            raise UnsupportedError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
        if "head_dim" not in h and h["hidden_size"] % heads:
            raise UnsupportedError(
                f"config.json: hidden_size {h['hidden_size']} is not a multiple of num_attention_heads {heads}"
            )
        h["key_length"] = _number(h, "head_dim", int) if "head_dim" in h else h["hidden_size"] // heads
        if h["key_length"] % 2:
            raise UnsupportedError(f"config.json: a head size of {h['key_length']} is odd; rotary embedding needs pairs")
        for key, value in self.required.items():
            if h.get(key, value) != value:
                raise UnsupportedError(
                    f"config.json: {key} = {h[key]!r}: llama.cpp runs {self.name} models only with {key} = {value!r}"
                )
        h["rope"] = rope_settings(h)
        if h["rope"]["rope_type"] not in self.rope_types:
            raise UnsupportedError(
                f"config.json: rope scaling {h['rope']['rope_type']!r}: llama.cpp runs {self.name} models with "
                f"{', '.join(sorted(self.rope_types))}"
            )
        return h

    def sizes(self, h: Config) -> dict[str, int]:
        """The dimensions that tensor shapes are written in."""
        head = h["key_length"]
        return {
            "vocab": h["vocab_size"],
            "embd": h["hidden_size"],
            "ff": h["intermediate_size"],
            "head": head,
            "q": h["num_attention_heads"] * head,
            "kv": h["num_key_value_heads"] * head,
            "experts": h.get("num_local_experts", h.get("num_experts", 0)),
            "expert_ff": h.get("moe_intermediate_size", h["intermediate_size"]),
        }

    def weights(self, config: Config, tensors: Mapping[str, Shape], optional: Collection[str] = ()) -> list[Weight]:
        """The tensors of the GGUF file: first the computed ones, then the checkpoint's, in the order of `tensors`.

        tensors: checkpoint name -> shape; optional: those that may be left out if the model has no
        place for them. Buffers and tied copies are left out; experts that the
        checkpoint stores one by one are gathered. Raises ShapeError naming missing or unknown
        tensors and shapes that contradict the config.
        """
        h = self.hyperparameters(config)
        expected = self._expected(h, len(tensors))
        names = _names(self.gguf, h["num_hidden_layers"])
        tied = {f"{r}.weight" for r, t in self.tensors.items() if t.tied and h.get(t.tied)}

        sources: dict[str, dict[int, str]] = {}  # GGUF name -> expert -> checkpoint name
        unknown = []
        for source in tensors:
            if self.skipped.search(source):
                continue
            # One expert's "…experts.7.up_proj.weight" is a slice of GGUF's "…experts.up_proj.weight".
            expert = re.search(r"\.experts\.(\d+)\.", source)
            whole = source if expert is None else source[: expert.start(1)] + source[expert.end(1) + 1 :]
            name = names.get_name(whole, try_suffixes=(".weight", ".bias"))
            if name in tied:
                continue
            if name not in expected or not source.startswith(self.prefixes):
                if source not in optional:
                    unknown.append(source)
                continue
            gathered = sources.setdefault(name, {})
            index = int(expert.group(1)) if expert else -1
            if index in gathered:
                raise ShapeError(f"{source} and {gathered[index]} are both {name}: remove one from the checkpoint")
            gathered[index] = source
        if unknown:
            raise ShapeError(f"the checkpoint has tensors that a {self.hf[0]} with this config.json has not: {_some(unknown)}")
        if missing := [_checkpoint_name(names, name) for name in expected if name not in sources]:
            raise ShapeError(f"the checkpoint lacks tensors that config.json asks for: {_some(missing)}")

        found = [] if self.generated is None else list(self.generated(h))
        for name, gathered in sources.items():
            tensor, shape = expected[name]
            parts = tuple(gathered[i] for i in sorted(gathered))
            part_shape = shape
            if -1 not in gathered:
                part_shape = shape[1:]
                if sorted(gathered) != list(range(shape[0])):
                    raise ShapeError(f"{name}: the checkpoint has {len(parts)} of the {shape[0]} experts that config.json states")
            for part in parts:
                if tuple(tensors[part]) != part_shape:
                    raise ShapeError(f"{part}: shape {list(tensors[part])}, but config.json makes it {list(part_shape)}")
            transform = tensor.transform(h) if tensor.transform else IDENTITY
            found.append(Weight(name, shape, parts, transform))
        return found

    def checkpoint(self, config: Config, tensors: Mapping[str, Shape]) -> dict[str, Weight]:
        """The checkpoint's tensors by name, each as what it is made of in a GGUF file: the inverse of `weights`.

        config: what the checkpoint's config.json will be; tensors: GGUF name -> shape. Stacked experts come apart.
        Raises ShapeError naming missing or unknown tensors and shapes that contradict the config.
        """
        h = self.hyperparameters(config)
        expected = self._expected(h, len(tensors))
        computed = {w.name for w in self.generated(h)} if self.generated else set()
        if unknown := [n for n in tensors if n not in expected and n not in computed]:
            raise ShapeError(f"a {self.hf[0]} has no place for the file's tensors {_some(unknown)}")
        if missing := [n for n in expected if n not in tensors]:
            raise ShapeError(f"the file lacks tensors that its metadata ask for: {_some(missing)}")
        names = _names(self.gguf, h["num_hidden_layers"])
        found = {}
        for name in (n for n in tensors if n in expected):
            tensor, shape = expected[name]
            if tuple(tensors[name]) != shape:
                raise ShapeError(f"{name}: shape {list(tensors[name])}, but the metadata make it {list(shape)}")
            bid = name.split(".")[1]
            spelled = (tensor.checkpoint.format(bid=bid) + name[name.rindex(".") :]) if tensor.checkpoint else ""
            spelled = spelled or _checkpoint_name(names, name)
            inverse = tensor.transform(h).inverse if tensor.transform else IDENTITY
            stem, experts, rest = spelled.partition(".experts.")
            if experts:
                each = {f"{stem}.experts.{e}.{rest}": Weight(name, shape[1:], (name,), inverse, None, e) for e in range(shape[0])}
                found.update(each)
            else:
                found[spelled] = Weight(name, shape, (name,), inverse)
        return found

    def _expected(self, h: Config, n_tensors: int) -> dict[str, tuple[Tensor, Shape]]:
        layers = h["num_hidden_layers"]
        if layers > n_tensors:
            raise ShapeError(f"config.json: num_hidden_layers = {layers}, but the checkpoint has {n_tensors} tensors in all")
        sizes = self.sizes(h)
        patterns = {p.rsplit(".", 1)[-1]: p for p in (gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[self.gguf])}
        expected = {}
        for role, tensor in self.tensors.items():
            if tensor.tied and h.get(tensor.tied):
                continue
            shape = tuple(sizes[d] for d in tensor.dims)
            suffixes = {".weight": shape}
            if h.get(tensor.bias, False) if isinstance(tensor.bias, str) else tensor.bias:
                suffixes[".bias"] = shape[:1]
            pattern = patterns[role]
            for bid in range(layers if "{bid}" in pattern else 1):
                for suffix, s in suffixes.items():
                    expected[pattern.format(bid=bid) + suffix] = (tensor, s)
        return expected

    def metadata(self, config: Config, generation_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """GGUF's key-value pairs that follow from config.json and generation_config.json.

        int: UINT32, float: FLOAT32, NumPy scalars: their own type. Tokenizer, file type and the
        model's name and licence are not among them.
        """
        h = self.hyperparameters(config)
        window = h.get("sliding_window")
        if window and h.get("use_sliding_window", True) and window < h.get("max_position_embeddings", 0):
            logger.warning("config.json: llama.cpp's %s graph has no sliding_window (%s): it attends to all", self.name, window)
        found: dict[str, Any] = {gguf.Keys.General.ARCHITECTURE: self.name}
        found.update(_sampling(generation_config or {}))
        for pattern, (key, kind) in self.metadata_keys.items():
            if kind is dict:
                found.update({k.format(arch=self.name): v for k, v in rope_metadata(h[key]).items()})
            elif key in h:
                found[pattern.format(arch=self.name)] = _number(h, key, kind)
        if h.get("is_causal") is False:
            found[gguf.Keys.Attention.CAUSAL.format(arch=self.name)] = False
        return found


class _NameMap(gguf.TensorNameMap):
    """gguf's map from checkpoint names to GGUF names, built on a copy of its table."""

    def __init__(self, arch: gguf.MODEL_ARCH, n_blocks: int) -> None:
        self.block_mappings_cfg = dict(_BLOCK_NAMES)
        super().__init__(arch, n_blocks)


def _names(arch: gguf.MODEL_ARCH, n_blocks: int) -> gguf.TensorNameMap:
    return _NameMap(arch, n_blocks)


def _checkpoint_name(names: gguf.TensorNameMap, name: str) -> str:
    """The Hugging Face spelling of a GGUF name, for messages."""
    stem, dot, suffix = name.rpartition(".")
    spellings = [k for k, (_, v) in names.mapping.items() if v == stem and k.startswith(("model.", "lm_head"))]
    spellings.sort(key=lambda k: not k.endswith(_USUAL))
    return (spellings[0] if spellings else stem) + dot + suffix


_USUAL = ("self_attn.q_norm", "self_attn.k_norm")
"""Spellings of transformers that are not the first ones in gguf's table."""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _number(h: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """The config value as int or float; positive where it is an int."""
    value: Any = h.get(key)
    if value is None:
        raise UnsupportedError(f"config.json lacks {key}")
    allowed: Any = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed) or (kind is int and not 0 < value < 2**31):
        raise UnsupportedError(f"config.json: {key} = {value!r} is not a {'positive integer' if kind is int else 'number'}")
    return kind(value)


def rope_freqs(h: Config) -> list[Weight]:
    """The tensor in which llama.cpp takes Llama 3's rope scaling, if the model has one."""
    if h["rope"]["rope_type"] != "llama3":
        return []
    factors = llama3_rope_factors(h["rope"], h["key_length"])
    return [Weight(ROPE_FREQS, factors.shape, (), constant=factors)]


def interleave_rope(heads_key: str) -> Callable[[Config], Transform]:
    """Rows from transformers' rotary layout (halves) to Meta's (pairs), which llama.cpp's llama graph rotates."""

    def transform(h: Config) -> Transform:
        heads, dim = h[heads_key], h["key_length"]
        rows = np.arange(heads * dim, dtype=np.int64).reshape(heads, 2, dim // 2)
        return Transform(rows=rows.swapaxes(1, 2).reshape(-1))

    return transform


_g = gguf.Keys.General
_SAMPLING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "sequence": (_g.SAMPLING_SEQUENCE, str),
    "top_k": (_g.SAMPLING_TOP_K, np.int32),
    "top_p": (_g.SAMPLING_TOP_P, float),
    "min_p": (_g.SAMPLING_MIN_P, float),
    "xtc_probability": (_g.SAMPLING_XTC_PROBABILITY, float),
    "xtc_threshold": (_g.SAMPLING_XTC_THRESHOLD, float),
    "temperature": (_g.SAMPLING_TEMP, float),
    "penalty_last_n": (_g.SAMPLING_PENALTY_LAST_N, np.int32),
    "repetition_penalty": (_g.SAMPLING_PENALTY_REPEAT, float),  # transformers' name; the converter of llama.cpp drops it
    "penalty_repeat": (_g.SAMPLING_PENALTY_REPEAT, float),
    "mirostat": (_g.SAMPLING_MIROSTAT, np.int32),
    "mirostat_tau": (_g.SAMPLING_MIROSTAT_TAU, float),
    "mirostat_eta": (_g.SAMPLING_MIROSTAT_ETA, float),
}


def _sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, (name, kind) in _SAMPLING.items():
        value = generation_config.get(key)
        if value is None:
            continue
        if kind is not str and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UnsupportedError(f"generation_config.json: {key} = {value!r} is not a number")
        found[name] = kind(value)
    return found


_llm, _att, _rp = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
METADATA: dict[str, tuple[str, type]] = {
    _llm.BLOCK_COUNT: ("num_hidden_layers", int),
    _llm.CONTEXT_LENGTH: ("max_position_embeddings", int),
    _llm.EMBEDDING_LENGTH: ("hidden_size", int),
    _llm.FEED_FORWARD_LENGTH: ("intermediate_size", int),
    _att.HEAD_COUNT: ("num_attention_heads", int),
    _att.HEAD_COUNT_KV: ("num_key_value_heads", int),
    _rp.FREQ_BASE: ("rope", dict),
    _att.LAYERNORM_RMS_EPS: ("rms_norm_eps", float),
    _att.KEY_LENGTH: ("head_dim", int),
    _att.VALUE_LENGTH: ("head_dim", int),
}
"""What nearly every decoder states; an architecture adds its own after these."""

LLAMA_METADATA = METADATA | {
    _att.KEY_LENGTH: ("key_length", int),
    _att.VALUE_LENGTH: ("key_length", int),
    _llm.VOCAB_SIZE: ("vocab_size", int),
    _rp.DIMENSION_COUNT: ("key_length", int),
}
"""What all models state that llama.cpp runs as llama."""

DECODER: dict[str, Tensor] = {
    "token_embd": Tensor(("vocab", "embd")),
    "output_norm": Tensor(("embd",)),
    "output": Tensor(("vocab", "embd"), tied="tie_word_embeddings"),
    "attn_norm": Tensor(("embd",)),
    "attn_q": Tensor(("q", "embd")),
    "attn_k": Tensor(("kv", "embd")),
    "attn_v": Tensor(("kv", "embd")),
    "attn_output": Tensor(("embd", "q")),
    "ffn_norm": Tensor(("embd",)),
    "ffn_gate": Tensor(("ff", "embd")),
    "ffn_up": Tensor(("ff", "embd")),
    "ffn_down": Tensor(("embd", "ff")),
}
"""A pre-norm decoder with gated MLP, without biases; architectures override roles and add to them."""

DECODER_SCALE_GROUPS = (
    ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")),
    ScaleGroup("attn_v", ("attn_output",)),
    ScaleGroup("ffn_norm", ("ffn_gate", "ffn_up")),
    ScaleGroup("ffn_up", ("ffn_down",)),
)


def _check(given: Any) -> Arch:
    if not isinstance(given, Arch):
        raise UnsupportedError(f"{given!r} is no quantforge.archs.Arch")
    return given


_registry: Registry[Arch] = Registry(__package__, "architecture", _check, marker="ARCH", names=lambda arch: arch.hf)
register = _registry.register


def supported() -> dict[str, Arch]:
    """Every architecture by its name in config.json."""
    return _registry.all()


def find(config: Config) -> Arch:
    """The architecture that config.json names. Raises UnsupportedError listing the supported ones."""
    names = config.get("architectures")
    known = supported()
    if not isinstance(names, list) or not names:
        raise UnsupportedError(f'config.json names no "architectures"; supported: {", ".join(sorted(known))}')
    for name in names:
        if name in known:
            return known[name]
    raise UnsupportedError(
        f"architecture {names[0]} is not supported{nearest(str(names[0]), known)}; supported: {', '.join(sorted(known))}"
    )
