"""Sizes in bytes: read from text, shown to people, and what this process holds."""

from __future__ import annotations

import re
import resource
import sys

from .errors import RecipeError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse(text: int | str, what: str = "size", *, least: int = 0) -> int:
    """A number of bytes from text like "6GB", "512 MiB" or "1.5g"; a number is one already.

    what: how the message calls it ("--memory"); least: the smallest that makes sense. Raises RecipeError, also for a small
    number as text without a unit: "6" was hardly meant to be six bytes.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?(b?)\s*", str(text).lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else -1
    bare = match is not None and isinstance(text, str) and not (match[2] or match[3]) and 0 < size < 10**6
    if size < least or bare:
        raise RecipeError(f"{what} {text!r}: write a size like 6GB, 800MB or 4GiB")
    return size


def show(n: float) -> str:
    """A number of bytes for people: 3.21 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError


def resident(*, peak: bool = False) -> int:
    """Bytes of memory that this process holds now, or held at its peak; the peak for both where there is no /proc."""
    what = "VmHWM" if peak else "VmRSS"
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(what))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
