"""Layers that hold a tensor as it is stored, in any codec, and compute from that."""

from . import cuda as cuda  # registers quantforge::linear and quantforge::dequantize, on the CPU and for GPUs
from .linear import QuantEmbedding, QuantExperts, QuantLinear

__all__ = ["QuantEmbedding", "QuantExperts", "QuantLinear"]
