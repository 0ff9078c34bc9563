"""Quantize a model block by block: what a matrix is calibrated on has passed through everything quantized before it.

Two copies of one block are in memory: the model as it is, and as it becomes. Within a block the matrices go in
stages (those that share an input together): collect moments of the inputs, quantize, put the decoded result in place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..archs.weight import Value, numbers
from ..arrays import F32, Parts
from ..calibration.corpus import Ints, Stages
from ..calibration.gather import observing, stored_names
from ..codecs import Codec, Encoded
from ..codecs.integers import ActOrderCodec
from ..codecs.plain import PlainCodec
from ..errors import CalibrationError, NonFiniteError, UnsupportedError
from ..formats import Source
from ..methods import Method, Stats, output_errors
from ..methods import get as get_method
from ..runtime import FUSED, TOKENS_AT_ONCE, Model
from .moments import Moments, lend
from .plan import PlannedTensor

HELD_OUT = 8
"""One window of so many only judges: the better of the method and rtn on it is kept."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)\.weight")
"""A matrix of one expert, as `observing` names it."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where a tensor of the model goes."""

    tensor: PlannedTensor
    order: NDArray[np.int64] | None = None
    """Its rows in the output's order."""
    value: Value | None = None
    """How its numbers change."""
    row: int = 0
    """Where its rows begin in `tensor`: experts are stacked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of a tensor done."""

    output: Output
    parts: Parts
    """As they are stored."""
    weights: F32
    """What they were, in the output's row order."""
    method: str
    """Which one was kept: the one that was asked for, or rtn."""
    output_error: float | None = None
    """Relative squared error of the outputs on held-out windows; see `methods.output_error`."""
    rtn_error: float | None = None
    tokens: int | None = None
    """Calibration tokens that reached it; of an expert, those routed to it."""
    expert: bool = False


class _Enough(Exception):
    """The block has run as far as it had to."""


class _Becoming(Model):
    """The model with its embeddings and norms outside of the blocks as the output will have them."""

    outputs: Mapping[str, Output]

    def block_names(self, i: int) -> dict[str, str]:
        """GGUF name without "blk.N." -> checkpoint name, of one block."""
        stem = f"blk.{i}."
        return {k.removeprefix(stem): v[0] for k, v in stored_names(self).items() if k.startswith(stem) and len(v) == 1}

    def parameter(self, name: str) -> F32:
        w = super().parameter(name)
        output = self.outputs.get(name)
        if output is None or isinstance(output.tensor.target, PlainCodec) or name.startswith(f"{self.prefix}."):
            return w
        codec = output.tensor.target
        return Encoded(codec, w.shape, codec.encode(w)).decode()


@torch.inference_mode()
def quantize_blocks(
    source: Source,
    tensors: Sequence[PlannedTensor],
    ids: Ints,
    method: Method,
    write: Callable[[Outcome], None],
    *,
    device: str = "cpu",
    progress: Stages | None = None,
) -> None:
    """Quantize every tensor of the blocks.

    tensors: all of the output; those outside of the blocks are only read. ids: calibration windows int[windows, ctx].
    write: called with rows of the blocks' tensors as they are done.
    Raises CalibrationError, NonFiniteError, ShapeError, UnsupportedError.
    """
    if not method.needs:
        ids = ids[:1]  # shows in which order matrices run
    elif len(ids) < 2:
        raise CalibrationError(
            "one window of calibration tokens is not enough: one chooses, another judges; give more --calibration-chunks"
        )
    model, becoming = Model(source, source.path.name, device=device), _Becoming(source, source.path.name, device=device)
    becoming.outputs = outputs = _outputs(model, tensors)
    windows = torch.from_numpy(ids).to(model.device)
    batch = max(1, min(TOKENS_AT_ONCE[model.device.type] // windows.shape[1], len(windows)))
    full, hidden = model.enter(windows, batch), becoming.enter(windows, batch)
    for i in range(len(model.layers)):
        _Block(model, becoming, i, outputs, method, batch, full, hidden).run(write)
        if progress:
            progress("blocks", i + 1, len(model.layers))


def _outputs(model: Model, tensors: Sequence[PlannedTensor]) -> dict[str, Output]:
    """The model's own name -> where it goes."""
    found = {}
    by_source = {s: t for t in tensors for s in t.weight.sources}
    forward = {}  # GGUF name -> how it is made of the checkpoint's tensors
    if model.source.format == "gguf" and model.arch is not None:
        forward = {w.name: w for w in model.arch.weights(model.config, {n: p.shape for n, p in model.places.items()})}
    for name, place in model.places.items():
        tensor = by_source.get(place.sources[0])
        if tensor is None:
            continue
        weight = tensor.weight
        if tensor.name != weight.name:  # a checkpoint's tensor: the model's own numbers
            found[name] = Output(tensor)
            continue
        made = forward.get(place.sources[0], weight)
        if len(place.sources) > 1 or sum(place.sources[0] in t.weight.sources for t in tensors) > 1:
            raise UnsupportedError(f"{tensor.name}: a part of {name}; use method rtn")
        at = made.sources.index(name if forward else place.sources[0])
        if weight.experts and not tensor.target.row_local:
            raise UnsupportedError(
                f"{tensor.name}: {tensor.target.name} cannot hold experts that are quantized one by one; use method rtn"
            )
        rows = made.pieces[at].rows if made.order is None else made.order
        row = at * weight.shape[-2] if weight.experts else 0
        found[name] = Output(tensor, None if rows is None else numbers(rows), made.value, row)
    return found


class _Block:
    """One block, as it is and as it becomes: a `methods.Block`."""

    def __init__(
        self,
        model: Model,
        becoming: _Becoming,
        i: int,
        outputs: Mapping[str, Output],
        method: Method,
        batch: int,
        full: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """full, hidden: states in front of it, [windows, ctx, hidden], of the unquantized and of the quantized model."""
        self.model, self.becoming, self.i, self.batch = model, becoming, i, batch
        self.outputs, self.method, self.full, self.hidden = outputs, method, full, hidden
        self.prefix = f"{model.prefix}.{i}"
        self.before, self.after = model.layers[i], becoming.layers[i]
        self.rewritten: set[str] = set()
        """What `Method.prepare` has changed."""

    def run(self, write: Callable[[Outcome], None]) -> None:
        """Quantize, and advance both hidden states."""
        self.model.load(self.before, self.prefix)
        self.becoming.load(self.after, self.prefix)
        self.method.prepare(self)
        left = {n for n in self.outputs if n.startswith(f"{self.prefix}.")}
        for stage in self._stages():
            groups = [[n for n in g if n in left and not self.is_plain(n)] for g in stage]
            groups = [g for g in groups if g]
            for group, moments in zip(groups, self._moments(groups), strict=True):
                for outcome in self._quantize(group, moments):
                    write(outcome)
                left -= set(group)
        for name in sorted(left):  # norms, biases, and what the recipe leaves alone
            write(self._copy(name))
        self.model.run_block(self.i, self.before, self.full, self.batch)
        self.becoming.run_block(self.i, self.after, self.hidden, self.batch)
        Model.unload(self.before)
        Model.unload(self.after)

    def is_plain(self, name: str) -> bool:
        """True if it is not quantized."""
        return isinstance(self.outputs[name].tensor.target, PlainCodec)

    # ---- inputs

    def _stages(self) -> list[list[list[str]]]:
        """Matrices in the order in which they run: stages of groups; a group shares its input, a stage's groups are experts."""
        seen: dict[Any, dict[tuple[str, ...], None]] = {}
        held: list[torch.Tensor] = []  # keeps addresses from being used twice

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            held.append(x)
            expert = _EXPERT.fullmatch(names[0])
            key = f"{expert[1]}.*.{expert[3]}" if expert else (x.data_ptr(), x.shape)
            seen.setdefault(key, {})[tuple(names)] = None

        with observing(self.after, self.prefix, note):
            self.becoming.run_block(self.i, self.after, self.hidden[: self.batch].clone(), self.batch)
        return [
            [list(g) for g in groups] if isinstance(key, str) else [[n for g in groups for n in g]]
            for key, groups in seen.items()
        ]

    def inputs(self, model: Model, layer: nn.Module, hidden: torch.Tensor, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """The inputs of some matrices; the block runs no further than it must."""
        found: dict[str, torch.Tensor] = {}

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            found.update({n: x for n in names if n in wanted})
            if len(found) == len(wanted):
                raise _Enough

        with observing(layer, self.prefix, note), suppress(_Enough):
            model.run_block(self.i, layer, hidden.clone(), self.batch)
        return found

    def _moments(self, groups: list[list[str]]) -> list[Moments]:
        """Moments of the first matrix's input of each group."""
        firsts, needs = [g[0] for g in groups], self.method.needs
        found = [Moments(needs) for _ in groups]
        if not groups or not needs:
            return found
        routed = _EXPERT.fullmatch(firsts[0]) is not None  # an expert's tokens differ between the two: nothing to compare
        first = 0
        for theirs, ours in zip(torch.split(self.full, self.batch), torch.split(self.hidden, self.batch), strict=True):
            windows, ctx = torch.arange(first, first + len(ours)), ours.shape[1]
            judges = windows % HELD_OUT == HELD_OUT - 1 if len(self.hidden) >= HELD_OUT else windows == len(self.hidden) - 1
            compared = not routed and ("hessian" in needs or bool(judges.any()))
            first += len(ours)
            x = self.inputs(self.becoming, self.after, ours, firsts)
            x0 = self.inputs(self.model, self.before, theirs, firsts) if compared else {}
            for name, moments in zip(firsts, found, strict=True):
                tokens = torch.arange(len(x[name]))  # of experts, every eighth token judges
                moments.add(x[name], x0.get(name), tokens % HELD_OUT == HELD_OUT - 1 if routed else judges.repeat_interleave(ctx))
        if routed:
            lend(found)
        return found

    # ---- what `Method.prepare` may change

    def groups(self) -> Iterator[_Group]:
        """See `methods.Block`."""
        arch = self.model.arch
        stem = f"blk.{self.i}."
        stored = stored_names(self.becoming) if arch else {}
        names = {k.removeprefix(stem): v[0] for k, v in stored.items() if k.startswith(stem) and len(v) == 1}
        for group in arch.scale_groups if arch else ():
            feeders = [names[n] for n in (f"{group.source}.weight", f"{group.source}.bias") if n in names]
            targets = [t for role in group.targets if (t := names.get(f"{role}.weight", "")) in self.outputs]
            if f"{group.source}.weight" not in names or len(targets) < len(group.targets):
                continue
            matrices = [self.matrix(self.after, t) for t in targets]
            if any(self.is_plain(t) for t in targets) or any(w.ndim != 2 for w in matrices):
                continue
            rows, n = len(self.matrix(self.after, feeders[0])), matrices[0].shape[1]
            repeat = n // rows  # query heads per value head
            head = rows // int(getattr(self.model.module.config, "num_key_value_heads", 1) or 1) if repeat > 1 else n
            if repeat * rows == n and head > 0:
                yield _Group(self, targets, feeders, repeat, head)

    # ---- weights

    def matrix(self, layer: nn.Module, name: str) -> torch.Tensor:
        """A matrix or vector of a block by its checkpoint name: a view of the module's parameter."""
        path = name.removeprefix(f"{self.prefix}.")
        match = _EXPERT.fullmatch(path)
        if match:
            module, e = layer.get_submodule(match[1]), int(match[2])
            for fused, parts in FUSED.items():
                if match[3] in parts and isinstance(w := getattr(module, fused[1:], None), nn.Parameter):
                    size = w.shape[1] // len(parts)
                    at = parts.index(match[3]) * size
                    return w.data[e, at : at + size]
        return layer.get_parameter(path).data

    def _quantize(self, group: list[str], moments: Moments) -> list[Outcome]:
        """Quantize matrices that share an input, and put what they have become in place."""
        stats, judge = moments.choosing.stats(), moments.judging.stats()
        if self.method.needs and (stats is None or judge is None):
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
            codec = self.outputs[name].tensor.target
            together = codec.row_local or isinstance(codec, ActOrderCodec)  # whose groups follow from the inputs
            found.setdefault(codec.name if together else name, []).append(name)
        return list(found.values())

    def _largest(self, name: str) -> float:
        """The largest magnitude in a tensor of the output."""
        joined = [n for n, o in self.outputs.items() if o.tensor.name == name]
        return max(float(self.matrix(self.before, n).abs().max()) for n in joined)

    def _choose(self, names: list[str], stats: Stats | None, judge: Stats | None) -> list[Outcome]:
        """Quantize matrices of one codec; of each, keep what errs less on the held-out windows."""
        codec = self.outputs[names[0]].tensor.sharing(self._largest)
        ws, orders = [], []
        for name in names:
            output = self.outputs[name]
            if output.value is not None:
                raise UnsupportedError(f"{name}: its numbers change on the way to the output; {self.method.name} cannot follow")
            rows = None if output.order is None else torch.from_numpy(output.order)
            w = self.matrix(self.before, name).float()
            ws.append(w if rows is None else w[rows.to(w.device)])
            orders.append(rows)
        together: Encoded | None = None
        if self.method.takes(codec) and self.method != get_method("rtn"):
            whole = torch.cat(ws)
            together = Encoded(codec, tuple(whole.shape), self.method.quantize(whole, codec, stats))
        outcomes, first = [], 0
        for name, w, rows in zip(names, ws, orders, strict=True):
            mine = together
            if together is not None and len(names) > 1:
                mine = together.rows(slice(first, first + len(w)))
            first += len(w)
            output = self.outputs[name]
            kept, encoded, error, rtn = self._better(name, w, codec, mine, stats, judge)
            result = torch.from_numpy(encoded.decode()).to(w.device)
            self.matrix(self.after, name).copy_(result if rows is None else result[rows.argsort().to(w.device)])
            expert = _EXPERT.fullmatch(name) is not None
            outcomes.append(Outcome(output, output.tensor.stored(encoded), w.cpu().numpy(), kept, error, rtn, expert=expert))
        return outcomes

    def _better(
        self, name: str, w: torch.Tensor, codec: Codec, mine: Encoded | None, stats: Stats | None, judge: Stats | None
    ) -> tuple[str, Encoded, float | None, float | None]:
        """(kept, result, error, rtn's error): the method's result or rtn's, whichever errs less on the held-out windows."""
        if mine is not None and judge is None:
            return self.method.name, mine, None, None
        plain = Encoded(codec, tuple(w.shape), get_method("rtn").quantize(w, codec, stats))
        otherwise = self.method.rewrite if name in self.rewritten else "rtn"
        if judge is None:
            return otherwise, plain, None, None
        trials = [e for e in (plain, mine) if e is not None]
        base, *own = output_errors(w, (torch.from_numpy(e.decode()).to(w.device) for e in trials), judge)
        if mine is None or not own[0] <= base:
            return otherwise, plain, base, base
        return self.method.name, mine, own[0], base

    def _copy(self, name: str) -> Outcome:
        """A tensor that is stored as it is, but for what `Method.prepare` did to it."""
        output = self.outputs[name]
        w = self.matrix(self.after, name).float().cpu().numpy()
        if output.order is not None:
            w = w.reshape(-1, *w.shape[max(1, w.ndim - 1) :])[output.order].reshape(w.shape)
        if output.value is not None:
            w = output.value.forward(w)
        w = np.ascontiguousarray(w)
        codec = output.tensor.target
        return Outcome(output, output.tensor.stored(Encoded(codec, w.shape, codec.encode(w))), w, "rtn")


class _Group:
    """Matrices whose columns can be scaled: a `methods.Group`."""

    def __init__(self, block: _Block, targets: Sequence[str], feeders: Sequence[str], repeat: int, head: int) -> None:
        """feeders: weight and bias of what makes their input, repeat: how often each of its heads, of size `head`, goes there."""
        self.block, self.targets, self.feeders, self.repeat, self.head = block, targets, feeders, repeat, head
        self._places = [block.matrix(block.after, t) for t in targets]
        self.matrices: Sequence[torch.Tensor] = [w.clone() for w in self._places]
        self.codecs: Sequence[Codec] = [block.outputs[t].tensor.target for t in targets]
        # two batches from all over the text; the block's masks are known for this number of windows
        full, batch = block.full, block.batch
        at = torch.linspace(0, len(full) - 1, min(len(full), 2 * batch)).long()
        self._chosen, self._held_out = (full[at[k :: max(1, len(at) // batch)]][:batch] for k in (0, len(at) // batch - 1))

    @cached_property
    def importance(self) -> torch.Tensor:
        """See `methods.Group`."""
        block = self.block
        inputs = block.inputs(block.model, block.before, self._chosen, self.targets[:1])
        return inputs[self.targets[0]].float().square().mean(0)

    @cached_property
    def loss(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """See `methods.Group`."""
        return self._loss(self._chosen)

    @cached_property
    def judge(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """See `methods.Group`."""
        return self._loss(self._held_out)

    def _loss(self, windows: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], float]:
        def output() -> torch.Tensor:
            states = windows.clone()
            self.block.becoming.run_block(self.block.i, self.block.after, states, self.block.batch)
            return states

        expected = output()

        def loss(others: Sequence[torch.Tensor]) -> float:
            for w, other in zip(self._places, others, strict=True):
                w.copy_(other)
            out = output()
            for w, w0 in zip(self._places, self.matrices, strict=True):
                w.copy_(w0)
            return float((out - expected).square_().mean(dtype=torch.float64))

        return loss

    def share(self, s: torch.Tensor) -> torch.Tensor:
        """See `methods.Group`."""
        heads = s.reshape(-1, self.repeat, self.head) if self.repeat > 1 else s.reshape(-1, 1, len(s))
        return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)

    def scale(self, s: torch.Tensor) -> None:
        """See `methods.Group`: in both copies of the block."""
        block = self.block
        divisor = s if self.repeat == 1 else s.reshape(-1, self.repeat, self.head)[:, 0].reshape(-1)
        for layer in (block.before, block.after):
            for t in self.targets:
                block.matrix(layer, t).mul_(s)
            for f in self.feeders:
                _divide(block.matrix(layer, f), divisor, block.outputs[f].value)
        block.rewritten.update(self.targets, self.feeders)


def _divide(w: torch.Tensor, s: torch.Tensor, value: Value | None) -> None:
    """Divide the rows of what feeds a group; norms that add 1 to their weight are divided with the 1 in it."""
    if value is not None:
        divided = value.back((torch.from_numpy(value.forward(w.cpu().numpy())).to(w) / s).cpu().numpy())
        w.copy_(torch.from_numpy(divided))
    else:
        w.div_(s if w.ndim == 1 else s[:, None])
