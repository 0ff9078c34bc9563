"""Calibration: run text through a model, a block at a time, and gather what quantization needs to know
about the inputs of every matrix. `calibrate` writes mean squares as llama.cpp's GGUF imatrix."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import codecs, formats
from ..arrays import F32
from ..errors import CalibrationError, FormatError, NonFiniteError, OutputError, RecipeError
from ..formats import Adapters, Header, Stored, merged, open_path
from ..runtime import Model, advance
from ..runtime.matrices import runs
from ..tokenizer import Tokenizer
from . import overlap
from .corpus import BUILTIN, HELD_OUT, Corpus, Ints, Stages, cut, read_text

logger = logging.getLogger(__name__)

CTX = 512
FEW_TOKENS = 32
"""An expert that saw fewer tokens is not calibrated well."""

PathLike: TypeAlias = str | os.PathLike[str]
Note: TypeAlias = Callable[[Sequence[str], torch.Tensor], None]


# ---- text


def _text_path(text: PathLike) -> Path:
    if os.fspath(text) == BUILTIN:
        return Path(str(files("quantforge") / "data" / "text" / "calibration.txt"))
    return Path(os.path.expanduser(text))


def read_windows(text: PathLike, tokenizer: Tokenizer, ctx: int, chunks: int | None = None, *, spread: bool = False) -> Ints:
    """Windows of calibration tokens, cut as llama-imatrix does: int[windows, ctx].

    text: a UTF-8 file, or "builtin" for the shipped calibration text. chunks: at most so many, from the start
    or, with `spread`, evenly from the whole text. Raises CalibrationError where the text has fewer than two
    windows or overlaps the shipped held-out text, FormatError where it cannot be read.
    """
    path = _text_path(text)
    corpus = Corpus.read(path, tokenizer)
    if os.fspath(text) != BUILTIN:
        _, held_out = read_text(HELD_OUT)
        if how := overlap.shared(corpus.text, held_out):
            raise CalibrationError(f"{path.name} overlaps the shipped held-out text: {how}; calibrate with other text")
    if len(corpus.tokens) < 2 * ctx:
        raise CalibrationError(
            f"{path}: {len(corpus.tokens)} tokens are too few to calibrate with windows of {ctx}: "
            f"at least {2 * ctx} are needed; give more text or smaller windows"
        )
    try:
        ids = cut(corpus, tokenizer, ctx, chunks=None if spread else chunks).ids
    except RecipeError as e:
        raise CalibrationError(str(e)) from None
    if spread and chunks is not None and chunks < len(ids):
        ids = ids[np.linspace(0, len(ids) - 1, chunks).astype(np.int64)]
    return ids


def sketch(text: PathLike) -> overlap.Sketch:
    """What a quantized file remembers of its calibration text. Raises FormatError."""
    path = _text_path(text)
    data, written = read_text(path)
    return overlap.Sketch.of(path.name, hashlib.sha256(data).hexdigest(), written)


# ---- what the matrices of a block see


_PRODUCTS = {nn.functional.linear: 1, torch.matmul: 1, torch.Tensor.matmul: 1, torch.Tensor.__matmul__: 1, torch.bmm: 1,
             torch.addmm: 2}  # fmt: skip
"""Products of inputs with a matrix -> which argument the matrix is."""


class _Products(TorchFunctionMode):
    """Sees products with matrices: those whose memory belongs to a parameter; and attention."""

    def __init__(self, see: Callable[[Any, Any], bool], attend: Callable[..., None] | None = None) -> None:
        super().__init__()
        self._see, self._attend = see, attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = _PRODUCTS.get(func)
        if at is not None and len(args) > at:
            x, w = args[at - 1], args[at]
            if not self._see(x, w) and func is not nn.functional.linear and isinstance(w, torch.Tensor) and w.ndim > 1:
                self._see(w.transpose(-1, -2), x)  # the matrix comes first, what it is applied to is in columns
        if func is nn.functional.scaled_dot_product_attention and self._attend is not None:
            self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def observing(layer: nn.Module, model: Model, i: int, note: Note, attend: Callable[..., None] | None = None) -> Iterator[None]:
    """Call note(names, x) whenever matrices of block i run: their checkpoint names and their input x[tokens, in].

    Covers every product with a parameter (linears, routers), and stacked experts one by one; an expert's x has only the
    tokens that were routed to it. "name[e]" is the e-th of the experts that a checkpoint has in one tensor.
    attend: called with the arguments of every attention.
    """
    named = model.observed(i)
    matrices = {p.data_ptr(): (p, named[k]) for k, p in layer.named_parameters() if k in named and p.ndim in (2, 3)}
    starts = sorted(matrices)
    seen: set[tuple[int, int]] = set()

    def see(x: Any, w: Any) -> bool:
        """Tell of a product if w is one of the matrices; is it?"""
        if not isinstance(w, torch.Tensor) or not isinstance(x, torch.Tensor) or not starts:
            return False
        start = starts[max(0, bisect_right(starts, w.data_ptr()) - 1)]
        p, names = matrices[start]
        e, rest = divmod(w.data_ptr() - start, p[0].nbytes if p.ndim == 3 else max(1, p.nbytes))
        if rest or e < 0 or e >= len(names) or w.ndim not in (2, 3):
            return False
        if w.ndim == 3:
            for k in range(len(names)):
                seen.add((start, k))
                some = x[k].detach().reshape(-1, x.shape[-1])
                note(names[k], some[(some != 0).any(-1)])  # tokens that are not an expert's are zeros
            return True
        seen.add((start, e))
        note(names[e], x.detach().reshape(-1, x.shape[-1]))
        return True

    def begin(module: nn.Module, _: Any) -> None:
        seen.clear()

    def end(module: nn.Module, *_: Any) -> None:
        """Tell of experts that saw no token."""
        for p in module.parameters(recurse=False):
            if p.ndim == 3 and p.data_ptr() in matrices and any(s == p.data_ptr() for s, _ in seen):
                wide = p.shape[1] if getattr(module, "is_transposed", False) else p.shape[2]
                for e, names in enumerate(matrices[p.data_ptr()][1]):
                    if (p.data_ptr(), e) not in seen:
                        note(names, p.new_empty(0, wide))

    with ExitStack() as stack:
        for module in layer.modules():
            if any(p.ndim == 3 for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(end).remove)
                config: Any = getattr(module, "config", None)
                if hasattr(config, "_experts_implementation"):
                    stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
                    config._experts_implementation = "eager"  # which takes experts one by one
        stack.enter_context(_Products(see, attend))
        yield


class _Squares:
    """Sums of squares and counts of the inputs of every matrix, by checkpoint name."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
        self.counts: dict[str, int] = {}
        self._last: tuple[torch.Tensor | None, Any] = (None, None)

    def add(self, name: str, sums: Any, count: int) -> None:
        """More of them."""
        self.sums[name] = self.sums.get(name, 0.0) + sums
        self.counts[name] = self.counts.get(name, 0) + count

    def note(self, names: Sequence[str], x: torch.Tensor) -> None:
        """See `observing`. Matrices that share an input share the work."""
        seen, square = self._last
        if seen is None or seen.data_ptr() != x.data_ptr() or seen.shape != x.shape:
            square = (x.float() ** 2).sum(0).double().cpu().numpy()
            self._last = (x, square)
        for name in names:
            self.add(name, square, len(x))


class _Absorbed:
    """The inputs of low-rank attention's up-projection where it is split by heads and absorbed, as llama.cpp's graphs have it
    and transformers' modules have not: of its part for keys the queries, of its part for values what attention makes of
    the latent vectors."""

    def __init__(self, model: Model, i: int, squares: _Squares) -> None:
        heads = [w for w in model.gguf.values() if w.layer == i and len(w.shape) == 3 and not w.experts]
        self._keys = [w for w in heads if any(p.groups for p in w.pieces)]
        self._values = [w for w in heads if w not in self._keys and w.sources[0] in {s for k in self._keys for s in k.sources}]
        self._squares, self._latent = squares, torch.empty(0)

    def note(self, names: Sequence[str], x: torch.Tensor) -> None:
        """See `observing`."""
        if any(name in w.sources for name in names for w in self._values):
            self._latent = x
        self._squares.note(names, x)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> None:
        """q, k, v: [windows, heads, ctx, ..]."""
        if not self._keys:
            return
        windows, n, ctx, _ = q.shape
        latent = self._latent.reshape(windows, 1, ctx, -1).expand(-1, n, -1, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, latent, **how)
        for w, x in [(w, q[..., : w.shape[-1]]) for w in self._keys] + [(w, mixed) for w in self._values]:
            self._squares.add(w.name, x.float().square().sum((0, 2)).double().cpu().numpy(), windows * ctx)


# ---- the importance matrix


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What was gathered."""

    path: str
    text: str
    ctx: int
    chunks: int
    tokens: int
    entries: int
    seconds: float
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """GGUF name of stacked experts -> tokens that each of them saw."""
    warnings: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Ready for json.dumps; `schema` names this layout."""
        values = {k: getattr(self, k) for k in self.__slots__}
        return {"schema": "quantforge.calibrate/1", **values, "experts": dict(self.experts), "warnings": list(self.warnings)}


def calibrate(
    model: PathLike,
    out: PathLike,
    text: PathLike = BUILTIN,
    *,
    ctx: int | None = None,
    chunks: int | None = None,
    device: str = "cpu",
    force: bool = False,
    lora: Adapters = (),
    progress: Stages | None = None,
) -> CalibrationReport:
    """Write the importance matrix of a model in llama-imatrix's GGUF layout.

    model: anything `quantforge.open` reads. out: *.gguf. text: a UTF-8 file, or "builtin". ctx: tokens per window, default
    min(512, the model's); chunks: windows, default all. Per matrix: `NAME.in_sum2` f32[in] (experts: [experts, in]) and
    `NAME.counts`, tokens; of an expert, those that were routed to it.
    lora: adapters to merge, as in `convert`.
    progress: called with (what, done, of).  Raises CalibrationError, FormatError, NonFiniteError (names the layer), OutputError.
    """
    out, began = Path(os.path.expanduser(out)), time.perf_counter()
    if out.suffix != ".gguf":
        raise RecipeError(f"{out}: the importance matrix is a GGUF file; name it *.gguf")
    if out.exists() and not force:
        raise OutputError(out, "exists already; --force overwrites it")
    with merged(open_path(Path(model)), lora) as source:
        runner = Model(source, Path(model).resolve().name, device=device)
        if not runner.gguf:
            raise CalibrationError(
                f"{model}: an importance matrix names tensors as GGUF does, and this architecture has no such names"
            )
        tokenizer = source.tokenizer()
        ids = read_windows(text, tokenizer, context(ctx, runner), chunks)
        squares = gather(runner, ids, progress)
        entries, experts, warnings = _entries(runner, squares)
    for warning in warnings:
        logger.warning("%s", warning)
    name = _text_path(text).name
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [name],
        "imatrix.chunk_count": int(ids.shape[0]),
        "imatrix.chunk_size": int(ids.shape[1]),
        **overlap.metadata([sketch(text)]),
    }
    plain = codecs.get("F32")
    tensors = {k: v for n in sorted(entries) for k, v in zip((f"{n}.in_sum2", f"{n}.counts"), entries[n], strict=True)}
    header = Header(metadata, {k: Stored(plain, v.shape) for k, v in tensors.items()})
    with formats.get("gguf").create(out, header) as sink:
        for k, v in tensors.items():
            sink.write(k, plain.encode(v))
        sink.commit()
    seconds = time.perf_counter() - began
    return CalibrationReport(str(out), name, ids.shape[1], ids.shape[0], ids.size, len(entries), seconds, experts, warnings)


def context(ctx: int | None, model: Model, option: str = "--ctx") -> int:
    """Tokens per window: what was asked for, or min(512, the model's own). Raises CalibrationError if it is too long."""
    own = int(getattr(model.module.config, "max_position_embeddings", None) or CTX)
    if ctx is not None and ctx > own:
        raise CalibrationError(f"{option} {ctx} is more than the model's own context of {own}")
    return min(CTX, own) if ctx is None else ctx


def gather(model: Model, ids: Ints, progress: Stages | None = None) -> _Squares:
    """Sums of squares of every matrix's inputs over windows of tokens int[windows, ctx]."""
    squares = _Squares()
    hooks = ExitStack()

    def before(i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        absorbed = _Absorbed(model, i, squares)
        hooks.enter_context(observing(blocks[0], model, i, absorbed.note, absorbed.attend))

    def after(i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        hooks.close()

    def tell(done: int, of: int) -> None:
        if progress:
            progress("blocks", done, of)

    with hooks:
        advance([model], torch.from_numpy(ids), before=before, after=after, progress=tell)
    for name, sums in squares.sums.items():
        if not np.isfinite(sums).all():
            raise NonFiniteError(f"{model.name}: the squares of the inputs of {name} overflow; the model is damaged", ())
    return squares


def _entries(model: Model, squares: _Squares) -> tuple[dict[str, tuple[F32, F32]], dict[str, list[int]], list[str]]:
    """GGUF name -> (in_sum2, counts); tokens per expert; warnings."""
    entries: dict[str, tuple[F32, F32]] = {}
    experts: dict[str, list[int]] = {}
    starved: dict[str, str] = {}
    for name, made in model.gguf.items():
        if name in squares.sums:  # of heads, which have one count together
            entries[name] = squares.sums[name].reshape(-1).astype(np.float32), np.array([squares.counts[name]], np.float32)
        parts = runs(model, made) if made.layer is not None and (len(made.shape) == 2 or made.experts) else []
        starts = [r.at for r in parts]
        firsts = range(0, made.row_count, made.shape[-2]) if made.experts else [0]
        matrices = [parts[bisect_right(starts, k) - 1].matrix for k in firsts] if parts else []
        if not matrices or not all(m in squares.sums for m in matrices):
            continue
        sums = np.stack([squares.sums[m] for m in matrices])
        sums = sums if made.columns is None else sums[:, made.columns]
        counts = np.asarray([squares.counts[m] for m in matrices], np.float64)
        if not made.experts:
            entries[name] = sums[0].astype(np.float32), counts.astype(np.float32)
            continue
        entries[name] = sums.astype(np.float32), counts.astype(np.float32)[:, None]
        experts[name] = counts.astype(int).tolist()
        if few := [i for i, n in enumerate(experts[name]) if n < FEW_TOKENS]:
            starved.setdefault(str(few), name)
    if not entries:
        raise FormatError(model.source.path, "no matrix of the model was seen in its blocks")
    warnings = [
        f"{name}: experts {few} saw fewer than {FEW_TOKENS} tokens; calibrate with more text" for few, name in starved.items()
    ]
    return entries, experts, warnings
