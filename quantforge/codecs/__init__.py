"""Codecs: numbers to stored bytes and back. A quant type is one class (or line) in a module here."""

from .base import Codec, Encoded, GridCodec, by_ggml_type, get, names, quantize, register, register_family, repack, repacks

__all__ = [
    "Codec",
    "Encoded",
    "GridCodec",
    "by_ggml_type",
    "get",
    "names",
    "quantize",
    "register",
    "register_family",
    "repack",
    "repacks",
]
