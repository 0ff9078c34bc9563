"""What a metric is, what it is given, and the registry of metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...arrays import F32
from ...discovery import Registry
from ...errors import RecipeError, ShapeError, UnsupportedError
from ..report import Figure, ModelResult
from .bootstrap import F64, Bootstrap, Interval
from .score import Collector, Tokens


@dataclass(frozen=True, slots=True)
class Seen:
    """One model on the text, beside the reference."""

    model: int
    """0 is the reference."""
    tokens: Tokens
    reference: Tokens
    targets: NDArray[np.int64]
    """The tokens that followed: int[tokens]."""
    bootstrap: Bootstrap
    """Of the scored tokens; the same draws for every model."""
    collected: Collector | None = None
    """What the metric's own `collector` gathered."""


@dataclass
class Answers:
    """Greedy answers of all models to the same prompts: model 0 is the reference, model 1 the same in bf16."""

    names: Sequence[str]
    prompts: Sequence[str]
    tokens: int
    """Of an answer at most."""
    ids: Sequence[Sequence[Sequence[int]]]
    """Token ids: [models][prompts][tokens]."""
    pieces: Sequence[Sequence[Sequence[str]]]
    """The text of every token."""
    embedder: str
    """What makes the vectors, in words."""
    embed: Callable[[], list[F32]]
    weight_bytes: int
    """The most that a model held while it answered."""

    @cached_property
    def vectors(self) -> list[F32]:
        """The meaning of every answer: [models] of f32[prompts, d]. Made when first asked for."""
        return self.embed()

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Of the prompts."""
        return Bootstrap(np.arange(len(self.prompts)))


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one model by key, and intervals where there are some."""

    figures: Mapping[str, Any]
    intervals: Mapping[str, Interval] = field(default_factory=dict)


class Metric:
    """A kind of figure that `evaluate` takes of every model. It keeps nothing between runs.

    The least is `values`: a number for every scored token. The figure is its mean, with an interval and with paired
    intervals of the differences between models. `measure` and `paired` are for figures that are no means, `judge` for
    those that look at answers.
    """

    name: str
    """In `evaluate(metrics=...)` and `--metrics`."""
    figures: Sequence[Figure]
    """What it measures, each a column in the reports."""
    needs: Literal["text", "answers"] = "text"
    against_reference: bool = True
    """False if the reference has the figures itself."""

    def collector(self, models: int, tokens: int, device: str) -> Collector | None:
        """What is to see the logits of so many scored tokens, where `Tokens` are not enough."""
        return None

    def values(self, seen: Seen) -> Mapping[str, F64]:
        """Figure -> float[tokens]."""
        return {}

    def measure(self, seen: Seen) -> Measured:
        """The figures of a model on the text."""
        values = self.values(seen)
        for key, v in values.items():
            if np.shape(v) != seen.targets.shape:
                raise ShapeError(f"metric {self.name}: {key} is {list(np.shape(v))}, not [{len(seen.targets)}], a number a token")
        intervals = {k: seen.bootstrap.interval(v) for k, v in values.items()}
        return Measured({k: i.estimate for k, i in intervals.items()}, intervals)

    def paired(self, a: Seen, b: Seen) -> Mapping[str, Interval]:
        """Paired intervals of a minus b."""
        theirs = self.values(b)
        return {k: a.bootstrap.interval(v - theirs[k]) for k, v in self.values(a).items()}

    def judge(self, answers: Answers, model: int) -> Measured:
        """The figures of a model's answers."""
        raise NotImplementedError


_FIELDS = {f.name for f in fields(ModelResult)}


def _check(given: Any) -> Metric:
    metric = given() if isinstance(given, type) else given
    if not isinstance(metric, Metric) or not getattr(metric, "name", "") or not getattr(metric, "figures", ()):
        raise UnsupportedError(f"{given!r} is no metric: it needs a name and figures, and is made from evaluation.metrics.Metric")
    if metric.needs not in ("text", "answers"):
        raise UnsupportedError(f"metric {metric.name} needs {metric.needs!r}: there are text and answers")
    theirs = {f.key: m.name for m in _registry.all().values() if m.name != metric.name for f in m.figures}
    for f in metric.figures:
        own = type(metric).__module__.startswith(f"{__package__}.")
        if f.key in theirs or (f.key in _FIELDS and not own):
            raise UnsupportedError(f"metric {metric.name}: reports have a {f.key} already; give the figure another key")
    return metric


_registry: Registry[Metric] = Registry(__package__, "metric", _check, marker="METRIC")
register = _registry.register
get = _registry.get


def names() -> list[str]:
    """The metrics that there are."""
    return list(_registry.all())


def chosen(wanted: Iterable[str]) -> list[Metric]:
    """Metrics by name in the registry's order, perplexity always among them. Raises RecipeError for unknown ones."""
    try:
        some = {get(name).name for name in ("ppl", *wanted)}
    except UnsupportedError as e:
        raise RecipeError(str(e)) from None
    return [m for name, m in _registry.all().items() if name in some]
