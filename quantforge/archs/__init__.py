"""Architectures: tensor names, roles, transforms and metadata. An architecture is one module here that holds it as `ARCH`."""

from .base import Arch, find, known, register, supported
from .tensors import Config, From, ScaleGroup, Tensor
from .weight import Piece, Value, Weight

__all__ = ["Arch", "Config", "From", "Piece", "ScaleGroup", "Tensor", "Value", "Weight", "find", "known", "register", "supported"]
