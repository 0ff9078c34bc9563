"""Verify a converted model: what is looked at, and in which order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..archs.from_gguf import check_is_model
from ..arrays import F32
from ..calibration.corpus import HELD_OUT, Stages
from ..calibration.importance import Importance
from ..calibration.importance import read as read_importance
from ..codecs import Codec
from ..conversion.contents import IMATRIX_DIGEST, METHOD, SOURCE_DIGEST, SOURCE_NAME, VERSION, settings
from ..conversion.plan import PlannedTensor
from ..conversion.tiles import Tiles
from ..errors import QuantForgeError, RecipeError, UnsupportedError
from ..formats import Source
from ..formats.rows import decoded, read_rows
from ..tokenizer import Tokenizer
from .pairs import Pairs, ScaleGroup, pair
from .report import Check, TensorCheck, Verification
from .tensors import Comparer, Sums, compared

_TEXT = "The quick brown fox jumps over 12,345 lazy dogs.\n\n\tdef f(x): return x**2  # naïve café, 模型, Привет, 😀\n"
_SCALED = "scaled, and what feeds it the other way round"
_SHOWN = 3
"""Names in a line of the table."""


def verify(
    out: str | Path,
    against: str | Path | None = None,
    *,
    derived_from: str | Path | None = None,
    fast: bool = False,
    importance: str | Path | Importance | None = None,
    threads: int | None = None,
    progress: Stages | None = None,
) -> Verification:
    """Is a converted model what it should be?

    - out: the model that was made; anything `quantforge.open` reads.
    - against: the model that it was made of: every tensor is there, of the right shape, finite, and as near as its type
      allows; settings and tokenizer are the same; so are, but for rounding, the logits of a few tokens.
    - derived_from: are all tensors, bit by bit, what plain rounding makes of this model? So they are in what `convert`
      without --method and llama-quantize write.
    - fast: no logits, which need torch.
    - importance: the imatrix that `out` was made with; without it other choices of codes are judged by their error alone.
    - threads: all CPUs by default.
    - progress: called with (what, done, of).

    What is wrong, or cannot be told, is in the result; nothing is raised for it. Raises RecipeError where nothing is given to
    compare with.
    """
    if against is None and derived_from is None:
        raise RecipeError("nothing to verify against: give the model that it was made of (--against, --derived-from)")
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    against, derived_from = (None if p is None else Path(p) for p in (against, derived_from))
    named = [None if p is None else str(p) for p in (against, derived_from)]

    def verification(checks: Sequence[Check], tensors: Sequence[TensorCheck] = ()) -> Verification:
        return Verification(str(out), named[0], named[1], checks, tensors)

    try:
        imatrix = read_importance(importance) if isinstance(importance, str | Path) else importance
    except QuantForgeError as e:
        return verification([Check("imatrix", "unknown", str(e))])
    try:
        made = formats.open_path(out)
        if made.gguf_names:
            check_is_model(made.config, Path(out), whole=False)
    except QuantForgeError as e:
        return verification([Check("structure", "differs", str(e))])
    run = _Run(threads, progress or (lambda what, done, of: None), imatrix)
    with made:
        bases = dict.fromkeys(p for p in (against, derived_from) if p is not None)
        for path in bases:
            try:
                model = formats.open_path(path)
            except QuantForgeError as e:
                run.checks.append(Check("reference", "unknown", str(e)))
                continue
            with model:
                run.tensors_of(made, model, exact=path == derived_from, near=path == against)
                if path == against:
                    run.settings_of(made, model)
                    run.tokenizer_of(made, model)
                    if not fast:
                        run.logits_of(made, model)
                    run.provenance_of(made, model)
        return verification(run.checks, run.tensors)


class _Run:
    """The checks of one verification, in order."""

    def __init__(self, threads: int, tell: Stages, imatrix: Importance | None) -> None:
        self.threads, self.tell, self.imatrix = threads, tell, imatrix
        self.checks: list[Check] = []
        self.tensors: list[TensorCheck] = []
        self._pairs: Pairs | None = None

    def tensors_of(self, out: Source, model: Source, *, exact: bool, near: bool) -> None:
        """Names, shapes and numbers. exact: are the bytes those of plain rounding; near: as near as types allow?"""
        try:
            pairs = pair(out, model, self.imatrix)
        except QuantForgeError as e:
            self.checks.append(Check("structure", "unknown", str(e)))
            return
        odd = [t for t in pairs.plan.tensors if out.weights[t.name].shape != t.shape]
        faults = [*(f"{n} is missing" for n in pairs.missing), *(f"{n} is not of the model" for n in pairs.extra)]
        faults += [f"{t.name} is {list(out.weights[t.name].shape)}, it should be {list(t.shape)}" for t in odd]
        types = dict.fromkeys(s.codec.name for s in out.weights.values())
        said = _few(faults) if faults else f"{len(out.weights)} tensors of {', '.join(types)}"
        self.checks.append(Check("structure", "differs" if faults else "ok", said))
        fitting = [t for t in pairs.plan.tensors if t not in odd]
        comparer = Comparer(Tiles(pairs.plan, None), out)
        compared = self._compare(comparer, [(t, None, None) for t in fitting])
        if near:
            self._pairs = pairs
            self._explain(pairs, comparer, out, model, compared)
            self.tensors = list(compared.values())
            wrong = [t for t in self.tensors if t.status == "differs"]
            self.checks.append(_near(self.tensors, wrong))
        if exact:
            self.checks.append(self._exact(list(compared.values()), out))
        if not near:
            self.tensors = [
                TensorCheck(t.name, t.type, t.shape, "ok" if t.equal else "differs", "", t.equal, t.error, t.rounding_error)
                for t in compared.values()
            ]

    def _compare(
        self, comparer: Comparer, work: Iterable[tuple[PlannedTensor, F32 | None, F32 | None]], note: str = ""
    ) -> dict[str, TensorCheck]:
        """Tensors with the factors of their columns and rows, by GGUF's names."""
        work = list(work)
        done = 0
        lock = threading.Lock()

        def one(t: PlannedTensor, columns: F32 | None, rows: F32 | None) -> TensorCheck:
            nonlocal done
            sums = Sums()
            for s in compared(comparer, t, columns, rows):
                sums.add(s)
            for name in t.weight.sources:
                comparer.model.release(name)
            comparer.out.release(t.name)
            with lock:
                done += 1
                self.tell("tensors", done, len(work))
            return comparer.check(t, sums, note)

        with ThreadPoolExecutor(self.threads, "quantforge") as pool:
            results = pool.map(lambda args: one(*args), work)
            return {_key(t): check for (t, _, _), check in zip(work, results, strict=True)}

    def _explain(self, pairs: Pairs, comparer: Comparer, out: Source, model: Source, compared: dict[str, TensorCheck]) -> None:
        """Where tensors of a group differ: have they been scaled, as AWQ does, so that the model is the same?"""
        moved = []
        for g in pairs.groups:
            around = [compared.get(_key(t)) for t in g.all]
            plain = all(c is not None and c.equal for c in map(compared.get, map(_key, g.targets)))
            if None not in around and not plain and any(c is not None and c.status != "ok" for c in around):
                moved.append(g)
        while moved:
            columns: dict[str, F32] = {}
            rows: dict[str, F32] = {}
            taken = []
            for g in moved:
                s = g.factors(model, out) if len(g.source.shape) == 1 else _row_factors(g, model, out, columns)
                if s is None:
                    continue
                taken.append(g)
                rows.update({_key(t): np.float32(1) / s for t in (g.source, *g.beside)})
                columns.update({_key(t): g.spread(s) for t in g.targets})
            touched = {_key(t): t for g in taken for t in g.all}
            again = self._compare(comparer, [(t, *_scales(t, columns.get(k), rows.get(k))) for k, t in touched.items()], _SCALED)
            moved = [g for g in taken if all(again[_key(t)].status == "ok" for t in g.all)]
            if len(moved) == len(taken):  # else once more, without what scales do not explain
                compared.update(again)
                return

    def _exact(self, tensors: list[TensorCheck], out: Source) -> Check:
        """Are the bytes those of plain rounding?"""
        other = [t for t in tensors if not t.equal]
        if not other:
            return Check("derived", "ok", f"all {len(tensors)} tensors, bit by bit")
        chosen = out.config.get(METHOD)
        if chosen is not None and str(chosen) != "rtn":
            return Check(
                "derived", "unknown", f"{len(other)} tensors are not plainly rounded: made by {chosen}, which is not run again"
            )
        if self.imatrix is None and _with_imatrix(out.config):
            name = out.config.get("quantize.imatrix.file", "an imatrix")
            return Check("derived", "unknown", f"{len(other)} tensors were made with {name}: give it (--imatrix)")
        return Check(
            "derived", "differs", f"{len(other)} of {len(tensors)} tensors have other bytes: {_few([t.name for t in other])}"
        )

    def settings_of(self, out: Source, model: Source) -> None:
        """The hyperparameters, as GGUF has them."""
        try:
            mine, theirs = (_plain(settings(s)) for s in (out, model))
        except UnsupportedError:
            if out.gguf_names or model.gguf_names:
                self.checks.append(Check("settings", "unknown", "the architecture is not known"))
                return
            mine, theirs = (_plain(s.config) for s in (out, model))
            theirs = {k: v for k, v in theirs.items() if k in mine}
        except QuantForgeError as e:
            self.checks.append(Check("settings", "unknown", str(e)))
            return
        other = [
            f"{k} is {_short(mine[k])}, it should be {_short(v)}"
            for k, v in theirs.items()
            if k in mine and not _same(mine[k], v)
        ]
        gone = [f"{k} is missing" for k in theirs if k not in mine]
        if other or gone:
            self.checks.append(Check("settings", "differs", _few([*other, *gone])))
        else:
            self.checks.append(Check("settings", "ok", f"{len(theirs)} values"))

    def tokenizer_of(self, out: Source, model: Source) -> None:
        """The same ids for a text, and the same text for them."""
        try:
            theirs = model.tokenizer()
        except QuantForgeError as e:
            self.checks.append(Check("tokenizer", "note", f"the model has none that can be run: {e}"))
            return
        try:
            mine = out.tokenizer()
        except UnsupportedError as e:
            self.checks.append(Check("tokenizer", "unknown", str(e)))
            return
        except QuantForgeError as e:
            self.checks.append(Check("tokenizer", "differs", str(e)))
            return
        fault = _tokenizers_differ(mine, theirs)
        self.checks.append(
            Check("tokenizer", "differs" if fault else "ok", fault or "the same ids for a text, and its text for them")
        )

    def logits_of(self, out: Source, model: Source) -> None:
        """What both say to a few tokens."""
        if any(c.name == "structure" and c.status != "ok" for c in self.checks):
            self.checks.append(Check("logits", "unknown", "not run, because of the structure"))
            return
        try:
            from .logits import FACTOR, FLOOR, distances

            mine, plain = distances(out, model, self._types(), self._ids(model))
        except ImportError as e:
            self.checks.append(Check("logits", "unknown", f"{e}; --fast leaves them out"))
            return
        except QuantForgeError as e:
            self.checks.append(Check("logits", "unknown", str(e)))
            return
        limit = max(FLOOR, FACTOR * plain.kld if plain else 0.0)
        said = f"KL divergence {mine.kld:.3g}" + (f", of plain rounding {plain.kld:.3g}" if plain else "")
        said += f"; the likeliest token is the same for {mine.same_top:.0%}"
        self.checks.append(Check("logits", "ok" if mine.kld <= limit else "differs", said))

    def _types(self) -> dict[str, Codec]:
        """What the model's tensors are in the output."""
        assert self._pairs is not None
        return {s: t.codec for t in self._pairs.plan.tensors if len(t.shape) > 1 for s in t.weight.sources}

    def _ids(self, model: Source) -> list[int]:
        from .logits import TOKENS

        try:
            tokenizer = model.tokenizer()
        except QuantForgeError:
            rows = max((s.shape[0] for s in model.weights.values() if len(s.shape) == 2), default=1)
            return list(range(1, min(TOKENS, rows)))
        ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[:4000])[0][:TOKENS]
        return ([tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []) + ids

    def provenance_of(self, out: Source, model: Source) -> None:
        """Does it say that it was made of this model?"""
        digest = out.config.get(SOURCE_DIGEST)
        if digest is None:
            self.checks.append(Check("provenance", "note", "it does not say what it was made of"))
            return
        made = f"by quantforge {out.config.get(VERSION, '?')} of {out.config.get(SOURCE_NAME, '?')}"
        if digest in (model.digest(), model.config.get(SOURCE_DIGEST)):
            self.checks.append(Check("provenance", "ok", f"made {made}: this model"))
        else:
            self.checks.append(
                Check("provenance", "note", f"made {made}, sha256 {str(digest)[:12]}...: not this model, or a copy of it")
            )


def _key(t: PlannedTensor) -> str:
    return t.weight.name if len(t.weight.sources) != 1 else f"{t.name} {t.weight.name}"


def _scales(t: PlannedTensor, columns: F32 | None, rows: F32 | None) -> tuple[F32 | None, F32 | None]:
    """The factors of columns and rows; the numbers of a vector are columns."""
    return (rows if columns is None else columns, None) if len(t.shape) == 1 else (columns, rows)


def _row_factors(g: ScaleGroup, model: Source, out: Source, columns: Mapping[str, F32]) -> F32 | None:
    """What the rows of a matrix lost, from their size; None where the columns that should have gained it have not."""
    w, d = decoded(read_rows(model, g.source.weight)), out.read(g.source.name).decode()
    s = columns.get(_key(g.source))
    w = w if s is None else w * s
    lost = _gain(d, w)
    if lost is None:
        return None
    for t in g.targets:
        gained = _gain(
            np.ascontiguousarray(decoded(read_rows(model, t.weight)).T), np.ascontiguousarray(out.read(t.name).decode().T)
        )
        if gained is None:
            return None
        ratio = np.abs(np.log(g.spread(lost) / gained))
        if np.median(ratio) > np.log(1.2) or (ratio > np.log(2)).mean() > 0.02:
            return None
    return lost


def _gain(a: F32, b: F32) -> F32 | None:
    """How many times as large as a's the rows of b are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.sqrt((b * b).sum(1) / (a * a).sum(1))
    return gain if np.isfinite(gain).all() and (gain > 0).all() else None


def _near(tensors: list[TensorCheck], wrong: list[TensorCheck]) -> Check:
    if wrong:
        return Check("tensors", "differs", f"{len(wrong)} of {len(tensors)}: {_few([f'{t.name}: {t.detail}' for t in wrong])}")
    exact = sum(t.equal for t in tensors)
    ratios = [(t.error / t.rounding_error, t.name) for t in tensors if not t.equal and t.error and t.rounding_error]
    worst = f"; errors up to {max(ratios)[0]:.2f} times those of plain rounding ({max(ratios)[1]})" if ratios else ""
    return Check("tensors", "ok", f"{exact} of {len(tensors)} as plain rounding makes them, bit by bit{worst}")


def _tokenizers_differ(mine: Tokenizer, theirs: Tokenizer) -> str | None:
    text = _TEXT + HELD_OUT.read_text(encoding="utf-8")[:2000]
    ids, expected = mine.encode(text)[0], theirs.encode(text)[0]
    if ids != expected:
        at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
        return f"token {at} of a text is {_short(ids[at : at + 1])}, it should be {_short(expected[at : at + 1])}"
    if mine.decode(ids) != theirs.decode(ids):
        return "the text of tokens is another one"
    if mine.tokens is not None and theirs.tokens is not None:
        n = min(len(mine.tokens), len(theirs.tokens))  # padded to the rows of the embedding, or not
        other = [i for i in range(n) if mine.tokens[i] != theirs.tokens[i]]
        if other:
            return f"token {other[0]} is {mine.tokens[other[0]]!r}, it should be {theirs.tokens[other[0]]!r}"
    for what in ("bos", "eos", "adds_bos"):
        a, b = getattr(mine, what), getattr(theirs, what)
        if a != b:
            return f"{what} is {a}, it should be {b}"
    return None


def _with_imatrix(config: Mapping[str, Any]) -> bool:
    return IMATRIX_DIGEST in config or "quantize.imatrix.file" in config


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata without what is of the file, not of the model."""
    passing = ("general.", "quantforge.", "tokenizer.", "transformers_version", "torch_dtype", "dtype", "quantization", "_name")
    return {k: v for k, v in values.items() if k == "general.architecture" or not k.startswith(passing)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple | np.ndarray) or isinstance(b, list | tuple | np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind in "fiub" and b.dtype.kind in "fiub":
            return bool(a.size == b.size or 1 in (a.size, b.size)) and bool(np.allclose(a, b, rtol=1e-5, atol=0))
        return np.array_equal(a, b)
    if isinstance(a, float | np.floating) or isinstance(b, float | np.floating):
        return (
            isinstance(a, int | float | np.number)
            and isinstance(b, int | float | np.number)
            and bool(np.isclose(a, b, rtol=1e-5, atol=0))
        )
    return bool(a == b)


def _short(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _few(texts: list[str]) -> str:
    more = f"; {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more
