"""Back ends: other quantization libraries, each in a Python of its own, behind `Method`."""

from .base import Library, Made, names, register
from .worker import Backend

__all__ = ["Backend", "Library", "Made", "names", "register"]
