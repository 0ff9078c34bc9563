"""The evaluation as one HTML page that needs no network: plotly, styles and data are inside it."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files

from .base import Evaluation, method, neighbours


def render(evaluation: Evaluation) -> str:
    """The page. Data travel as JSON that the page's script draws; nothing from a file is ever markup."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    data = evaluation.to_dict()
    data["ranked"] = [m.name for m in evaluation.ranked()]
    data["neighbours"] = neighbours(evaluation)
    data["method"] = method(evaluation)
    page = files("quantforge") / "data" / "report"
    parts = {
        "TITLE": escape(f"{evaluation.reference.name}: what quantization cost"),
        "STYLE": (page / "page.css").read_text(encoding="utf-8"),
        # "</script>" and "<!--" inside a string must not end the element
        "DATA": json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": (page / "page.js").read_text(encoding="utf-8"),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    pieces = text.split("@@")  # markers stand at odd places: a marker inside inserted text is never looked at
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))
