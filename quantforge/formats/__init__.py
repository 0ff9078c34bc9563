"""Formats: files to `Encoded` and back. A format is one module here that holds it as `FORMAT`."""

from .base import Format, Header, Sink, Source, Stored, by_suffix, get, names, open_path, register
from .files import adopt

__all__ = [
    "Format",
    "Header",
    "Sink",
    "Source",
    "Stored",
    "adopt",
    "by_suffix",
    "get",
    "names",
    "open_path",
    "register",
]
