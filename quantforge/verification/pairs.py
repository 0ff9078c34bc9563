"""Which tensor of a converted model is made of what, and how its columns or rows may have been scaled on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from .. import archs, codecs, layouts
from ..archs import Arch, from_gguf
from ..archs.weight import Value, Weight
from ..arrays import F32
from ..calibration.importance import Importance
from ..codecs import Codec, repacks
from ..conversion.contents import RECIPE, matched
from ..conversion.plan import Plan, PlannedTensor, importance_of
from ..errors import QuantForgeError, UnsupportedError
from ..formats import Header, Source, Stored, get
from ..formats.rows import codec_of, decoded, read_rows

HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True, slots=True)
class Pairs:
    """The tensors of one model as made of another's."""

    plan: Plan
    """As if the model was to be converted to these types: `tensors` are those of both models."""
    missing: Sequence[str]
    """Tensors that should be there and are not."""
    extra: Sequence[str]
    """Tensors that nothing is known of."""
    groups: Sequence[ScaleGroup] = ()


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Matrices whose columns can be scaled, because what feeds them can undo it; of one block, by the names in the file."""

    source: PlannedTensor
    targets: Sequence[PlannedTensor]
    beside: Sequence[PlannedTensor] = ()
    """The source's bias."""
    repeat: int = 1
    """How many heads of the targets' input one head of the source feeds."""
    heads: int = 1
    to_gguf: Value | None = None
    """How the numbers of a norm become those that multiply."""

    @property
    def all(self) -> tuple[PlannedTensor, ...]:
        """Every tensor of it."""
        return (self.source, *self.beside, *self.targets)

    def factors(self, model: Source, out: Source) -> F32 | None:
        """What a norm lost, and its matrices' columns have to have gained: f32[in]; None where that is no scale."""
        w, d = decoded(read_rows(model, self.source.weight)).reshape(-1), out.read(self.source.name).decode().reshape(-1)
        if self.to_gguf is not None:
            w, d = self.to_gguf.forward(w), self.to_gguf.forward(d)
        with np.errstate(divide="ignore", invalid="ignore"):
            s = np.where((w == 0) & (d == 0), np.float32(1), w / d)
        return s.astype(np.float32) if np.isfinite(s).all() and (s > 0).all() else None

    def spread(self, s: F32) -> F32:
        """Factors of the source's rows as the targets' columns have them: heads of values repeated."""
        if self.repeat == 1:
            return s
        return np.repeat(s.reshape(self.heads, -1), self.repeat, axis=0).reshape(-1)


def pair(out: Source, model: Source, importance: Importance | None = None) -> Pairs:
    """Match the tensors of `out` with those of `model` that they are made of.

    Raises FormatError, ShapeError, UnsupportedError, CalibrationError.
    """
    target = get(out.format)
    weights, outputs, _ = matched(model, target)
    made = _as_named(out, model, outputs) if not out.gguf_names and not model.gguf_names else _flat(outputs)
    head, embedding = _ends(out)
    if head in out.weights and head not in made and embedding in made:
        made[head] = replace(made[embedding], name=HEAD)  # tied in the model, stored once more here
    tensors = [
        PlannedTensor(name, made[name], stored.codec, codec_of(model, made[name]), via=_via(out, stored))
        for name, stored in out.weights.items()
        if name in made
    ]
    layout = None
    with suppress(UnsupportedError):
        layout = layouts.find(out.config.get("quantization_config") or {})
    if layout is not None:
        shared = layout.sharing({t.name.removesuffix(".weight"): t.codec for t in tensors})
        mates = {f"{m}.weight": tuple(f"{n}.weight" for n in group) for group in shared for m in group}
        tensors = [replace(t, mates=mates.get(t.name, ())) for t in tensors]
    missing = [n for n in made if n not in out.weights]
    tied = out.gguf_names or out.config.get("tie_word_embeddings")
    for t in [t for t in tensors if t.name == embedding and tied]:
        for n in [n for n in missing if made[n].name == HEAD]:  # it is said to be the embedding: that is what has to fit
            tensors.append(replace(t, weight=made[n]))
            missing.remove(n)
    extra = [n for n in out.weights if n not in made and n not in out.optional]
    job = Plan(model, target, Header({}, {}), tensors, importance_of(importance, weights, outputs), "")
    return Pairs(job, missing, extra, _scale_groups(out, model, weights, tensors))


def _ends(out: Source) -> tuple[str, str]:
    """Names of the head and the embedding in the file; GGUF's where it is not known which they are."""
    arch = None if out.gguf_names else _arch(out)
    head, embedding = arch.ends(out.weights) if arch is not None else (None, None)
    return head or HEAD, embedding or next((n for n in out.weights if n.endswith("embed_tokens.weight")), EMBEDDING)


def _via(out: Source, stored: Stored) -> Codec | None:
    """The type whose integers a tensor holds in another one, because the format has no place for it: int4-g128 in Q4_0."""
    recipe = str(out.config.get(RECIPE, ""))
    with suppress(UnsupportedError):
        codec = codecs.get(recipe) if recipe else stored.codec
        if not get(out.format).holds(codec) and repacks(codec, stored.codec, stored.shape):
            return codec
    return None


def _flat(outputs: Mapping[str, Sequence[tuple[str, Weight]]]) -> dict[str, Weight]:
    return {name: w for some in outputs.values() for name, w in some}


def _as_named(out: Source, model: Source, outputs: Mapping[str, Sequence[tuple[str, Weight]]]) -> dict[str, Weight]:
    """Checkpoint against checkpoint, which may spell prefixes in different ways: by GGUF's names."""
    made = _flat(outputs)
    if set(made) == set(out.weights):
        return made
    with suppress(QuantForgeError):  # where tensors are missing, they are by the model's names
        _, own, _ = matched(out, get(out.format))
        renamed = {}
        for name, mine in own.items():
            theirs = outputs.get(name, ())
            if len(mine) == len(theirs):
                renamed.update({n: w for (n, _), (_, w) in zip(mine, theirs, strict=True)})
        known = {id(w) for w in renamed.values()}
        return {**renamed, **{n: w for n, w in made.items() if id(w) not in known}}
    return made


def _arch(source: Source) -> Arch | None:
    with suppress(UnsupportedError):
        if not source.gguf_names:
            return archs.find(source.checkpoint_config())
        return from_gguf.find_arch(source.config, source.path, {k: s.shape for k, s in source.weights.items()})
    return None


def _scale_groups(out: Source, model: Source, weights: Sequence[Weight], tensors: Sequence[PlannedTensor]) -> list[ScaleGroup]:
    arch = _arch(model)
    if arch is None:
        return []
    with suppress(UnsupportedError):
        heads = arch.hyperparameters(model.checkpoint_config(), graph=False).get("num_key_value_heads", 1)
        values = {} if out.gguf_names else {w.name: w.value for w in weights}
        by_name = {t.weight.name: t for t in tensors if not t.weight.experts}
        groups = []
        for layer in sorted({t.weight.layer for t in tensors if t.weight.layer is not None}):
            for g in arch.scale_groups:
                source = by_name.get(f"blk.{layer}.{g.source}.weight")
                named = [by_name.get(f"blk.{layer}.{role}.weight") for role in g.targets]
                targets = [t for t in named if t is not None and len(t.shape) == 2]
                if source is None or not targets:
                    continue
                rows, n = source.shape[0], targets[0].shape[1]
                bias = by_name.get(f"blk.{layer}.{g.source}.bias")
                value = source.weight.value.inverse if source.weight.value and not out.gguf_names else None
                if n % rows == 0 and isinstance(heads, int) and rows % heads == 0:
                    value = value or values.get(source.weight.name)
                    groups.append(ScaleGroup(source, targets, [bias] if bias else [], n // rows, heads, value))
        return groups
    return []
