"""Layouts: how quantized tensors stand in a Hugging Face checkpoint, as GPTQ, AWQ and others have it."""

from .base import Gathered, Layout, find, get, names, register

__all__ = ["Gathered", "Layout", "find", "get", "names", "register"]
