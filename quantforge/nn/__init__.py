"""Layers that hold a tensor as it is stored, in any codec, and compute from that."""

from . import ops as ops  # registers quantforge::linear and quantforge::dequantize
from .linear import QuantEmbedding, QuantLinear

__all__ = ["QuantEmbedding", "QuantLinear"]
