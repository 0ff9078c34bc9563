"""Triton kernels: products of quantized weights with 9 to a few hundred activations."""

from .decode import FAMILIES
from .launch import Config, candidates, choose, constants, default, forget, gemm

__all__ = ["FAMILIES", "Config", "candidates", "choose", "constants", "default", "forget", "gemm"]
