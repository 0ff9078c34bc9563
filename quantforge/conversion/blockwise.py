"""Quantize a model block by block: what a matrix is calibrated on has passed through everything quantized before it.

Two copies of one block are in memory: the model as it is, and as it becomes. Within a block the matrices go in
stages (those that share an input together): collect moments of the inputs, quantize, put the decoded result in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from .. import codecs
from ..archs.weight import Value
from ..arrays import F32
from ..calibration.corpus import Ints, Stages
from ..calibration.gather import observing
from ..codecs import Codec, Encoded
from ..codecs.integers import ActOrderCodec
from ..codecs.plain import PlainCodec
from ..device import decode_on
from ..errors import CalibrationError, NonFiniteError, ShapeError, UnsupportedError
from ..formats import Source
from ..formats.rows import decoded, read_rows
from ..methods import Method, Stats, output_errors
from ..methods import get as get_method
from ..runtime import TOKENS_AT_ONCE, Model
from ..runtime.stored import Held, expert_of
from .moments import Moments, lend
from .outputs import Outcome, Output, Outputs, is_expert, role_of_experts
from .plan import PlannedTensor

HELD_OUT = 8
"""One window of so many only judges: the better of the method and rtn on it is kept."""


class _Enough(Exception):
    """The block has run as far as it had to."""


class _Becoming(Model):
    """The model with its embeddings and norms outside of the blocks as the output will have them."""

    outputs: Outputs

    def parameter(self, name: str) -> F32:
        w = super().parameter(name)
        outputs = self.outputs.of.get(name, ())
        if len(outputs) != 1 or isinstance(outputs[0].tensor.target, PlainCodec) or name.startswith(f"{self.prefix}."):
            return w
        codec = outputs[0].tensor.target
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
    becoming.outputs = outputs = Outputs.find(model, tensors)
    windows = torch.from_numpy(ids).to(model.device)
    batch = max(1, min(TOKENS_AT_ONCE[model.device.type] // windows.shape[1], len(windows)))
    full, hidden = model.enter(windows, batch), becoming.enter(windows, batch)
    for i in range(len(model.layers)):
        _Block(model, becoming, i, outputs, method, batch, full, hidden).run(write)
        if progress:
            progress("blocks", i + 1, len(model.layers))


class _Block:
    """One block, as it is and as it becomes: a `methods.Block`."""

    def __init__(
        self,
        model: Model,
        becoming: _Becoming,
        i: int,
        outputs: Outputs,
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
        own = set(self.model.names(self.i))
        left = {n: t for n, t in self.outputs.tensors.items() if n in self.outputs.made and self._is_own(n, own)}
        done: set[str] = set()
        stages = self._stages()
        for stage in [list(chain(*stages))] if self.method.one_pass else stages:
            groups = [[n for n in g if n not in done and self._quantized(n)] for g in stage]
            groups = [g for g in groups if g]
            for group, moments in zip(groups, self._moments(groups), strict=True):
                for outcome in self._quantize(group, moments):
                    write(outcome)
                done |= set(group)
        for name in sorted(left):  # norms, biases, and what the recipe leaves alone
            if not self._written(name, done):
                write(self._copy(name))
        self.model.run_block(self.i, self.before, self.full, self.batch)
        self.becoming.run_block(self.i, self.after, self.hidden, self.batch)
        Model.unload(self.before)
        Model.unload(self.after)

    def _is_own(self, tensor: str, own: set[str]) -> bool:
        """Is a tensor of the output made of this block's?"""
        return any(s in own for s in self.outputs.made[tensor].sources)

    def _quantized(self, name: str) -> list[Output]:
        """Where rows of a matrix go that are rounded."""
        return [o for o in self.outputs.of.get(name, ()) if not isinstance(o.tensor.target, PlainCodec)]

    def _written(self, tensor: str, done: set[str]) -> bool:
        """Have all rows of a tensor been written? Raises UnsupportedError where only some have."""
        having = [n for n, outputs in self.outputs.of.items() if any(o.tensor.name == tensor for o in outputs)]
        written = [n for n in having if n in done and any(o.tensor.name == tensor for o in self._quantized(n))]
        if written and len(written) < len(having):
            missing = next(n for n in having if n not in written)
            raise UnsupportedError(f"{tensor}: {missing} is never multiplied with anything; use method rtn")
        return bool(written)

    # ---- inputs

    def _stages(self) -> list[list[list[str]]]:
        """Matrices in the order in which they run: stages of groups; a group shares its input, a stage's groups are experts."""
        seen: dict[Any, dict[tuple[str, ...], None]] = {}
        held: list[torch.Tensor] = []  # keeps addresses from being used twice

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            held.append(x)
            key = role_of_experts(names[0]) or (x.data_ptr(), x.shape)
            seen.setdefault(key, {})[tuple(names)] = None

        with observing(self.after, self.becoming, self.i, note):
            self.becoming.run_block(self.i, self.after, self.hidden[: self.batch].clone(), self.batch)
        return [
            [list(g) for g in groups] if isinstance(key, str) else [[n for g in groups for n in g]]
            for key, groups in seen.items()
        ]

    def inputs(
        self, model: Model, layer: nn.Module, hidden: torch.Tensor, first: int, wanted: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The inputs of some matrices for the windows from `first` on; the block runs no further than it must."""
        inputs: dict[str, torch.Tensor] = {}

        def note(names: Sequence[str], x: torch.Tensor) -> None:
            inputs.update({n: x for n in names if n in wanted})
            if len(inputs) == len(wanted):
                raise _Enough

        with observing(layer, model, self.i, note), suppress(_Enough):
            model.run_block(self.i, layer, hidden.clone(), self.batch, first)
        return inputs

    def _moments(self, groups: list[list[str]]) -> list[Moments]:
        """Moments of the first matrix's input of each group."""
        firsts, needs = [g[0] for g in groups], self.method.needs
        gathered = [Moments(needs) for _ in groups]
        if not groups or not needs:
            return gathered
        routed = {n for n in firsts if is_expert(n)}  # an expert's tokens differ between the two: nothing to compare
        first = 0
        for theirs, ours in zip(torch.split(self.full, self.batch), torch.split(self.hidden, self.batch), strict=True):
            windows, ctx = torch.arange(first, first + len(ours)), ours.shape[1]
            judges = windows % HELD_OUT == HELD_OUT - 1 if len(self.hidden) >= HELD_OUT else windows == len(self.hidden) - 1
            compared = [n for n in firsts if n not in routed] if "hessian" in needs or bool(judges.any()) else []
            x = self.inputs(self.becoming, self.after, ours, first, firsts)
            x0 = self.inputs(self.model, self.before, theirs, first, compared) if compared else {}
            first += len(ours)
            for name, moments in zip(firsts, gathered, strict=True):
                tokens = torch.arange(len(x[name]))  # of experts, every eighth token judges
                every = tokens % HELD_OUT == HELD_OUT - 1 if name in routed else judges.repeat_interleave(ctx)
                moments.add(x[name], x0.get(name), every)
        for role in sorted({role_of_experts(n) for n in routed}):
            lend([moments for n, moments in zip(firsts, gathered, strict=True) if role_of_experts(n) == role])
        return gathered

    # ---- what `Method.prepare` may change

    def groups(self) -> Iterator[_Group]:
        """See `methods.Block`."""
        arch = self.model.arch
        stem = f"blk.{self.i}."
        of_block = {k.removeprefix(stem): w for k, w in self.model.gguf.items() if k.startswith(stem) and len(w.pieces) == 1}
        names = {k: w.sources[0] for k, w in of_block.items()}
        part = {k for k, w in of_block.items() if w.pieces[0].rows is not None or w.pieces[0].groups}
        for group in arch.scale_groups if arch else ():
            sources = [n for n in (f"{group.source}.weight", f"{group.source}.bias") if n in names]
            feeders = [names[n] for n in sources]
            targets = list(dict.fromkeys(names.get(f"{role}.weight", "") for role in group.targets))
            if f"{group.source}.weight" not in sources or part & {*sources}:  # a part of what else is scaled with it
                continue
            if not all(len(self._quantized(t)) == 1 for t in targets):
                continue
            matrices = [self.matrix(self.after, t) for t in targets]
            if any(w.ndim != 2 for w in matrices):
                continue
            rows, n = len(self.matrix(self.after, feeders[0])), matrices[0].shape[1]
            repeat = n // rows  # query heads per value head
            head = rows // int(getattr(self.model.module.config, "num_key_value_heads", 1) or 1) if repeat > 1 else n
            if repeat * rows == n and head > 0:
                yield _Group(self, targets, feeders, repeat, head)

    def value_of(self, name: str) -> Value | None:
        """How the numbers of a tensor of the model change on the way to the output."""
        return next((w.value for w in self.outputs.made.values() if name in w.sources), None)

    # ---- weights

    def matrix(self, layer: nn.Module, name: str) -> torch.Tensor:
        """A matrix [out, in] or a vector of a block by its checkpoint name: a view of the module's parameter."""
        w = (self.becoming if layer is self.after else self.model).matrix(self.i, name)
        return w.T if w.ndim == 2 and expert_of(name)[0] in self.model.crosswise else w

    def _quantize(self, group: list[str], moments: Moments) -> list[Outcome]:
        """Quantize matrices that share an input, and put what they have become in place."""
        stats, judge = moments.choosing.stats(), moments.judging.stats()
        if self.method.needs and (stats is None or judge is None):
            raise CalibrationError(f"{group[0]}: no calibration token reached it; calibrate with more text")
        outcomes = []
        for parts in self._alike(group):
            try:
                outcomes += [replace(o, tokens=moments.seen) for o in self._choose(parts, stats, judge)]
            except NonFiniteError as e:
                raise NonFiniteError(f"{parts[0][0]}: {e}", ()) from None
            except CalibrationError as e:
                raise CalibrationError(f"{parts[0][0]}: {e}") from None
            except ShapeError as e:  # a short last group, which plain rounding has
                raise ShapeError(f"{parts[0][0]}: {e}; or a --group-size that divides the rows, or --method rtn") from None
        return outcomes

    def _alike(self, group: list[str]) -> list[list[tuple[str, Output]]]:
        """Rows of matrices, of one codec, that can be quantized together: one factor of the Hessian, one loop over columns."""
        alike: dict[Any, list[tuple[str, Output]]] = {}
        for name in group:
            for output in self._quantized(name):
                codec = output.tensor.target
                together = codec.row_local or isinstance(codec, ActOrderCodec)  # whose groups follow from the inputs
                order = None if output.columns is None else output.columns.tobytes()
                alike.setdefault((codec.name, order) if together else (name, output.tensor.name), []).append((name, output))
        return list(alike.values())

    def _largest(self, name: str) -> float:
        """The largest magnitude in a tensor of the output."""
        joined = [n for n, outputs in self.outputs.of.items() if any(o.tensor.name == name for o in outputs)]
        return max(float(self.matrix(self.before, n).abs().max()) for n in joined)

    def _choose(self, parts: list[tuple[str, Output]], stats: Stats | None, judge: Stats | None) -> list[Outcome]:
        """Quantize rows of one codec; of each tensor's, keep what errs less on the held-out windows."""
        codec, columns = parts[0][1].tensor.sharing(self._largest), parts[0][1].columns
        if columns is not None:
            order = torch.from_numpy(columns).to(self.hidden.device)
            stats, judge = (None if s is None else s.reordered(order) for s in (stats, judge))
        ws = [output.take(self.matrix(self.before, name)).float() for name, output in parts]
        together: Encoded | None = None
        if self.method.takes(codec) and self.method != get_method("rtn"):
            whole = torch.cat(ws)
            together = Encoded(codec, tuple(whole.shape), self.method.quantize(whole, codec, stats))
        outcomes, first = [], 0
        for (name, output), w in zip(parts, ws, strict=True):
            mine = together
            if together is not None and len(parts) > 1:
                mine = together.rows(slice(first, first + len(w)))
            first += len(w)
            kept, encoded, result, error, rtn = self._better(name, w, codec, mine, stats, judge)
            output.put(self.matrix(self.after, name), result)
            expert = bool(output.tensor.weight.experts) or is_expert(name)
            outcomes.append(Outcome(output, output.tensor.stored(encoded), w.cpu().numpy(), kept, error, rtn, expert=expert))
        return outcomes

    def _better(
        self, name: str, w: torch.Tensor, codec: Codec, mine: Encoded | None, stats: Stats | None, judge: Stats | None
    ) -> tuple[str, Encoded, torch.Tensor, float | None, float | None]:
        """(kept, result, decoded, error, rtn's error): of the method's result and rtn's, what errs less on held-out windows."""
        if mine is not None and judge is None:
            return self.method.name, mine, decode_on(mine, w.device), None, None
        plain = Encoded(codec, tuple(w.shape), get_method("rtn").quantize(w, codec, stats))
        otherwise, rounded = self.method.rewrite if name in self.rewritten else "rtn", decode_on(plain, w.device)
        if judge is None:
            return otherwise, plain, rounded, None, None
        chosen = None if mine is None else decode_on(mine, w.device)
        base, *own = output_errors(w, [q for q in (rounded, chosen) if q is not None], judge)
        if mine is None or chosen is None or not own[0] <= base:
            return otherwise, plain, rounded, base, base
        return self.method.name, mine, chosen, own[0], base

    def _copy(self, name: str) -> Outcome:
        """A tensor that no method chooses codes for, with what `Method.prepare` did to it."""
        tensor, made, plain = self.outputs.tensors[name], self.outputs.made[name], codecs.get("F32")
        held = {}
        try:
            for s in made.sources:
                w = self.becoming.matrix(self.i, s).float().cpu().numpy()
                held[s] = Encoded(plain, w.shape, plain.encode(np.ascontiguousarray(w)))
            w = decoded(read_rows(cast("Source", Held(held)), made)).reshape(tensor.shape)
        except UnsupportedError:  # no part of a parameter as it is, so that nothing has changed it
            w = decoded(read_rows(self.model.source, tensor.weight)).reshape(tensor.shape)
        parts = tensor.stored(Encoded(tensor.target, w.shape, tensor.target.encode(np.ascontiguousarray(w))))
        return Outcome(Output(tensor), parts, w, "rtn")


class _Group:
    """Matrices whose columns can be scaled: a `methods.Group`."""

    def __init__(self, block: _Block, targets: Sequence[str], feeders: Sequence[str], repeat: int, head: int) -> None:
        """feeders: weight and bias of what makes their input, repeat: how often each of its heads, of size `head`, goes there."""
        self.block, self.targets, self.feeders, self.repeat, self.head = block, targets, feeders, repeat, head
        self._places = [block.matrix(block.after, t) for t in targets]
        self.matrices: Sequence[torch.Tensor] = [w.clone() for w in self._places]
        self.codecs: Sequence[Codec] = [block.outputs.of[t][0].tensor.target for t in targets]
        # two batches, where blocks are given nothing else of the text from all over it; masks are known for their length
        full, batch = block.full, block.batch
        firsts = [k for k in range(0, len(full), batch) if k + batch <= len(full)] or [0]
        self._chosen, self._held_out = ((full[k : k + batch], k) for k in (firsts[0], firsts[-1]))
        if not block.becoming.varying:
            at = torch.linspace(0, len(full) - 1, min(len(full), 2 * batch)).long()
            step, last = max(1, len(at) // batch), len(at) // batch - 1
            self._chosen, self._held_out = ((full[at[k::step]][:batch], 0) for k in (0, last))

    @cached_property
    def importance(self) -> torch.Tensor:
        """See `methods.Group`."""
        block = self.block
        inputs = block.inputs(block.model, block.before, *self._chosen, self.targets[:1])
        return inputs[self.targets[0]].float().square().mean(0)

    @cached_property
    def loss(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """See `methods.Group`."""
        return self._loss(*self._chosen)

    @cached_property
    def judge(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """See `methods.Group`."""
        return self._loss(*self._held_out)

    def _loss(self, windows: torch.Tensor, first: int) -> Callable[[Sequence[torch.Tensor]], float]:
        def output() -> torch.Tensor:
            states = windows.clone()
            self.block.becoming.run_block(self.block.i, self.block.after, states, self.block.batch, first)
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
                _divide(block.matrix(layer, f), divisor, block.value_of(f))
        block.rewritten.update(self.targets, self.feeders)


def _divide(w: torch.Tensor, s: torch.Tensor, value: Value | None) -> None:
    """Divide the rows of what feeds a group; norms that add 1 to their weight are divided with the 1 in it."""
    if value is not None:
        divided = value.back((torch.from_numpy(value.forward(w.cpu().numpy())).to(w) / s).cpu().numpy())
        w.copy_(torch.from_numpy(divided))
    else:
        w.div_(s if w.ndim == 1 else s[:, None])
