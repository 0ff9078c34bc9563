"""Tokenizers: a checkpoint's files as GGUF's tokenizer.* metadata and back, and running either.

Templates are carried over as text and never rendered.
"""

from .engine import Tokenizer
from .from_gguf import to_json
from .special import adds, special_ids
from .to_files import files
from .to_gguf import metadata

__all__ = ["Tokenizer", "adds", "files", "metadata", "special_ids", "to_json"]
