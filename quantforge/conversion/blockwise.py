"""Quantize a model block by block: what a matrix is calibrated on has passed through everything quantized before it.

Two copies of one block are in memory: the model as it is, and as it becomes. Within a block the matrices go in
stages (those that share an input together): collect moments of the inputs, quantize, put the decoded result in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..archs.base import ScaleGroup
from ..archs.weight import Value, Weight, numbers
from ..arrays import F32, Parts
from ..calibration.corpus import Ints
from ..calibration.gather import FEW_TOKENS, Progress, observing, stored_names
from ..codecs import Codec, Encoded
from ..codecs.fp4 import NVFP4
from ..codecs.integers import ActOrderCodec
from ..codecs.plain import PlainCodec
from ..errors import CalibrationError, NonFiniteError, UnsupportedError
from ..formats import Source
from ..methods import AWQ, Method, Stats, output_errors
from ..methods import get as get_method
from ..runtime import FUSED, TOKENS_AT_ONCE, Model

HELD_OUT = 8
"""One window of so many only judges: the better of the method and rtn on it is kept."""
EXPERT_TOKENS = 4 * FEW_TOKENS
"""An expert that saw fewer is lent the mean of all experts for what is missing."""
_STRIPE = 1024
"""Columns of a Hessian that are summed together."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of a checkpoint, and what it becomes."""

    name: str
    """In the output."""
    codec: Codec
    order: NDArray[np.int64] | None
    """Its rows in the output's order."""
    value: Value | None
    """How its numbers change."""
    mates: tuple[str, ...] = ()
    """Tensors of the output, this one among them, that share one scale."""
    row: int = 0
    """Where its rows begin in the output's tensor: experts are stacked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A tensor done."""

    task: Task
    parts: Parts
    weights: F32
    """What it was, in the output's row order."""
    method: str
    """Which one was kept: the one that was asked for, or rtn."""
    output_error: float | None = None
    """Relative squared error of the outputs on held-out windows; see `methods.output_error`."""
    rtn_error: float | None = None
    tokens: int | None = None
    """Calibration tokens that reached it; of an expert, those routed to it."""


class _Enough(Exception):
    """The block has run as far as it had to."""


class _Becoming(Model):
    """The model with its embeddings and norms outside of the blocks as the output will have them."""

    tasks: Mapping[str, Task]

    def block_names(self, i: int) -> dict[str, str]:
        """GGUF name without "blk.N." -> checkpoint name, of one block."""
        stem = f"blk.{i}."
        return {k.removeprefix(stem): v[0] for k, v in stored_names(self).items() if k.startswith(stem) and len(v) == 1}

    def parameter(self, name: str) -> F32:
        w = super().parameter(name)
        task = self.tasks.get(name)
        if task is None or isinstance(task.codec, PlainCodec) or name.startswith(f"{self.prefix}."):
            return w
        return Encoded(task.codec, w.shape, task.codec.encode(w)).decode()


class _Moments:
    """Sums of outer products of one group's inputs, for choosing and for judging."""

    def __init__(self) -> None:
        self.sums: list[list[Any]] = [[0, 0, 0], [0, 0, 0]]
        self.tokens = [0, 0]
        self.seen = 0
        """All tokens that were really there."""

    def add(self, x: torch.Tensor, full: torch.Tensor | None, judge: bool) -> None:
        stray = None if full is None else full - x
        pairs = [(x, x), (stray, x), (stray, stray) if judge else (None, x)]
        for i, (a, b) in enumerate(pairs):
            if a is not None:
                n = x.shape[1]
                if not isinstance(self.sums[judge][i], torch.Tensor):
                    self.sums[judge][i] = x.new_zeros((n, n))
                if a is not b:
                    self.sums[judge][i].addmm_(a.T, b)
                    continue
                for j in range(0, n, _STRIPE):  # symmetric: the lower triangle is enough
                    self.sums[judge][i][j:, j : j + _STRIPE].addmm_(a[:, j:].T, b[:, j : j + _STRIPE])
        self.tokens[judge] += len(x)
        self.seen += len(x)

    def stats(self, judge: bool) -> Stats | None:
        """The means; the sums are used up."""
        n = self.tokens[judge]
        if not n:
            return None
        for t in self.sums[judge]:
            if isinstance(t, torch.Tensor):
                t.mul_(2 / n)
        hessian, shift, drift = (t if isinstance(t, torch.Tensor) else None for t in self.sums[judge])
        for t in (hessian, drift):
            for j in range(0, 0 if t is None else len(t), _STRIPE):
                t[j : j + _STRIPE, j + _STRIPE :] = t[j + _STRIPE :, j : j + _STRIPE].T  # type: ignore[index]
        assert hessian is not None
        return Stats(hessian, n, shift, drift)


@torch.inference_mode()
def quantize_blocks(
    source: Source,
    tensors: Sequence[tuple[str, Codec, Weight]],
    ids: Ints,
    method: Method,
    write: Callable[[Outcome], None],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    mates: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> None:
    """Quantize every tensor of the blocks.

    tensors: name in the output, codec and weight of every tensor of the model; those outside of the blocks are only read.
    ids: calibration windows int[windows, ctx]. write: called with each tensor of the blocks. mates: as in `PlannedTensor`.
    Raises CalibrationError, NonFiniteError, ShapeError, UnsupportedError.
    """
    if len(ids) < 2:
        raise CalibrationError(
            "one window of calibration tokens is not enough: one chooses, another judges; give more --calibration-chunks"
        )
    model, becoming = Model(source, source.path.name, device=device), _Becoming(source, source.path.name, device=device)
    becoming.tasks = tasks = _tasks(model, tensors, mates)
    windows = torch.from_numpy(ids).to(model.device)
    batch = max(1, min(TOKENS_AT_ONCE[model.device.type] // windows.shape[1], len(windows)))
    full, hidden = model.enter(windows, batch), becoming.enter(windows, batch)
    for i in range(len(model.layers)):
        _Block(model, becoming, i, tasks, method, batch).run(full, hidden, write)
        if progress:
            progress("blocks", i + 1, len(model.layers))


def _tasks(model: Model, tensors: Sequence[tuple[str, Codec, Weight]], mates: Mapping[str, tuple[str, ...]]) -> dict[str, Task]:
    """Checkpoint name -> what it becomes."""
    found = {}
    by_source: dict[str, tuple[str, Codec, Weight]] = {s: t for t in tensors for s in t[2].sources}
    forward = (
        {}
        if model.source.format != "gguf" or model.arch is None
        else {w.name: w for w in model.arch.weights(model.config, {n: p.shape for n, p in model.places.items()})}
    )
    for name, place in model.places.items():
        task = by_source.get(place.sources[0])
        if task is None:
            continue
        output, codec, weight = task
        made = forward.get(place.sources[0], weight)  # of the checkpoint's tensors
        if output != weight.name:  # a checkpoint's tensor: the model's own numbers
            found[name] = Task(output, codec, None, None, mates.get(output, ()))
            continue
        own = name if forward else place.sources[0]
        if (
            len(place.sources) > 1
            or made.columns is not None
            or any(p.groups or p.rows is not None for p in made.pieces if len(made.sources) > 1)
        ):
            raise UnsupportedError(f"{output}: a part of {name}; use method rtn")
        at = made.sources.index(own)
        stacked = len(weight.shape) > 2
        if stacked and not codec.row_local:
            raise UnsupportedError(f"{output}: {codec.name} cannot hold experts that are quantized one by one; use method rtn")
        rows = made.pieces[at].rows if made.order is None else made.order
        rows = None if rows is None else numbers(rows)
        found[name] = Task(output, codec, rows, made.value, (), at * weight.shape[-2] if stacked else 0)
    return found


class _Block:
    """One block, as it is and as it becomes."""

    def __init__(self, model: Model, becoming: _Becoming, i: int, tasks: Mapping[str, Task], method: Method, batch: int) -> None:
        self.model, self.becoming, self.i, self.batch = model, becoming, i, batch
        self.tasks, self.method = tasks, method
        self.prefix = f"{model.prefix}.{i}"
        self.before, self.after = model.layers[i], becoming.layers[i]

    def run(self, full: torch.Tensor, hidden: torch.Tensor, write: Callable[[Outcome], None]) -> None:
        """Quantize, and advance both hidden states."""
        self.model.load(self.before, self.prefix)
        self.becoming.load(self.after, self.prefix)
        names = {n for n in self.tasks if n.startswith(f"{self.prefix}.")}
        if isinstance(self.method, AWQ):
            for scaled in self.model.arch.scale_groups if self.model.arch else ():
                self._scale(scaled, full)
        for stage in self._stages(hidden):
            groups = [[n for n in g if n in names and not isinstance(self.tasks[n].codec, PlainCodec)] for g in stage]
            groups = [g for g in groups if g]
            for group, moments in zip(groups, self._moments(groups, full, hidden), strict=True):
                for outcome in self._quantize(group, moments):
                    write(outcome)
                names -= set(group)
        for name in sorted(names):  # norms, biases, and what the recipe leaves alone
            write(self._copy(name))
        self.model.run_block(self.i, self.before, full, self.batch)
        self.becoming.run_block(self.i, self.after, hidden, self.batch)
        Model.unload(self.before)
        Model.unload(self.after)

    # ---- inputs

    def _stages(self, hidden: torch.Tensor) -> list[list[list[str]]]:
        """Matrices in the order in which they run: stages of groups; a group shares its input, a stage's groups are experts."""
        seen: dict[Any, dict[tuple[str, ...], None]] = {}
        held: list[torch.Tensor] = []  # keeps addresses from being used twice

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            held.append(x)
            experts = re.sub(r"\.experts\.\d+\.", ".experts.*.", names[0])
            key = experts if experts != names[0] else (x.data_ptr(), x.shape)
            seen.setdefault(key, {})[tuple(names)] = None

        with observing(self.after, self.prefix, note):
            self.becoming.run_block(self.i, self.after, hidden[: self.batch].clone(), self.batch)
        return [
            [list(g) for g in groups] if isinstance(key, str) else [[n for g in groups for n in g]]
            for key, groups in seen.items()
        ]

    def _inputs(self, model: Model, layer: nn.Module, hidden: torch.Tensor, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """The inputs of some matrices; the block runs no further than it must."""
        found: dict[str, torch.Tensor] = {}

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            found.update({n: x for n in names if n in wanted})
            if len(found) == len(wanted):
                raise _Enough

        with observing(layer, self.prefix, note), suppress(_Enough):
            model.run_block(self.i, layer, hidden.clone(), self.batch)
        return found

    def _moments(self, groups: list[list[str]], full: torch.Tensor, hidden: torch.Tensor) -> list[_Moments]:
        """Moments of the first matrix's input of each group."""
        firsts, found = [g[0] for g in groups], [_Moments() for _ in groups]
        if not groups:
            return []
        routed = ".experts." in firsts[0]  # an expert's tokens differ between the two: nothing to compare
        first = 0
        for theirs, ours in zip(torch.split(full, self.batch), torch.split(hidden, self.batch), strict=True):
            x = self._inputs(self.becoming, self.after, ours, firsts)
            x0 = {} if routed else self._inputs(self.model, self.before, theirs, firsts)
            ctx = ours.shape[1]
            judges = (torch.arange(first, first + len(ours)) % HELD_OUT == HELD_OUT - 1).repeat_interleave(ctx)
            if len(hidden) < HELD_OUT:
                judges = (torch.arange(first, first + len(ours)) == len(hidden) - 1).repeat_interleave(ctx)
            first += len(ours)
            for name, moments in zip(firsts, found, strict=True):
                if routed:  # every eighth token judges
                    judges = torch.arange(len(x[name])) % HELD_OUT == HELD_OUT - 1
                for judge in (False, True):
                    rows = (judges == judge).to(x[name].device)
                    if rows.any():
                        moments.add(x[name][rows], x0[name][rows] if name in x0 else None, judge)
        if routed:
            self._lend(found)
        return found

    def _lend(self, found: list[_Moments]) -> None:
        """Give experts that saw too few tokens the mean of all experts for what is missing."""
        for judge in (0, 1):
            need = FEW_TOKENS if judge else EXPERT_TOKENS
            total = sum(m.tokens[judge] for m in found)
            mean = sum(m.sums[judge][0] for m in found) * (1 / max(1, total))
            for m in found:
                missing = need - m.tokens[judge]
                if missing > 0 and total:
                    m.sums[judge][0] = m.sums[judge][0] + missing * mean
                    m.tokens[judge] = need

    # ---- scales

    def _scale(self, group: ScaleGroup, full: torch.Tensor) -> None:
        """Search scales for the matrices of a group, and fold them into what feeds these, in both copies of the block."""
        assert isinstance(self.method, AWQ)
        names = self.becoming.block_names(self.i)
        targets = [names.get(f"{role}.weight") for role in group.targets]
        if f"{group.source}.weight" not in names or not all(t in self.tasks for t in targets):
            return
        ws = [self.matrix(self.after, t) for t in targets if t is not None]
        codecs = [self.tasks[t].codec for t in targets if t is not None]
        if any(isinstance(c, PlainCodec) for c in codecs) or any(w.ndim != 2 for w in ws):
            return
        source, n = self.matrix(self.after, names[f"{group.source}.weight"]), ws[0].shape[1]
        repeat = n // source.shape[0]  # query heads per value head
        head = source.shape[0] // int(getattr(self.model.module.config, "num_key_value_heads", 1) or 1) if repeat > 1 else n
        if repeat * source.shape[0] != n or head == 0:
            return

        def share(s: torch.Tensor) -> torch.Tensor:
            return s.reshape(-1, repeat, head).amax(1, keepdim=True).expand(-1, repeat, head).reshape(n) if repeat > 1 else s

        # two batches from all over the text; the block's masks are known for this number of windows
        at = torch.linspace(0, len(full) - 1, min(len(full), 2 * self.batch)).long()
        choose, judge = (full[at[k :: max(1, len(at) // self.batch)]][: self.batch] for k in (0, len(at) // self.batch - 1))
        importance = self._inputs(self.model, self.before, choose, [t for t in targets if t][:1])
        square = next(iter(importance.values())).float().square().mean(0)
        s = self.method.scales([w.clone() for w in ws], codecs, square, self._loss(ws, choose), self._loss(ws, judge), share)
        if bool((s == 1).all()):
            return
        divisor = s if repeat == 1 else s.reshape(-1, repeat, head)[:, 0].reshape(-1)
        for layer in (self.before, self.after):
            for t in targets:
                assert t is not None
                self.matrix(layer, t).mul_(s)
            for suffix in (".weight", ".bias"):
                if (name := names.get(group.source + suffix)) is not None:
                    self._divide(self.matrix(layer, name), divisor, self.tasks[name].value)

    @staticmethod
    def _divide(w: torch.Tensor, s: torch.Tensor, value: Value | None) -> None:
        """Divide the rows of what feeds a group; norms that add 1 to their weight are divided with the 1 in it."""
        if value is not None:
            divided = value.back((torch.from_numpy(value.forward(w.cpu().numpy())).to(w) / s).cpu().numpy())
            w.copy_(torch.from_numpy(divided))
        else:
            w.div_(s if w.ndim == 1 else s[:, None])

    def _loss(self, ws: list[torch.Tensor], hidden: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], float]:
        """Mean squared error of the block's output if other matrices stand in for ws."""
        original = [w.clone() for w in ws]
        expected = hidden.clone()
        self.becoming.run_block(self.i, self.after, expected, self.batch)

        def loss(others: Sequence[torch.Tensor]) -> float:
            for w, other in zip(ws, others, strict=True):
                w.copy_(other)
            out = hidden.clone()
            self.becoming.run_block(self.i, self.after, out, self.batch)
            for w, w0 in zip(ws, original, strict=True):
                w.copy_(w0)
            return float((out - expected).square_().mean(dtype=torch.float64))

        return loss

    # ---- weights

    def matrix(self, layer: nn.Module, name: str) -> torch.Tensor:
        """A matrix or vector of a block by its checkpoint name: a view of the module's parameter."""
        path = name.removeprefix(f"{self.prefix}.")
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", path)
        if match:
            module, e = layer.get_submodule(match[1]), int(match[2])
            for fused, parts in FUSED.items():
                if match[3] in parts and isinstance(w := getattr(module, fused[1:], None), nn.Parameter):
                    size = w.shape[1] // len(parts)
                    at = parts.index(match[3]) * size
                    return w.data[e, at : at + size]
        return layer.get_parameter(path).data

    def _quantize(self, group: list[str], moments: _Moments) -> list[Outcome]:
        """Quantize matrices that share an input, and put what they have become in place."""
        stats, judge = moments.stats(False), moments.stats(True)
        if stats is None or judge is None:
            raise CalibrationError(f"{group[0]}: no calibration token reached it; calibrate with more text")
        outcomes = []
        for names in self._alike(group):
            try:
                outcomes += [replace(o, tokens=moments.seen) for o in self._choose(names, stats, judge)]
            except NonFiniteError as e:
                raise NonFiniteError(f"{names[0]}: {e}", ()) from None
            except CalibrationError as e:
                raise CalibrationError(f"{names[0]}: {e}") from None
        return outcomes

    def _alike(self, group: list[str]) -> list[list[str]]:
        """Matrices of one codec whose rows can be quantized together: one factor of the Hessian, one loop over columns."""
        found: dict[Any, list[str]] = {}
        for name in group:
            codec = self.tasks[name].codec
            together = codec.row_local or isinstance(codec, ActOrderCodec)  # whose groups follow from the inputs
            found.setdefault(codec.name if together else name, []).append(name)
        return list(found.values())

    def _codec(self, name: str) -> Codec:
        """The codec of a matrix, with the scale that it shares with others."""
        task = self.tasks[name]
        if not isinstance(task.codec, NVFP4) or not task.mates:
            return task.codec
        joined = [n for n, t in self.tasks.items() if t.name in task.mates]
        return task.codec.sharing(max(float(self.matrix(self.before, n).abs().max()) for n in joined))

    def _choose(self, names: list[str], stats: Stats, judge: Stats) -> list[Outcome]:
        """Quantize matrices of one codec; of each, keep what errs less on the held-out windows."""
        codec, ws, orders = self._codec(names[0]), [], []
        for name in names:
            task = self.tasks[name]
            if task.value is not None:
                raise UnsupportedError(f"{name}: its numbers change on the way to the output; {self.method.name} cannot follow")
            rows = None if task.order is None else torch.from_numpy(task.order)
            w = self.matrix(self.before, name).float()
            ws.append(w if rows is None else w[rows.to(w.device)])
            orders.append(rows)
        together: Encoded | None = None
        if "hessian" in self.method.needs and self.method.takes(codec):
            whole = torch.cat(ws)
            together = Encoded(codec, tuple(whole.shape), self.method.quantize(whole, codec, stats))
        outcomes, first = [], 0
        for name, w, rows in zip(names, ws, orders, strict=True):
            mine = together
            if together is not None and len(names) > 1:
                mine = together.rows(slice(first, first + len(w)))
            first += len(w)
            kept, encoded, error, rtn = self._better(w, codec, mine, stats, judge)
            result = torch.from_numpy(encoded.decode()).to(w.device)
            self.matrix(self.after, name).copy_(result if rows is None else result[rows.argsort().to(w.device)])
            outcomes.append(Outcome(self.tasks[name], encoded.parts, w.cpu().numpy(), kept, error, rtn))
        return outcomes

    def _better(
        self, w: torch.Tensor, codec: Codec, mine: Encoded | None, stats: Stats, judge: Stats
    ) -> tuple[str, Encoded, float, float]:
        """(kept, result, error, rtn's error) of the method's result or rtn's, whichever errs less on the held-out windows."""
        plain = Encoded(codec, tuple(w.shape), get_method("rtn").quantize(w, codec, stats))
        trials = [e for e in (plain, mine) if e is not None]
        base, *rest = output_errors(w, (torch.from_numpy(e.decode()).to(w.device) for e in trials), judge)
        own, otherwise = (*rest, base)[0], "awq" if isinstance(self.method, AWQ) else "rtn"
        if mine is None or not own <= base:
            return otherwise, plain, base, base
        return self.method.name, mine, own, base

    def _copy(self, name: str) -> Outcome:
        """A tensor that is stored as it is, but for what `prepare` did to it."""
        task = self.tasks[name]
        w = self.matrix(self.after, name).float().cpu().numpy()
        if task.order is not None:
            w = w.reshape(-1, *w.shape[max(1, w.ndim - 1) :])[task.order].reshape(w.shape)
        if task.value is not None:
            w = task.value.forward(w)
        w = np.ascontiguousarray(w)
        return Outcome(task, task.codec.encode(w), w, "rtn")
