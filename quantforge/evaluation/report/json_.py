"""The evaluation as JSON, for machines; the schema's name is in `schema`."""

from __future__ import annotations

import json

from .base import Evaluation


def render(evaluation: Evaluation) -> str:
    """The whole evaluation as a JSON document."""
    return json.dumps(evaluation.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
