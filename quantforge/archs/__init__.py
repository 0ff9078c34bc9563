"""Architectures: tensor names, roles, transforms and metadata. An architecture is one module here."""

from .base import IDENTITY, Arch, Config, ScaleGroup, Tensor, Transform, Weight, find, register, supported

__all__ = ["IDENTITY", "Arch", "Config", "ScaleGroup", "Tensor", "Transform", "Weight", "find", "register", "supported"]
