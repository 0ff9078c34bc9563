"""A model with an adapter merged into it while it is read: whatever a source can be used for works."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .. import archs, codecs
from ..archs import from_gguf
from ..archs.names import canonical
from ..archs.weight import Shape, Weight, rows_of
from ..arrays import F32
from ..codecs import Encoded
from ..codecs.plain import PlainCodec
from ..errors import QuantForgeError, RecipeError, ShapeError, UnsupportedError
from .adapters import Adapter, Update
from .base import Source, Stored, equal
from .low_rank import Change, Merged, changed
from .rows import decoded, read_rows

logger = logging.getLogger(__name__)

_KEPT = 4
"""Merged tensors whose factors are kept: rows are read in tiles, by a few threads."""
_SLAB = 1 << 22
"""Numbers that exist as f32 together where the lengths of a matrix's columns are summed up."""
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TIED = "tie_word_embeddings"

Given: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], float]"
"""An adapter: its directory, "DIR:SCALE", or both."""
Adapters: TypeAlias = "str | os.PathLike[str] | Sequence[Given]"
"""One adapter, or several in order."""


class Held(Source):
    """Tensors in memory, or an adapter's own."""

    def __init__(self, read: Callable[[str], Encoded]) -> None:
        self._read = read

    @property
    def total_bytes(self) -> int:
        """None of its own."""
        return 0

    def read(self, name: str) -> Encoded:
        """One of them."""
        return self._read(name)


class Names:
    """How the tensors that an adapter names lie in a model: as they are there, or through what both are made of in GGUF."""

    def __init__(self, source: Source, wanted: Iterable[str]) -> None:
        """wanted: names that are preferred where releases have several for one thing."""
        self.source, self.wanted = source, list(wanted)
        self.shapes = {n: s.shape for n, s in source.weights.items()}
        self.config = source.checkpoint_config()
        self.arch = self._arch()
        self.embedding, self.head = self._ends()

    def _arch(self) -> archs.Arch | None:
        if self.source.gguf_names:
            return from_gguf.find_arch(self.source.config, self.source.path, self.shapes)
        try:
            return archs.find(self.config)
        except UnsupportedError:
            return None

    def _ends(self) -> tuple[str, str]:
        """Names of the embedding and, where it is tied to that, of the head that is not stored; empty where there is none."""
        first, last = "token_embd.weight", "output.weight"
        if not self.source.gguf_names:
            known = self.arch.tensors["token_embd"].origins[0] if self.arch else None
            first = f"{known.name}{known.suffix}" if known else "model.embed_tokens.weight"
            tied = (o for t in self.arch.tensors.values() if t.tied for o in t.origins) if self.arch else iter(())
            last = f"{getattr(next(tied, None), 'name', 'lm_head')}.weight"
            spelled = {c: n for n, c in canonical(self.shapes, {first, last, *self.wanted}).items()}
            outer = spelled.get(first, first).removesuffix(first) if spelled.get(first, first).endswith(first) else ""
            first, last = spelled.get(first, first), spelled.get(last, outer + last)
        text = self.config.get("text_config") or {}
        default = self.arch.defaults.get(_TIED) if self.arch else None
        one = {**self.config, **text}.get(_TIED, default) and last not in self.shapes and first in self.shapes
        headless = self.arch is not None and not any(t.tied for t in self.arch.tensors.values())
        return (first if first in self.shapes else ""), (last if one and not headless else "")

    @cached_property
    def direct(self) -> dict[str, str]:
        """An adapter's name -> the model's tensor of that name."""
        if self.source.gguf_names:
            return {}
        return canonical(self.wanted, {*self.shapes, *filter(None, [self.head])})

    # ---- through GGUF's names

    @cached_property
    def _gguf(self) -> tuple[dict[str, Shape], dict[str, Weight]]:
        """GGUF's tensors, and what each is made of in this model, where that is a checkpoint."""
        shapes = {**self.shapes, **({self.head: self.shapes[self.embedding]} if self._two else {})}
        if self.source.gguf_names:
            return shapes, {}
        if self.arch is None:
            raise UnsupportedError("its architecture is not known here")
        others = self.arch.others  # parts of the model that its GGUF leaves out
        text = {n: s for n, s in shapes.items() if others is None or not others.search(n)}
        made = {w.name: w for w in self.arch.weights(self._settings, text, self.source.optional, graph=False)}
        return {n: w.shape for n, w in made.items()}, made

    @cached_property
    def _two(self) -> bool:
        """Does the adapter name a head that the model has not by itself?"""
        return bool(self.head) and any(n.endswith((self.head, "lm_head.weight")) for n in self.wanted)

    @property
    def _settings(self) -> dict[str, Any]:
        if not self._two:
            return self.config
        text = self.config.get("text_config")
        return {**self.config, _TIED: False} | ({"text_config": {**text, _TIED: False}} if isinstance(text, Mapping) else {})

    @cached_property
    def spelled(self) -> dict[str, Shape]:
        """The model's tensors as the adapter calls them, but for the root of all names, with their shapes."""
        assert self.arch is not None
        made = self.arch.checkpoint(self._settings, self._gguf[0])
        roots = {"": ""} | _roots(canonical(self.shapes, made)) | _roots(canonical(self.wanted, made))
        wanted = [own + n.removeprefix(theirs) for n in self.wanted for theirs, own in roots.items() if n.startswith(theirs)]
        made = self.arch.checkpoint(self._settings, self._gguf[0], wanted)
        return {n: w.shape for n, w in made.items()}

    @cached_property
    def to_gguf(self) -> dict[str, Weight]:
        """What each of GGUF's tensors is made of, in the adapter's names."""
        assert self.arch is not None
        weights = self.arch.weights(self._settings, self.spelled, graph=False)
        return {w.name: w for w in weights if w.pieces}

    @cached_property
    def from_gguf(self) -> dict[str, Weight]:
        """What each of the model's tensors is made of in GGUF."""
        if self.source.gguf_names:
            return {n: Weight.of(n, s) for n, s in self._gguf[0].items()}
        assert self.arch is not None
        made = self.arch.checkpoint(self._settings, self._gguf[0], list(self.shapes))
        actual = {c: n for n, c in canonical(self.shapes, made).items()}
        return {actual[n]: w for n, w in made.items() if n in actual}

    @property
    def gguf_shapes(self) -> dict[str, Shape]:
        """Of GGUF's tensors."""
        return self._gguf[0]

    def called(self) -> dict[str, str]:
        """An adapter's name -> that of `spelled`."""
        return canonical(self.wanted, self.spelled)

    def fail(self, adapter: Adapter, what: str) -> ShapeError:
        """What is said of an adapter that is another model's."""
        return ShapeError(f"{adapter.path}: {what}; it is an adapter of {adapter.base}: is {self.source.path} that model?")

    def crosswise(self, name: str) -> bool | None:
        """Does the model have a tensor of its own with inputs before outputs? None: its architecture does not say."""
        try:
            made = self._gguf[1].values()
        except QuantForgeError:
            return None
        return _crosswise(name, made)


def _roots(called: Mapping[str, str]) -> dict[str, str]:
    """What names begin with, and what the same names begin with elsewhere."""
    roots = {}
    for theirs, own in called.items():
        n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(theirs), reversed(own), strict=False)))
        roots[theirs[: len(theirs) - n]] = own[: len(own) - n]
    return roots


def _crosswise(name: str, made: Iterable[Weight]) -> bool:
    """Is all that GGUF has of a tensor transposed there?"""
    pieces = [p for w in made for p in w.pieces if p.source == name]
    return bool(pieces) and all(p.groups for p in pieces)


class Route:
    """What an adapter makes of GGUF's tensors, for those updates whose tensors the model has in another form."""

    def __init__(self, adapter: Adapter, names: Names, updates: Iterable[Update]) -> None:
        """Raises ShapeError, UnsupportedError where they are not of this model."""
        self.adapter, self.names = adapter, names
        updates = list(updates)
        try:
            called = names.called() if names.arch is not None else {}
        except QuantForgeError as e:
            raise names.fail(
                adapter, f"it changes {updates[0].name}, which the model has in no form that is known ({e})"
            ) from None
        unknown = [u.name for u in updates if u.name not in called]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise names.fail(adapter, f"it changes {unknown[0]}{more}, which the model has not")
        self.updates = {called[u.name]: u for u in updates}
        """By the names of `Names.spelled`."""
        self.touched = {g: w for g, w in names.to_gguf.items() if any(s in self.updates for s in w.sources)}
        """GGUF's tensors that are made of those, and of what."""
        self._crosswise = {t for t in self.updates if _crosswise(t, self.touched.values())}
        adapter.orient({u.name: names.spelled[t] for t, u in self.updates.items()})
        for t, u in self.updates.items():
            if u.low_rank:
                adapter.check(u, names.spelled[t], t in self._crosswise)
        self.change = lru_cache(maxsize=_KEPT)(self._change)

    def _change(self, g: str) -> Change:
        """What is added to a tensor of GGUF."""
        w, spelled = self.touched[g], self.names.spelled
        mine = {t: self.updates[t] for t in w.sources if t in self.updates and self.updates[t].low_rank}
        changes = {t: self.adapter.change(u, spelled[t], t in self._crosswise) for t, u in mine.items()}
        return changed(w, changes, spelled) or Change.none(rows_of(w.shape), w.shape[-1])


@dataclass(slots=True)
class _Edit:
    """What becomes of one of the model's tensors."""

    below: str
    """The tensor that it is now."""
    replacement: Weight | None = None
    """It is made of these of the adapter's tensors."""
    change: Callable[[], Change] | None = None
    added: Callable[[], F32] | None = None
    tokens: tuple[tuple[int, ...], str] | None = None


class MergedSource(Source):
    """See the module. Close it to close the model and the adapter."""

    def __init__(self, inner: Source, adapter: Adapter) -> None:
        """Raises ShapeError, UnsupportedError, FormatError where the adapter is not one of this model."""
        if adapter.config.get("alora_invocation_tokens"):
            raise UnsupportedError(
                f"{adapter.path}: an aLoRA, which works from its invocation tokens on: it cannot be merged; convert it by itself "
                f"for llama.cpp: quantforge convert {adapter.path} OUT.gguf --base {inner.path}"
            )
        self.inner, self.adapter = inner, adapter
        self.path, self.format, self.gguf_names, self.optional = inner.path, inner.format, inner.gguf_names, inner.optional
        self.adapters = (*inner.adapters, adapter.path)
        self._names = Names(inner, adapter.updates)
        self._check_base()
        self._edits: dict[str, _Edit] = {}
        self._match()
        self._tie()
        self.weights = self._weights()
        self.config = self._config()
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Encoded] = OrderedDict()

    @property
    def tokenizer_directory(self) -> Path:
        """The adapter's, if it brings a tokenizer."""
        own = any((self.adapter.path / n).is_file() for n in _TOKENIZER)
        return self.adapter.path if own and not self.gguf_names else self.inner.tokenizer_directory

    @property
    def directory(self) -> Path:
        """Where files beside the model's weights are."""
        return self.inner.directory

    @property
    def total_bytes(self) -> int:
        """Size on disk of the model's weight files."""
        return self.inner.total_bytes

    def checkpoint_config(self) -> dict[str, Any]:
        """config.json of the model as a checkpoint, with the adapter."""
        if not self.gguf_names:
            return super().checkpoint_config()
        config = self.inner.checkpoint_config()
        return config | ({_TIED: False} if self._names.head in self.weights else {})

    def read(self, name: str) -> Encoded:
        """The tensor as it is with the adapter; rows are computed when they are decoded."""
        if name not in self._edits:
            return self.inner.read(name)
        with self._lock:
            e = self._made.get(name)
            if e is None:
                e = self._made[name] = self._edited(name, self._edits[name])
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
        return e

    def release(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        edit = self._edits.get(name)
        with self._lock:
            self._made.pop(name, None)
        self.inner.release(name if edit is None else edit.below)

    def close(self) -> None:
        """Unmap the files."""
        self.adapter.close()
        self.inner.close()

    # ---- what becomes of a tensor

    def _edited(self, name: str, edit: _Edit) -> Encoded:
        e = self.inner.read(edit.below) if edit.replacement is None else self._replaced(edit.replacement)
        if edit.added is not None:
            w = e.decode() + edit.added().reshape(e.shape)
            plain = codecs.get("F32")
            e = Encoded(plain, e.shape, plain.encode(w))
        if edit.change is None and edit.tokens is None:
            return e
        tokens = None if edit.tokens is None else self._tokens(name, e.shape, *edit.tokens)
        change = None if edit.change is None else edit.change()
        factors = None
        if change is not None and change.lengths is not None:
            without = replace(change, lengths=None)
            factors = _factors(Merged(e.codec, without, tokens=tokens).over(e), change.lengths)
        return Merged(e.codec, change, factors, tokens).over(e)

    def _replaced(self, made: Weight) -> Encoded:
        numbers = read_rows(Held(self.adapter.read), made)
        if isinstance(numbers, Encoded):
            return Encoded(numbers.codec, made.shape, {k: p.reshape(*made.shape[:-1], -1) for k, p in numbers.parts.items()})
        plain = codecs.get("F32")
        return Encoded(plain, made.shape, plain.encode(numbers.reshape(made.shape)))

    def _tokens(self, name: str, shape: Shape, indices: tuple[int, ...], key: str) -> tuple[Any, F32]:
        rows = self.adapter.finite(key).astype(np.float32)
        if rows.shape != (len(indices), shape[-1]) or max(indices) >= shape[0]:
            raise ShapeError(f"{self.adapter.path}: {key} {list(rows.shape)} does not fit {name} {list(shape)}")
        order = np.argsort(indices)
        return np.array(indices)[order], rows[order]

    # ---- matching names

    def _check_base(self) -> None:
        """Raise UnsupportedError where the adapter names another architecture."""
        said = self.adapter.base_class
        named = self._names.config.get("architectures") or []
        known = archs.supported()
        if said in known and named and said not in named and known[said] is not self._names.arch:
            raise UnsupportedError(
                f"{self.adapter.path}: an adapter of a {said} ({self.adapter.base}); {self.path} is a {named[0]}"
            )

    def _match(self) -> None:
        """Fill `_edits`."""
        names, rest = self._names, list[Update]()
        self.adapter.orient({t: names.shapes[self._below(x)] for t, x in names.direct.items()})
        for t, u in self.adapter.updates.items():
            x = names.direct.get(t)
            if x is None:
                rest.append(u)
            else:
                self._edit_directly(x, u)
        if rest:
            self._edit_through_gguf(rest)

    def _below(self, x: str) -> str:
        return self._names.embedding if x == self._names.head else x

    def _edit(self, x: str) -> _Edit:
        return self._edits.setdefault(x, _Edit(self._below(x)))

    def _edit_directly(self, x: str, u: Update) -> None:
        """A tensor that model and adapter have in the same form."""
        names, edit = self._names, self._edit(x)
        shape = names.shapes[edit.below]
        if u.replaced is not None:
            now = self.adapter.shape(u.replaced)
            if (now != shape and not (x in (names.embedding, names.head) or self._is_head(x))) or now[1:] != shape[1:]:
                raise self._names.fail(self.adapter, f"{u.replaced} is {list(now)}, {x} of the model {list(shape)}")
            edit.replacement, shape = Weight.of(x, now, u.replaced), now
            self._warn_of_scale(u)
        if u.low_rank:
            across = names.crosswise(x)
            across = bool(self.adapter.config.get("fan_in_fan_out")) if across is None else across
            self.adapter.check(u, shape, across)
            edit.change = lambda: self.adapter.change(u, shape, across)
        if u.added is not None:
            edit.added = lambda: self._vector(u)
        if u.tokens is not None:
            self._tokens(x, shape, u.indices, u.tokens)
            edit.tokens = (u.indices, u.tokens)

    def _is_head(self, x: str) -> bool:
        ends = self._names.arch.ends(self._names.shapes) if self._names.arch and not self.gguf_names else None
        return ends is not None and x in ends

    def _vector(self, u: Update) -> F32:
        assert u.added is not None
        return self.adapter.finite(u.added).astype(np.float32) * np.float32(u.scaling * self.adapter.scale)

    def _warn_of_scale(self, u: Update) -> None:
        if self.adapter.scale != 1:
            logger.warning("%s: %s is taken as it is: the scale weighs changes of low rank", self.adapter.path, u.replaced)

    def _edit_through_gguf(self, rest: list[Update]) -> None:
        """Tensors that the model has in another form: fused, split, or as GGUF has them."""
        route = Route(self.adapter, self._names, rest)
        for x, w in self._names.from_gguf.items():
            if any(s in route.touched for s in w.sources):
                self._edit_made(x, w, route)

    def _edit_made(self, x: str, w: Weight, route: Route) -> None:
        touched, updates = route.touched, route.updates
        used = {t: updates[t] for g in w.sources if g in touched for t in touched[g].sources if t in updates}
        whole = [u for u in used.values() if u.replaced is not None or u.added is not None or u.tokens is not None]
        edit = self._edit(x)
        if any(u.low_rank for u in used.values()):
            inside = tuple(g for g in w.sources if g in touched)
            shapes = self._names.gguf_shapes
            edit.change = lambda: _some(changed(w, {g: route.change(g) for g in inside}, shapes))
        if not whole:
            return
        made = touched[w.sources[0]]
        if not w.plain:
            raise UnsupportedError(f"{self.adapter.path}: {whole[0].name} is stored whole, but the model has it in {x}")
        replaced = {t: u.replaced for t, u in used.items() if u.replaced is not None}
        if replaced:
            if set(replaced) != set(made.sources):
                raise UnsupportedError(f"{self.adapter.path}: {whole[0].name} replaces a part of the model's {x}")
            for t, key in replaced.items():
                if self.adapter.shape(str(key)) != self._names.spelled[t]:
                    raise self._names.fail(
                        self.adapter,
                        f"{key} is {list(self.adapter.shape(str(key)))}, here {list(self._names.spelled[t])}: a GGUF file's "
                        "vocabulary does not grow; merge into the checkpoint",
                    )
            edit.replacement = replace(made, pieces=tuple(replace(p, source=str(replaced[p.source])) for p in made.pieces))
            self._warn_of_scale(whole[0])
        if any(u.added is not None for u in whole):
            edit.added = lambda: self._added_in(made, used)
        for u in whole:
            if u.tokens is not None:
                if not made.plain:
                    raise UnsupportedError(f"{self.adapter.path}: {u.tokens}: the model's {x} has its rows in another order")
                self._tokens(x, made.shape, u.indices, u.tokens)
                edit.tokens = (u.indices, u.tokens)

    def _added_in(self, made: Weight, used: Mapping[str, Update]) -> F32:
        if made.value is not None:
            raise UnsupportedError(f"{made.name}: its numbers are other ones in the model")
        plain = codecs.get("F32")

        def read(t: str) -> Encoded:
            u = used.get(t)
            w = np.zeros(self._names.spelled[t], np.float32) if u is None or u.added is None else self._vector(u)
            return Encoded(plain, w.shape, plain.encode(w))

        return decoded(read_rows(Held(read), made))

    # ---- head and embedding that are one

    def _tie(self) -> None:
        """Where the model's head is its embedding: both change, as long as the adapter does not make two of them.

        A part of the embedding that stands in the adapter is the base of both; a module trained by itself, or a change of
        low rank, is what only the module that it is in runs with.
        """
        names = self._names
        if not names.head:
            return
        first, last = self._edits.get(names.embedding), self._edits.get(names.head)
        if first is None and last is None:
            return
        first, last = first or _Edit(names.embedding), last or _Edit(names.embedding)
        own = {id(e): self._own(e) for e in (first, last)}
        for here, there in ((first, last), (last, first)):
            resized = here.replacement is not None and here.replacement.shape != names.shapes[names.embedding]
            if here.replacement is not None and there.replacement is None and (not own[id(here)] or resized):
                there.replacement = here.replacement
            if here.tokens is not None and there.tokens is None:
                there.tokens = here.tokens
        self._edits |= {names.embedding: first, names.head: last}
        if self._same(first, last):
            del self._edits[names.head]
        else:
            logger.warning(
                "%s: the model's head is its embedding, and the adapter changes one of them, or both in different ways: "
                "they are two from now on, as they were in training%s",
                self.adapter.path,
                " (PEFT's merge_and_unload adds all low-rank changes to both)" if first.change or last.change else "",
            )

    def _same(self, x: _Edit, y: _Edit) -> bool:
        """Do both make the same of the embedding?"""
        wholes = [None if e.replacement is None else self._replaced(e.replacement) for e in (x, y)]
        changes = [None if e.change is None else e.change() for e in (x, y)]
        if x.tokens != y.tokens or wholes.count(None) == 1 or changes.count(None) == 1:
            return False
        pairs: list[tuple[Any, Any]] = []
        if wholes[0] is not None and wholes[1] is not None:
            if wholes[0].codec is not wholes[1].codec:
                return False
            pairs.append((wholes[0].parts["data"], wholes[1].parts["data"]))
        if changes[0] is not None and changes[1] is not None:
            if any(c.lengths is not None or c.magnitude is not None for c in changes if c):
                return False
            pairs += [(getattr(changes[0], k), getattr(changes[1], k)) for k in ("a", "b", "scale")]
        return all(a.shape == b.shape and equal(a, b) for a, b in pairs)

    def _own(self, edit: _Edit) -> bool:
        return edit.replacement is not None and any(
            u.own for u in self.adapter.updates.values() if u.replaced in edit.replacement.sources
        )

    # ---- what the model is then

    def _weights(self) -> dict[str, Stored]:
        weights = dict(self.inner.weights)
        for x, edit in self._edits.items():
            below = self.inner.weights[edit.below]
            shape = below.shape if edit.replacement is None else edit.replacement.shape
            codec = below.codec
            if not isinstance(codec, PlainCodec):  # floats are what they were; numbers of anything else are new ones
                codec = (
                    Merged(codec) if edit.change or edit.tokens or edit.added or edit.replacement is None else codecs.get("BF16")
                )
            weights[x] = Stored(codec, shape)
        return weights

    def _config(self) -> Mapping[str, Any]:
        names, config = self._names, dict(self.inner.config)
        if self.gguf_names:
            return config
        said: dict[str, Any] = {_TIED: False} if names.head in self.weights else {}
        before, now = (s.weights.get(names.embedding) for s in (self.inner, self))
        if before and now and before.shape[0] != now.shape[0]:
            said["vocab_size"] = now.shape[0]
            logger.warning("%s: the vocabulary grows from %d to %d", self.adapter.path, before.shape[0], now.shape[0])
        text = config.get("text_config")
        if isinstance(text, Mapping) and said:
            config["text_config"] = {**text, **said}
            said = {k: v for k, v in said.items() if k in config or k == _TIED}
        return {**config, **said}


def _some(change: Change | None) -> Change:
    assert change is not None
    return change


def _factors(e: Encoded, lengths: F32) -> F32:
    """What each column is multiplied with, to have that length: f32[in]; some rows at a time where they can be had."""
    step = max(1, _SLAB // max(1, e.shape[-1]))
    squares = np.zeros(e.shape[-1])
    for a in range(0, rows_of(e.shape), step) if e.codec.sliceable else [0]:
        w = (e.flat().rows(slice(a, a + step)) if e.codec.sliceable else e).decode().reshape(-1, e.shape[-1])
        squares += np.einsum("ij,ij->j", w, w, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (lengths / np.sqrt(squares)).astype(np.float32)


def merged(source: Source, adapters: Adapters = ()) -> Source:
    """A model with adapters merged into it, one after another.

    What is computed is f32: w + scaling · B A, and for DoRA the magnitudes on top; nothing is held but the factors of a few
    tensors. Raises FormatError, UnsupportedError, ShapeError naming the adapter, having closed the model.
    """
    try:
        for given in [adapters] if isinstance(adapters, str | os.PathLike) else adapters:
            path, scale = given if isinstance(given, tuple) else _spelled(given)
            if not math.isfinite(scale):
                raise RecipeError(f"--lora {path}: a scale of {scale:g}")
            adapter = Adapter.open(path, scale)
            try:
                source = MergedSource(source, adapter)
            except BaseException:
                adapter.close()
                raise
    except BaseException:
        source.close()
        raise
    return source


def _spelled(given: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], float]:
    """A directory and a scale from "DIR:SCALE", or a directory alone."""
    head, colon, tail = os.fspath(given).rpartition(":")
    if not colon or not head or Path(given).expanduser().exists():
        return given, 1.0
    try:
        return head, float(tail)
    except ValueError:
        return given, 1.0
