"""Reports: an `Evaluation` as JSON, Markdown for a model card, or one self-contained HTML page."""

from .base import SCHEMA, Evaluation, Figure, ModelResult, Recommendation, TensorError, save

__all__ = ["SCHEMA", "Evaluation", "Figure", "ModelResult", "Recommendation", "TensorError", "save"]
