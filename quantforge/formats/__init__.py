"""Formats: files to `Encoded` and back. A format is one module here."""

from ..files import adopt
from .base import Format, Header, Sink, Source, Stored, get, open_path

__all__ = ["Format", "Header", "Sink", "Source", "Stored", "adopt", "get", "open_path"]
