"""The output layer of a model, some rows of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .model import Model

SLICE_BYTES = 32 << 20
"""Embeddings and heads are decoded in slices of rows; what the slices of all models take together."""


class Head:
    """The output layer of a model for some rows of the vocabulary at a time.

    transformers' own code runs around a linear map of these rows alone, so that whatever it does to
    logits (scaling, soft caps) is done. Where it does something that is not column by column, `whole` is true:
    all rows are needed at once.
    """

    def __init__(self, model: Model, base: nn.Module, linear: nn.Linear, output: type) -> None:
        self._model, self._base, self._linear, self._output = model, base, linear, output
        own = next(k for k, m in model.module.named_modules() if m is linear) + ".weight"
        self.name = model.tied.get(own, own)
        """Of the matrix, in the checkpoint."""
        model.check_shape(self.name, model.stored(self.name)[1], tuple(linear.weight.shape))
        self.vocabulary, self.width = linear.weight.shape
        self._bias = None
        if getattr(linear, "bias", None) is not None:
            self._bias = model.tensor(model.decode(own.removesuffix("weight") + "bias"))
        self._weight = self._part = torch.empty(0)
        self.whole = not self._by_column()

    def _by_column(self) -> bool:
        """Does transformers treat every logit by itself? Seen from what it makes of random ones, and of some of them."""
        logits = torch.randn(1, 1, self.vocabulary, generator=torch.Generator().manual_seed(0)).to(self._model.device)
        logits, some = logits.to(self._model.dtype) * 10, slice(self.vocabulary // 3, self.vocabulary // 2 + 1)
        states = torch.zeros(1, self.width, dtype=self._model.dtype, device=self._model.device)
        try:
            whole, part = (self._run(states, const(x)) for x in (logits, logits[..., some].clone()))
        except (RuntimeError, IndexError, AttributeError):
            return False
        return whole.shape == logits.shape[1:] and torch.allclose(whole[..., some], part)

    def take(self, rows: slice) -> None:
        """Decode these rows, and drop those from before."""
        self._weight = self._part = torch.empty(0)
        self._weight = self._model.tensor(self._model.decode(self.name, rows))
        if self._bias is not None:
            self._part = self._bias[rows]

    @property
    def nbytes(self) -> int:
        """Of the rows that are held."""
        return int(self._weight.nbytes)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [n, rows] of states [n, hidden]."""
        bias = None if self._bias is None else self._part
        return self._run(states, lambda x: nn.functional.linear(x, self._weight, bias))

    def _run(self, states: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = states[None]
        with stand_in(self._base, const(self._output(last_hidden_state=x))), stand_in(self._linear, linear):
            logits = self._model.module(inputs_embeds=x, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]


@contextmanager
def stand_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module does something else for a while."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def const(value: Any) -> Callable[..., Any]:
    """A forward that gives this whatever it is asked."""
    return lambda *_, **__: value


def rows_at_once(width: int, models: int = 1) -> int:
    """Rows of embeddings or heads that are decoded together, of all models, in f32."""
    return max(64, SLICE_BYTES // (4 * width * models))
