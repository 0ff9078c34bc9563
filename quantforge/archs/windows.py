"""Which layers attend to all that went before and which to a window, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf

_PATTERN = gguf.Keys.Attention.SLIDING_WINDOW_PATTERN


def usual_types(layers: int, every: int) -> list[str]:
    """All have a window but for every `every`-th."""
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]


def layer_types(h: Mapping[str, Any], every: int) -> list[str]:
    """The kind of attention of each layer, as config.json lists them, or by its period or `every`."""
    return list(h.get("layer_types") or usual_types(h["num_hidden_layers"], h.get("sliding_window_pattern") or every))


def window_pattern(h: Mapping[str, Any], every: int, *, always: bool = True) -> dict[str, Any]:
    """GGUF's key for it; unless `always`, only where the graph, whose own period is `every`, would do otherwise."""
    kinds = layer_types(h, every)
    if not always and kinds == usual_types(len(kinds), every):
        return {}
    return {_PATTERN: [kind == "sliding_attention" for kind in kinds]}


def restored_types(get: Callable[[str], Any], every: int) -> list[str]:
    """config.json's layer_types; get: the value of a GGUF key with {arch}, or None."""
    pattern = get(_PATTERN)
    if pattern is None:
        return usual_types(int(get(gguf.Keys.LLM.BLOCK_COUNT)), every)
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
