"""Metrics: figures of a model on text or of its answers, against a reference's. One module each, found by its `METRIC`."""

from .base import Answers, Measured, Metric, Seen, chosen, get, names, register
from .bootstrap import F64, Bootstrap, Interval
from .score import Collector, Score, Tokens

__all__ = [
    "F64",
    "Answers",
    "Bootstrap",
    "Collector",
    "Interval",
    "Measured",
    "Metric",
    "Score",
    "Seen",
    "Tokens",
    "chosen",
    "get",
    "names",
    "register",
]
