"""Formats: files to `Encoded` and back. A format is one module here that holds it as `FORMAT`."""

from .base import Format, Header, Sink, Source, Stored, by_suffix, get, names, open_path, register
from .files import adopt
from .merged import Adapters, merged

__all__ = [
    "Adapters",
    "Format",
    "Header",
    "Sink",
    "Source",
    "Stored",
    "adopt",
    "by_suffix",
    "get",
    "merged",
    "names",
    "open_path",
    "register",
]
