"""What an architecture is: what each tensor is called, which role it plays, which metadata go with it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gguf

from ..discovery import Registry
from ..errors import ShapeError, UnsupportedError, nearest
from .keys import Keys, number, sampling, stated
from .names import canonical
from .roles import Role, names_kind
from .rope import ROPE_FACTORS, rope_metadata, rope_settings
from .tensors import Config, From, ScaleGroup, Sizes, Tensor, size
from .weight import Shape, Weight, inverted

logger = logging.getLogger(__name__)


NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True, eq=False)
class Arch:
    """One architecture as data; a module of this package holds one, or several, as `ARCH`."""

    hf: tuple[str, ...]
    """config.json "architectures", the one that is written on the way back first."""
    name: str
    """GGUF's name, `general.architecture`: "llama"."""
    tensors: Mapping[str, Tensor]
    """Every role that llama.cpp loads for it, by GGUF stem without the layer: "attn_q". With {bid}: the whole name. One that
    other layers have from another place is there again as "attn_q@kind"."""
    scale_groups: tuple[ScaleGroup, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for keys that config.json leaves out: a value, or a function of what is given."""
    nullable: frozenset[str] = frozenset()
    """Keys that null switches off; elsewhere it is the same as none."""
    metadata_keys: Keys = field(default_factory=dict)
    """GGUF key (of gguf.Keys, with {arch}) -> config key and type, in the order in which they are written."""
    computed: Callable[[Config], Mapping[str, Any]] | None = None
    """More metadata, by GGUF key with {arch}: what is no config value as it is."""
    restored: Callable[[Callable[[str], Any]], Mapping[str, Any]] | None = None
    """Config values that follow from metadata in another way than by `metadata_keys`; gets a look-up of GGUF keys with {arch},
    and of tensors' names: the numbers of rope factors, the shape of others; None for what is not there."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Config values that llama.cpp's graph has built in or derives: a value, or a function of the hyperparameters.
    Another value is refused; on the way back they are stated."""
    aliases: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Usual config key -> what this model's config.json calls it: {"hidden_size": "n_embd"}; several: whichever is there."""
    needed: tuple[str, ...] = NEEDED
    """Config values without which nothing can be said; positive integers."""
    dims: Callable[[Config, int | None], Sizes] | None = None
    """Dimensions of its own, or other than usual, also by layer (None: outside of the blocks)."""
    layers: Callable[[Config], Sequence[Collection[str]]] | None = None
    """What each layer is: kinds that `Tensor.where` names."""
    block_count: Callable[[Config], int] | None = None
    """Numbered blocks in the file, where these are more than num_hidden_layers."""
    nextn: Callable[[Config, Collection[str]], int] | None = None
    """How many layers that predict further tokens (MTP) follow the blocks, from the checkpoint's tensor names: config.json may
    count some that a release leaves out. They are the hyperparameter "nextn" and blocks of the kind "nextn"."""
    rope_types: frozenset[str] = frozenset({"default", "linear", "dynamic", "yarn"})
    """What the graph can do; empty: it has no rotary embedding."""
    yarn_betas: bool = False
    """Does the graph read YaRN's beta_fast and beta_slow? Others have 32 and 1."""
    partial_rotary: bool = False
    """Can the graph rotate a part of each head?"""
    window: bool = False
    """Does the graph have sliding windows?"""
    generated: Callable[[Config], Iterable[Weight]] | None = None
    """Tensors that are computed from the hyperparameters."""
    model_type: str = ""
    """config.json "model_type", where it is not GGUF's name."""
    told_by: Callable[[Callable[[str], Any]], bool] | None = None
    """Of several models with one name in GGUF: does a file hold this one? Gets a look-up of GGUF keys with {arch}."""
    samples: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """Settings of small random models that the tests prove it with, beside the usual small ones: name -> config keys."""
    skipped: re.Pattern[str] = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")
    """Buffers of the checkpoint that no model file needs."""
    pooled: bool = False
    """Is it without a head, and its file says how a text's vectors become one?"""
    others: re.Pattern[str] | None = None
    """Tensors of the model's other parts (vision, audio), which are left out with a note."""
    around: Mapping[str, Any] | None = None
    """What config.json has beside text_config on the way back, where transformers has no class for the text part alone: the
    smallest settings of the other parts, whose numbers will be random."""

    # ---- the config

    def hyperparameters(self, config: Config, *, graph: bool = True) -> dict[str, Any]:
        """config.json with this architecture's defaults filled in, `rope` in one form, and values checked.

        graph: refuse what llama.cpp's graph cannot run; a checkpoint may have it.

        Raises UnsupportedError for a missing or mistyped value and for what llama.cpp cannot run.
        """
        text = config.get("text_config") or {}
        outer = {k: config[k] for k in ("tie_word_embeddings",) if text and k in config}  # of the whole model
        around = {k: v for k, v in config.items() if not text or not k.startswith("rope_")}
        given = {k: v for k, v in {**around, **text, **outer}.items() if v is not None or k in self.nullable}
        h: dict[str, Any] = {**{k: v(given) if callable(v) else v for k, v in self.defaults.items()}, **given}
        self._rename(h, given)
        for key in self.needed:
            number(h, key, int)
        if "max_position_embeddings" in h:
            number(h, "max_position_embeddings", int)
        if "num_attention_heads" in h:
            self._heads(h)
        if self.rope_types:
            h["rope"] = rope_settings(h, partial=self.partial_rotary)
            if graph and h["rope"]["rope_type"] not in self.rope_types:
                raise UnsupportedError(
                    f"config.json: rope scaling {h['rope']['rope_type']!r}: llama.cpp runs {self.name} models with "
                    f"{', '.join(sorted(self.rope_types))}"
                )
            betas = h["rope"].get("beta_fast", 32), h["rope"].get("beta_slow", 1)
            if graph and h["rope"]["rope_type"] == "yarn" and not self.yarn_betas and betas != (32, 1):
                raise UnsupportedError(
                    f"config.json: yarn rope scaling with beta_fast, beta_slow = {betas[0]}, {betas[1]}: llama.cpp runs "
                    f"{self.name} models only with 32, 1"
                )
        for key, value in self._implied(h).items() if graph else ():
            if h.get(key, value) != value:
                raise UnsupportedError(
                    f"config.json: {key} = {h[key]!r}: llama.cpp runs {self.name} models only with {key} = {value!r}"
                )
        return h

    def _rename(self, h: dict[str, Any], given: Config) -> None:
        for usual, own in self.aliases.items():
            for key in (own,) if isinstance(own, str) else own:
                if key in given:
                    h[usual] = given[key]

    def _heads(self, h: dict[str, Any]) -> None:
        if isinstance(h["num_attention_heads"], list):  # one number for each layer: `dims` knows
            return
        h.setdefault("num_key_value_heads", h["num_attention_heads"])
        heads, kv = number(h, "num_attention_heads", int), h["num_key_value_heads"]
        if not isinstance(kv, list) and heads % number(h, "num_key_value_heads", int):
            raise UnsupportedError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}")
        if "head_dim" not in h and h["hidden_size"] % heads:
            raise UnsupportedError(
                f"config.json: hidden_size {h['hidden_size']} is not a multiple of num_attention_heads {heads}"
            )
        h["key_length"] = number(h, "head_dim", int) if "head_dim" in h else h["hidden_size"] // heads
        if h["key_length"] % 2 and self.rope_types:
            raise UnsupportedError(f"config.json: a head size of {h['key_length']} is odd; rotary embedding needs pairs")

    def _implied(self, h: Config) -> dict[str, Any]:
        return {k: v(h) if callable(v) else v for k, v in self.implied.items()}

    def state_implied(self, config: dict[str, Any]) -> None:
        """Add to a config.json that is made from GGUF what the graph implies. Raises UnsupportedError."""
        h = {**config}
        self._rename(h, config)
        if "num_attention_heads" in h:
            self._heads(h)
        config |= {k: v for k, v in self._implied(h).items() if v is not None}

    def sizes(self, h: Config, layer: int | None = None) -> dict[str, int]:
        """The dimensions that tensor shapes are written in, of a layer."""
        head, heads, kv = h.get("key_length", 0), h.get("num_attention_heads", 0), h.get("num_key_value_heads", 0)
        many = {"heads": heads, "kv_heads": kv, "q": heads * head if isinstance(heads, int) else 0}
        experts = next((h[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in h), 0)
        ff = h.get("intermediate_size", 0)
        usual = {
            "vocab": h["vocab_size"],
            "embd": h["hidden_size"],
            "ff": ff,
            "head": head,
            **many,
            "kv": kv * head if isinstance(kv, int) else 0,
            "experts": experts,
            "expert_ff": h.get("moe_intermediate_size", ff),
            "context": h.get("max_position_embeddings", 0),
        }
        return {**usual, **self.dims(h, layer)} if self.dims else usual

    # ---- tensors

    def ends(self, names: Iterable[str]) -> tuple[str | None, str | None]:
        """What a checkpoint calls its head and its embedding, which config.json can say to be one; None for what it has not."""
        pair = [f"{o.name}{o.suffix}" for o in (self._head, self.tensors["token_embd"].origins[0])]
        spelled = {c: n for n, c in canonical(names, {*pair, *self._some_names()}).items()}
        return spelled.get(pair[0]), spelled.get(pair[1])

    @property
    def _head(self) -> From:
        return next((o for t in self.tensors.values() if t.tied for o in t.origins), From("lm_head"))

    def _some_names(self) -> set[str]:
        """Names of the first block, which tell a checkpoint's prefix."""
        return {re.sub(r"\{\w+\}", "0", f"{o.name}{o.suffix}") for t in self.tensors.values() for o in t.origins}

    def weights(
        self,
        config: Config,
        tensors: Mapping[str, Shape],
        optional: Collection[str] = (),
        *,
        graph: bool = True,
    ) -> list[Weight]:
        """The tensors of the GGUF file: first the computed ones, then the checkpoint's, in the order of `tensors`.

        tensors: checkpoint name -> shape; optional: those that may be left out if the model has no place for them; graph: as
        in `hyperparameters`. Buffers, tied copies and the model's other parts are left out; experts that the checkpoint
        stores one by one are gathered. Raises ShapeError naming missing or unknown tensors and shapes that contradict the
        config.
        """
        h = self._with_nextn(self.hyperparameters(config, graph=graph), tensors)
        roles = self._roles(h, len(tensors))
        present = {n: s for n, s in tensors.items() if not self.skipped.search(n)}
        spelled = canonical(present, {o for role in roles for origins in role.spellings for o in origins.names})
        actual = {c: n for n, c in spelled.items()}
        used: set[str] = set()
        missing: list[str] = []
        at = {n: i for i, n in enumerate(tensors)}
        placed: list[tuple[int, Weight]] = []
        for role in roles:
            there = [o for o in role.spellings if all(n in actual for n in o.names)]
            fitting = (o for o in there if all(_fits(tensors[actual[n]], s) for n, s in o.shapes.items()))
            complete = next(fitting, there[0] if there else None)
            if complete is None:
                best = max(role.spellings, key=lambda o: sum(n in actual for n in o.names))
                lacking = [n for n in best.names if n not in actual]
                if role.tensor.optional and len(lacking) == len(set(best.names)):
                    continue
                missing += lacking
                continue
            for n, expected in complete.shapes.items():
                if not _fits(tensors[actual[n]], expected):
                    raise ShapeError(f"{actual[n]}: shape {list(tensors[actual[n]])}, but config.json makes it {list(expected)}")
            used.update(complete.names)
            pieces = tuple(replace(p, source=actual[p.source]) for p in complete.pieces)
            first = min(at[p.source] for p in pieces)
            placed.append((first, role.made_of(replace(complete, pieces=pieces))))
        self._check_unknown(h, [n for n in present if spelled.get(n) not in used and n not in optional])
        if missing:
            kinds = self._kinds_of(h, missing)
            if missing == [f"{self._head.name}{self._head.suffix}"]:
                kinds = "; where the head is the embedding, config.json has to say tie_word_embeddings = true"
                if self.hf[0] not in (config.get("architectures") or ()):  # saved without one
                    raise UnsupportedError(f"the checkpoint lacks {missing[0]}{kinds}")
            raise ShapeError(f"the checkpoint lacks tensors that config.json asks for: {_some(missing)}{kinds}")
        computed = [] if self.generated is None else list(self.generated(h))
        return computed + [w for _, w in sorted(placed, key=lambda f: f[0])]

    def _check_unknown(self, h: Config, unknown: list[str]) -> None:
        """Leave out tied copies, and the other parts of a model that has such, with a note. Raises ShapeError."""
        tied = {f"{o.name}.weight" for t in self.tensors.values() if t.tied and h.get(t.tied) for o in t.origins}
        tied |= {"lm_head.weight"} if h.get("tie_word_embeddings") else set()
        unknown = [n for n in unknown if not any(n == t or n.endswith(f".{t}") for t in tied)]
        if rating := [n for n in unknown if _RATING.search(n)]:
            logger.warning("a head that rates texts is left out: %s", _some(rating))
            unknown = [n for n in unknown if n not in rating]
        if self.others is not None:
            beside = [n for n in unknown if self.others.search(n)]
            if beside:
                parts = sorted({".".join(n.split(".")[:2]) for n in beside})
                logger.warning("only the text model is converted; left out: %s (%d tensors)", _some(parts), len(beside))
            unknown = [n for n in unknown if not self.others.search(n)]
        if meta := next((n for n in unknown if _META.search(n)), None):
            raise ShapeError(
                f"{meta}: the names that Meta and Mistral use in consolidated.safetensors; fetch the same model as transformers "
                "has it (model.safetensors, or model-00001-of-...)"
            )
        if unknown:
            raise ShapeError(f"the checkpoint has tensors that a {self.hf[0]} with this config.json has not: {_some(unknown)}")

    def _kinds_of(self, h: Config, names: list[str]) -> str:
        match = re.search(r"\.(\d+)\.", names[0])
        if match is None or self.layers is None:
            return ""
        kinds = self.layers(h)
        n = int(match[1])
        return f" (layer {n} is {', '.join(sorted(kinds[n]))})" if n < len(kinds) else ""

    def checkpoint(self, config: Config, tensors: Mapping[str, Shape], spelled: Collection[str] = ()) -> dict[str, Weight]:
        """The checkpoint's tensors by name, each as what it is made of in a GGUF file: the inverse of `weights`.

        config: what the checkpoint's config.json will be; tensors: GGUF name -> shape; spelled: names that are preferred
        where releases have several for one thing. Stacked experts come apart.
        Raises ShapeError naming missing or unknown tensors and shapes that contradict the config.
        """
        h = self.hyperparameters(config)
        if self.nextn is not None:
            last = max((int(m[1]) for n in tensors if (m := re.match(r"blk\.(\d+)\.", n))), default=0)
            h["nextn"] = max(0, last + 1 - h["num_hidden_layers"])
        roles = self._roles(h, len(tensors))
        computed = {w.name for w in self.generated(h)} | set(ROPE_FACTORS) if self.generated else set()
        names = {role.name for role in roles}
        if unknown := [n for n in tensors if n not in names and n not in computed]:
            raise ShapeError(f"a {self.hf[0]} has no place for the file's tensors {_some(unknown)}")
        if missing := [r.name for r in roles if r.name not in tensors and not r.tensor.optional]:
            raise ShapeError(f"the file lacks tensors that its metadata ask for: {_some(missing)}")
        order = {n: i for i, n in enumerate(tensors)}
        there = sorted((r for r in roles if r.name in tensors), key=lambda r: order[r.name])
        shapes: dict[str, Shape] = {}
        made = []
        for role in there:
            if tuple(tensors[role.name]) != role.shape:
                raise ShapeError(f"{role.name}: shape {list(tensors[role.name])}, but the metadata make it {list(role.shape)}")
            written = next((o for o in role.spellings if all(n in spelled for n in o.names)), role.spellings[0])
            shapes |= written.shapes
            made.append(role.made_of(written))
        return inverted(made, shapes)

    def _with_nextn(self, h: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        return h if self.nextn is None else {**h, "nextn": self.nextn(h, names)}

    def _roles(self, h: Config, n_tensors: int) -> list[Role]:
        """Every tensor of the GGUF file, with its spellings in a checkpoint."""
        trunk = h["num_hidden_layers"]
        layers = self.block_count(h) if self.block_count else trunk + h.get("nextn", 0)
        if layers > n_tensors:
            raise ShapeError(f"config.json: num_hidden_layers = {layers}, but the checkpoint has {n_tensors} tensors in all")
        kinds = self.layers(h) if self.layers else [()] * layers
        by_layer: dict[int | None, Sizes] = {None: self.sizes(h)}
        if self.dims is None:
            by_layer |= dict.fromkeys(range(layers), by_layer[None])
        else:
            by_layer |= {i: self.sizes(h, i) for i in range(layers)}
        roles = []
        for key, tensor in self.tensors.items():
            if (tensor.tied and h.get(tensor.tied)) or (tensor.when and not h.get(tensor.when)):
                continue
            if key == "token_embd" and h.get("tie_word_embeddings"):  # some save the one tensor under the head's name
                tensor = replace(tensor, also=(*tensor.also, self._head))
            stem = key.partition("@")[0]
            in_blocks = bool(tensor.where) or any("{bid}" in o.name for o in tensor.origins)
            for bid in range(layers) if in_blocks else [None]:
                if bid is not None and not names_kind(tensor.where, kinds[bid]):
                    continue
                s = by_layer[bid]
                name = stem.format(bid=bid) if "{bid}" in stem else stem if bid is None else f"blk.{bid}.{stem}"
                shape = tuple(size(d, s) for d in tensor.dims)
                roles.append(Role(tensor, name + tensor.suffix, shape, s, bid, trunk, False))
                if h.get(tensor.bias, False) if isinstance(tensor.bias, str) else tensor.bias:
                    roles.append(Role(tensor, f"{name}.bias", shape[:-1] or shape, s, bid, trunk, True))
        return roles

    # ---- metadata

    def metadata(
        self, config: Config, generation_config: Mapping[str, Any] | None = None, tensors: Collection[str] = ()
    ) -> dict[str, Any]:
        """GGUF's key-value pairs that follow from config.json, generation_config.json and which tensors there are.

        int: UINT32, float: FLOAT32, NumPy scalars: their own type. Tokenizer, file type and the
        model's name and licence are not among them.
        """
        h = self._with_nextn(self.hyperparameters(config), tensors)
        window = h.get("sliding_window")
        if not self.window and window and h.get("use_sliding_window", True) and window < h.get("max_position_embeddings", 0):
            logger.warning("config.json: llama.cpp's %s graph has no sliding_window (%s): it attends to all", self.name, window)
        keys: dict[str, Any] = {gguf.Keys.General.ARCHITECTURE: self.name}
        keys.update(sampling(generation_config or {}))
        for pattern, (key, kind) in self.metadata_keys.items():
            if kind is dict:
                keys.update({k.format(arch=self.name): v for k, v in rope_metadata(h[key]).items()})
            elif h.get(key) is not None:
                keys[pattern.format(arch=self.name)] = stated(h, key, kind)
        if h.get("nextn"):
            keys[gguf.Keys.LLM.BLOCK_COUNT.format(arch=self.name)] = h["num_hidden_layers"] + h["nextn"]
            keys[gguf.Keys.LLM.NEXTN_PREDICT_LAYERS.format(arch=self.name)] = h["nextn"]
        if self.computed is not None:
            keys.update({k.format(arch=self.name): v for k, v in self.computed(h).items()})
        if h.get("is_causal") is False:
            keys[gguf.Keys.Attention.CAUSAL.format(arch=self.name)] = False
        return keys


_META = re.compile(r"\blayers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.")
_RATING = re.compile(r"^(?:pretrained_model\.)?(?:v_head|value_head|reward_head|score|classifier)\.")
"""Heads that reinforcement learning adds beside the model's own; transformers ignores them."""


def _fits(shape: Shape, expected: Shape) -> bool:
    return [n for n in shape if n != 1] == [n for n in expected if n != 1]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check(given: Any) -> Sequence[Arch]:
    arches = given if isinstance(given, list | tuple) else [given]
    if not arches or not all(isinstance(a, Arch) for a in arches):
        raise UnsupportedError(f"{given!r} is no quantforge.archs.Arch")
    return arches


_registry: Registry[Sequence[Arch]] = Registry(
    __package__, "architecture", _check, marker="ARCH", names=lambda arches: (n for a in arches for n in a.hf)
)
register = _registry.register


def supported() -> dict[str, Arch]:
    """Every architecture by its name in config.json."""
    return {name: next(a for a in arches if name in a.hf) for name, arches in _registry.all().items()}


_CLASSIFIERS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|RewardModel")


def known(config: Config) -> Arch | None:
    """The architecture that config.json names, or None.

    Where it names none, or a model without its head, its model_type says what transformers' AutoModelForCausalLM takes.
    """
    given, every = config.get("architectures"), supported()
    names = [str(n) for n in given] if isinstance(given, list) else []
    if named := next((every[n] for n in names if n in every), None):
        return named
    kind = config.get("model_type")
    if names and not all(n.endswith("Model") and not _CLASSIFIERS.search(n) for n in names):
        return None
    fitting = [a for a in every.values() if kind and kind == (a.model_type or a.name)]
    return min(fitting, key=lambda a: a.hf[0].endswith("Model"), default=None)


def find(config: Config) -> Arch:
    """`known`. Raises UnsupportedError listing the supported ones."""
    if (arch := known(config)) is not None:
        return arch
    names, every = config.get("architectures"), supported()
    if not config:
        raise UnsupportedError("there is no config.json beside the weights, or an empty one: fetch the one that belongs to them")
    if not isinstance(names, list) or not names:
        raise UnsupportedError(f'config.json names no "architectures"; supported: {", ".join(sorted(every))}')
    if _CLASSIFIERS.search(str(names[0])):
        raise UnsupportedError(f"architecture {names[0]}: a model that rates texts; models that write them are read")
    raise UnsupportedError(
        f"architecture {names[0]} is not supported{nearest(str(names[0]), every)}; supported: {', '.join(sorted(every))}"
    )
