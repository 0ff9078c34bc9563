"""What is in a model, and which types there are, as plain data."""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path
from typing import Any

from . import codecs, formats
from .conversion.contents import history
from .conversion.plan import plain
from .errors import ShapeError


def describe(path: str | Path, *, hashes: bool = False) -> dict[str, Any]:
    """{"metadata", "provenance", "total_bytes", "bpw", "types", "tensors": [{"name", "type", "shape", "bytes"}]} of a model.

    provenance: what it says of how it came about: version, source, source_sha256, recipe, method, imatrix, calibration.
    total_bytes: size on disk of the weight files. hashes: also the sha256 of each tensor's bytes. Raises FormatError.
    """
    with formats.open_path(path) as source:
        tensors: list[dict[str, Any]] = []
        types: dict[str, dict[str, int]] = {}
        for name, stored in source.weights.items():
            row: dict[str, Any] = {"name": name, "type": stored.codec.name, "shape": list(stored.shape), "bytes": stored.nbytes}
            if hashes:
                row["sha256"] = hashlib.sha256(source.read(name).tobytes()).hexdigest()
                source.release(name)
            tensors.append(row)
            kind = types.setdefault(stored.codec.name, {"tensors": 0, "bytes": 0})
            kind["tensors"] += 1
            kind["bytes"] += stored.nbytes
        weights = sum(prod(s.shape) for s in source.weights.values())
        return {
            "format": source.format,
            "metadata": {k: plain(v) for k, v in source.config.items()},
            "provenance": history(source.config),
            "total_bytes": source.total_bytes,
            "bpw": 8 * sum(t["bytes"] for t in tensors) / max(1, weights),
            "types": types,
            "tensors": tensors,
        }


def list_types() -> list[dict[str, Any]]:
    """One row per codec: name, block_size, type_size (bytes per block), bpw, ggml_type, encode, decode, needs_importance."""
    rows = []
    for name in codecs.names():
        codec = codecs.get(name)
        try:
            type_size = getattr(codec, "type_size", None) or codec.nbytes((1, codec.block_size))
        except ShapeError:
            continue
        rows.append(
            {
                "name": name,
                "block_size": codec.block_size,
                "type_size": type_size,
                "bpw": 8 * type_size / codec.block_size,
                "ggml_type": codec.ggml_type,
                "encode": codec.encodes,
                "decode": True,
                "needs_importance": codec.needs_importance,
            }
        )
    return rows
