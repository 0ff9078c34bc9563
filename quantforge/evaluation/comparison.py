"""Models side by side on windows of text: what each makes of every token, and how far it is from the first on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32
from ..calibration.corpus import Stages, Windows
from ..errors import NonFiniteError
from .metrics import Bootstrap, Metric, Score, Seen, Tokens
from .report import TensorError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..runtime import Model

_LOGITS_AT_ONCE = 1 << 19
"""Logits of one model that exist together: 2 MB, which stay in a core's cache."""
_OBSERVED = 16384
"""Tokens from which input statistics and the error of hidden states are taken."""


class Comparison:
    """One pass of all models over all windows. The first is the reference.

    `score` and `collected` have the statistics of every token; `hidden_error` and `tensors`, of each model, what was seen on
    the way; the bytes are what was held at a time.
    """

    def __init__(self, models: list[Model], windows: Windows, metrics: Sequence[Metric], tell: Stages) -> None:
        self.models, self.windows, self.tell = models, windows, tell
        device = str(models[0].device)
        made = {m.name: m.collector(len(models), len(windows.targets), device) for m in metrics if m.needs == "text"}
        self.collected = {name: collector for name, collector in made.items() if collector is not None}
        self.score = Score([m.name for m in models], windows.targets, device, list(self.collected.values()))
        self.hidden_error: list[list[float]] = [[] for _ in models]
        self.tensors: list[list[TensorError]] = [[] for _ in models]
        self.block_bytes = self.hidden_bytes = self.head_bytes = self.logit_bytes = 0
        self._inputs: dict[str, F32] = {}
        self._hooks: list[Any] = []
        self._roles = models[0].roles()

    @property
    def held_bytes(self) -> int:
        """What is held by design: hidden states, and one block or a slice of the head of each model."""
        return self.hidden_bytes + max(self.block_bytes, self.head_bytes + self.logit_bytes)

    def go(self) -> None:
        """Advance, then score."""
        import torch

        from ..runtime import advance, finish

        ids, scored = torch.from_numpy(self.windows.ids), torch.from_numpy(self.windows.scored)
        hidden = advance(
            self.models, ids, before=self._before, after=self._after, progress=lambda done, of: self.tell("blocks", done, of)
        )
        self.hidden_bytes = sum(h.nbytes for h in hidden)
        with torch.inference_mode():
            states = finish(self.models, hidden, scored)
            del hidden
            self._apply_heads(states)

    # ---- around each block

    def _before(self, i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        """Have the reference's linears note the mean square of their inputs."""
        import torch

        self.block_bytes = max(self.block_bytes, sum(p.nbytes for b in blocks for p in (*b.parameters(), *b.buffers())))
        self._inputs.clear()
        seen: dict[str, int] = defaultdict(int)

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].detach().reshape(-1, args[0].shape[-1])
                if seen[name] < _OBSERVED:
                    seen[name] += len(x)
                    self._inputs[name] = self._inputs.get(name, np.float32(0)) + _square(x)

            return hook

        self._hooks = [
            m.register_forward_pre_hook(note(k)) for k, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)
        ]

    def _after(self, i: int, blocks: Sequence[nn.Module], hidden: Sequence[torch.Tensor]) -> None:
        """Compare hidden states and weights with the reference's."""
        for hook in self._hooks:
            hook.remove()
        rows = max(1, _OBSERVED // hidden[0].shape[1])
        ref = hidden[0][:rows]
        norm = float(ref.norm())
        stem = f"{self.models[0].prefix}.{i}"
        for k in range(1, len(self.models)):
            if hidden[k].shape == hidden[0].shape:
                self.hidden_error[k].append(float((hidden[k][:rows].float() - ref).norm()) / norm)
            if self.models[k].source is self.models[0].source:
                continue
            for name, w in blocks[0].named_parameters():
                if (other := _weight(blocks[k], name)) is not None and other.shape == w.shape:
                    difference = _Difference()
                    difference.add(w, other)
                    self._note(k, f"{stem}.{name}", i, w.shape, difference, self._inputs.get(name.removesuffix(".weight")))

    def _note(
        self, k: int, name: str, layer: int | None, shape: Sequence[int], difference: _Difference, square: F32 | None
    ) -> None:
        if not (parts := self.models[k].parts(name)):
            return
        codec, stored = self.models[k].stored(parts[0])
        role = self._roles.get(name, name.removesuffix(".weight").split(f"{self.models[0].prefix}.{layer}.")[-1])
        bits = 8 * codec.nbytes(stored) / max(1, prod(stored))
        error = TensorError(name, role, layer, codec.name, list(shape), bits, difference.relative(), difference.relative(square))
        self.tensors[k].append(error if square is not None else replace(error, weighted_error=None))

    # ---- the head

    def _apply_heads(self, states: list[torch.Tensor]) -> None:
        """Slices of the vocabulary, decoded once for every model, meet slices of all scored tokens."""
        from ..runtime import rows_at_once

        with ExitStack() as stack:
            heads = [stack.enter_context(m.head()) for m in self.models]
            self._compare_outer({heads[0].name: _square(states[0][:_OBSERVED])})
            vocabulary, tokens = heads[0].vocabulary, len(states[0])
            slices = 1 if any(h.whole for h in heads) else -(-vocabulary // rows_at_once(heads[0].width, len(heads)))
            step = -(-vocabulary // slices)
            some = min(tokens, max(16, _LOGITS_AT_ONCE // step))
            for n, a in enumerate(range(0, vocabulary, step)):
                for h in heads:
                    h.take(slice(a, min(a + step, vocabulary)))
                self.head_bytes = max(self.head_bytes, sum(h.nbytes for h in heads))
                self.logit_bytes = max(self.logit_bytes, 4 * 4 * some * step)
                for t in range(0, tokens, some):
                    at = slice(t, min(t + some, tokens))
                    try:
                        self.score.add((h(s[at]) for h, s in zip(heads, states, strict=True)), at, a)
                    except NonFiniteError as e:
                        raise NonFiniteError(
                            f"{e}, though weights are: {heads[e.index[0]].name} makes it overflow", e.index
                        ) from None
                    self.tell("tokens", n * tokens + at.stop, slices * tokens)

    def _compare_outer(self, squares: Mapping[str, F32]) -> None:
        """Embedding, head and final norm against the reference's, some rows at a time."""
        import torch

        from ..runtime import rows_at_once

        ref = self.models[0]
        for name, shape in ref.outer_parameters().items():
            for k, m in enumerate(self.models):
                if m.source is ref.source or name not in m.places or m.stored(name)[1] != shape:
                    continue
                difference, step = _Difference(), rows_at_once(shape[-1], 8) if len(shape) > 1 else shape[0]
                for a in range(0, shape[0], step):
                    rows = slice(a, min(a + step, shape[0]))
                    difference.add(*(torch.from_numpy(x.decode(name, rows)) for x in (ref, m)))
                self._note(k, name, None, shape, difference, squares.get(name))

    # ---- what came of it

    @cached_property
    def clusters(self) -> tuple[Bootstrap, str]:
        """Of the scored tokens in their order, and what a cluster is."""
        clusters, what = self.windows.clusters()
        return Bootstrap(clusters), what

    def seen(self, model: int, metric: str) -> Seen:
        """What a metric is given of a model."""
        tokens, collected = self._tokens, self.collected.get(metric)
        return Seen(model, tokens[model], tokens[0], self.score.targets, self.clusters[0], collected)

    @cached_property
    def _tokens(self) -> list[Tokens]:
        return [self.score.tokens(i) for i in range(len(self.models))]


class _Difference:
    """Sums over rows of a tensor's squares and of those of its difference from another, column by column."""

    def __init__(self) -> None:
        self.difference: Any = 0
        self.whole: Any = 0

    def add(self, w: torch.Tensor, other: torch.Tensor) -> None:
        """Rows of the reference, and the same rows of the other."""
        w, other = (x.float().reshape(-1, x.shape[-1]) for x in (w, other))
        self.difference += (other - w).square_().sum(0).double()
        self.whole += w.square().sum(0).double()

    def relative(self, weight: F32 | None = None) -> float | None:
        """Relative root mean square error; weight: of each column."""
        import torch

        q = 1 if weight is None else torch.from_numpy(weight).to(self.whole)
        whole = float((self.whole * q).sum())
        return float((self.difference * q).sum() / whole) ** 0.5 if whole else None


def _square(x: torch.Tensor) -> F32:
    """Sum of squares of each column."""
    return np.asarray((x.float() ** 2).sum(0).cpu().numpy(), np.float32)


def _weight(block: nn.Module, name: str) -> torch.Tensor | None:
    """A block's parameter by its name, decoded where it is stored otherwise; None if it has none of that name."""
    import torch

    from ..nn import QuantExperts, QuantLinear

    path, _, leaf = name.rpartition(".")
    owner = dict(block.named_modules()).get(path)
    if isinstance(owner, QuantLinear) and leaf == "weight":
        return owner.dequantize()
    weight = getattr(owner, leaf, None)
    if isinstance(weight, QuantExperts):
        return torch.stack([weight[i] for i in range(len(weight))])
    return weight if isinstance(weight, torch.Tensor) else None
