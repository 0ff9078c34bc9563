"""Layouts: how quantized tensors stand in a Hugging Face checkpoint, as GPTQ, AWQ and others have it."""

from .base import Gathered, Layout, find, get, names, readable, register
from .stated import OWN, by_arrays, layout_of, stated, telling

__all__ = [
    "OWN",
    "Gathered",
    "Layout",
    "by_arrays",
    "find",
    "get",
    "layout_of",
    "names",
    "readable",
    "register",
    "stated",
    "telling",
]
