"""The exception tree: every error that quantforge raises on purpose.

    QuantForgeError
    ├── FormatError        a file is not what it says it is (has .path and .offset)
    ├── ShapeError         a tensor's shape does not fit the codec or architecture
    ├── NonFiniteError     NaN or infinity in a weight (has .index)
    │   └── RangeError     a finite weight, but more than the type can hold (has .index, .value, .reason)
    ├── UnsupportedError   valid input that quantforge does not handle
    ├── RecipeError        options that name nothing, contradict or cannot be met
    ├── CalibrationError   calibration text or statistics unfit for use
    ├── OutputError        the result cannot be written: disk full, no permission (has .path)
    ├── BackendError       another library that was to quantize is missing, does not fit or failed
    ├── MissingError       a package that an extra brings is not installed; an ImportError, too
    └── NativeError        the compiled kernels are missing or failed

Messages are one line; they name the thing, the limit and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os import PathLike, fspath


def _one_line(message: str, limit: int = 600) -> str:
    """Cut and escaped: names in a damaged or hostile file can be long or hold terminal commands."""
    shown = message if len(message) <= limit else message[:limit] + " ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


class QuantForgeError(Exception):
    """Base of every deliberate error."""


class FormatError(QuantForgeError):
    """A file breaks its format's rules; `offset` is the byte where that was seen, if known."""

    def __init__(self, path: str | PathLike[str], message: str, offset: int | None = None) -> None:
        self.path = fspath(path)
        self.offset = offset
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{self.path}{at}: {_one_line(message)}")


class ShapeError(QuantForgeError):
    """A shape that a codec or architecture cannot take."""


class NonFiniteError(QuantForgeError):
    """NaN or infinity where a finite weight is needed; `index` is the first one's position."""

    def __init__(self, message: str, index: tuple[int, ...]) -> None:
        self.index = index
        super().__init__(message)


class RangeError(NonFiniteError):
    """A finite weight that a type cannot hold: its scale, or the weight itself, would become infinite or be cut off.

    reason: what the type holds at most, without the tensor: RangeError(tensor, e.reason, index, e.value) says it again of
    a tensor whose place is known.
    """

    def __init__(self, what: str, reason: str, index: tuple[int, ...], value: float) -> None:
        self.reason, self.value = reason, value
        super().__init__(
            f"{what}: weight {list(index)} is {value:g}; {reason}; keep this tensor in a wider type, such as BF16 or F32 "
            "(--tensor-type NAME=BF16, or --fallback-type BF16 for all such tensors)",
            index,
        )


class UnsupportedError(QuantForgeError):
    """Valid input outside of what quantforge handles."""


class RecipeError(QuantForgeError):
    """Options that match nothing, contradict each other or cannot be met."""


class CalibrationError(QuantForgeError):
    """Calibration text or statistics that cannot be used."""


class OutputError(QuantForgeError):
    """The result cannot be written at `path`; nothing is left there."""

    def __init__(self, path: str | PathLike[str], message: str) -> None:
        self.path = fspath(path)
        super().__init__(f"{self.path}: {message}")


class BackendError(QuantForgeError):
    """Another library, asked to quantize, is not there, not compatible, or failed."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message, 1200))


class MissingError(QuantForgeError, ModuleNotFoundError):
    """A package that is needed now is not installed; `name` is its name."""

    def __init__(self, message: str, name: str) -> None:
        ModuleNotFoundError.__init__(self, message, name=name)


class NativeError(QuantForgeError):
    """The compiled kernels are missing, of another version, or reported a failure."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A hint ` (did you mean A, B?)` with the known names closest to `name`, or an empty string."""
    names = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), names, n=n, cutoff=0.5)
    return f" (did you mean {', '.join(names[c] for c in close)}?)" if close else ""
