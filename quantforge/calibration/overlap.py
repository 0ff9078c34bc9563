"""Do two texts share passages? Hashes of all runs of letters and digits, whatever spacing, case and punctuation are;
and a small sample of them, which a quantized file keeps of the text that it was calibrated with."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError

RUN = 50
"""Letters and digits that are hashed together: about ten words."""
PASSAGE, PART = 1000, 0.02
"""Overlap: a passage of so many letters and digits in common, or such a part of the shorter text. Two manuals of one
program share less: the shipped calibration and held-out texts, which share no paragraph, share 0.7%, in pieces of up to 370."""
SKETCH = 4096
"""Hashes that a file keeps: 32 KB. Of a text of a million letters every 250th."""
KEY = "quantforge.calibration"
_FEW = 4
_PIECE = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))

Hashes = NDArray[np.uint64]


def _mix(x: Hashes) -> Hashes:
    """splitmix64's finalizer: every bit of the result depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def letters(text: str) -> str:
    """Only letters and digits, without case."""
    return re.sub(r"[\W_]+", "", text.casefold())


def runs(text: str) -> Hashes:
    """A hash of the RUN letters that begin at each letter of the text: u64[letters − RUN + 1]."""
    points = np.frombuffer(letters(text).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    n = min(len(points), _PIECE + RUN)
    with np.errstate(over="ignore"):
        base, inverse = (np.concatenate([[np.uint64(1)], np.full(n, b)]).cumprod(dtype=np.uint64) for b in (_BASE, _INVERSE))
        pieces = []
        for first in range(0, len(points) - RUN + 1, _PIECE):  # a polynomial of the letters, rolled along
            x = _mix(points[first : first + _PIECE + RUN - 1] + _BASE)
            sums = np.concatenate([[np.uint64(0)], (x * base[: len(x)]).cumsum(dtype=np.uint64)])
            pieces.append(_mix((sums[RUN:] - sums[:-RUN]) * inverse[: len(sums) - RUN]))
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is remembered of a text: its name, its digest, and a sample of its `runs`, those below a limit."""

    name: str
    sha256: str
    limit: int
    hashes: Hashes

    @classmethod
    def of(cls, name: str, sha256: str, text: str, size: int = SKETCH) -> Sketch:
        """The sketch of a text of about `size` hashes, whatever its length."""
        hashes = runs(text)
        limit = min(2**64 - 1, (size << 64) // max(1, len(hashes)))
        return cls(name, sha256, limit, np.unique(hashes[hashes <= np.uint64(limit)]))

    def overlap(self, text: str, hashes: Hashes) -> str | None:
        """How a text, of which `hashes` are the runs, overlaps this one; None if it does not.

        It does with 2% of the hashes, or one passage of 1000 letters and digits, in common.
        """
        at = np.flatnonzero(hashes <= np.uint64(self.limit))
        known = np.isin(hashes[at], self.hashes)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
        if not len(edges):
            return None
        begins, ends = at[edges[::2]], at[edges[1::2] - 1]
        best = int((ends - begins).argmax())
        part, length = known.sum() / min(len(at), len(self.hashes)), int(ends[best] - begins[best]) + RUN
        few = edges[2 * best + 1] - edges[2 * best] < _FEW
        if (length < PASSAGE or few) and (part <= PART or known.sum() < _FEW):
            return None
        quoted = letters(text)[int(begins[best]) :][:40]
        return f"{max(part, length / max(1, len(hashes))):.0%} of it, with a passage of {length} letters ({quoted!r}...)"


def shared(calibration: str, text: str) -> str | None:
    """How a text overlaps one that is there as a whole, by the rule for sketches; None if it does not."""
    return Sketch.of("", "", calibration, len(calibration)).overlap(text, runs(text))


def check(model: str, config: Mapping[str, Any], name: str, text: str, hashes: Hashes) -> None:
    """Raise CalibrationError if a model was calibrated with what it is to be measured on.

    config: metadata of its file; text: what is measured on, of which `hashes` are the runs.
    """
    for sketch in remembered(config):
        if how := sketch.overlap(text, hashes):
            raise CalibrationError(
                f"{model} was calibrated with {sketch.name}, and {name} overlaps that: {how}; it would look better than it is: "
                "measure on other text (--text)"
            )


def metadata(sketches: Sequence[Sketch]) -> dict[str, Any]:
    """Metadata of a file, GGUF or config.json, that remember the texts it was calibrated with."""
    if not sketches:
        return {}
    hashes = [base64.b64encode(np.array([s.limit, *s.hashes.tolist()], "<u8").tobytes()).decode() for s in sketches]
    return {
        KEY: ", ".join(s.name for s in sketches),
        f"{KEY}.texts": [s.name for s in sketches],
        f"{KEY}.sha256": [s.sha256 for s in sketches],
        f"{KEY}.hashes": hashes,
    }


def remembered(config: Mapping[str, Any]) -> list[Sketch]:
    """The inverse of `metadata`; what is damaged is left out."""
    columns = [config.get(f"{KEY}.{k}") for k in ("texts", "sha256", "hashes")]
    if not all(isinstance(c, list | tuple) for c in columns):
        return []
    sketches = []
    for name, digest, hashes in zip(*columns, strict=False):
        try:
            values = np.frombuffer(base64.b64decode(hashes, validate=True), "<u8")
        except (ValueError, TypeError):
            continue
        if len(values):
            sketches.append(Sketch(str(name), str(digest), int(values[0]), values[1:].astype(np.uint64)))
    return sketches
