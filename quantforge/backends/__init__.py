"""Back ends: other quantization libraries, each in a Python of its own, behind `Method`."""

from .base import LIBRARIES, Library, Made, get

__all__ = ["LIBRARIES", "Library", "Made", "get"]
