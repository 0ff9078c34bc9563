"""Methods: how the codes of a matrix are chosen."""

from .awq import AWQ
from .base import NEEDS, Block, Group, Method, Stats, get, names, output_error, output_errors, register
from .gptq import GPTQ, gptq

__all__ = [
    "AWQ",
    "GPTQ",
    "NEEDS",
    "Block",
    "Group",
    "Method",
    "Stats",
    "get",
    "gptq",
    "names",
    "output_error",
    "output_errors",
    "register",
]
