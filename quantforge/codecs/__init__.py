"""Codecs: numbers to stored bytes and back. A quant type is one class (or line) in a module here."""

from .base import Codec, Encoded, GridCodec, by_ggml_type, get, names, quantize, register

__all__ = ["Codec", "Encoded", "GridCodec", "by_ggml_type", "get", "names", "quantize", "register"]
