"""Reports: an `Evaluation` as JSON, Markdown for a model card, or one self-contained HTML page."""

from .base import SCHEMA, Choice, Evaluation, ModelResult, TensorError, save

__all__ = ["SCHEMA", "Choice", "Evaluation", "ModelResult", "TensorError", "save"]
