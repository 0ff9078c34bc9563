"""What a kind of tokenizer model is: recognised in a checkpoint's files, written to GGUF's keys and read back from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import Files
from .vocabulary import Vocabulary


class Model(ABC):
    """One of llama.cpp's tokenizer models (tokenizer.ggml.model)."""

    @abstractmethod
    def claims(self, files: Files, config: Mapping[str, Any]) -> bool:
        """Is the checkpoint's tokenizer of this kind? Raises FormatError for files that cannot be read."""

    @abstractmethod
    def read(self, files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> tuple[Vocabulary, dict[str, Any]]:
        """The vocabulary and GGUF's keys of this model alone, its name among them.

        pre_tokenizer: llama.cpp's name for it, for models that have one, instead of recognising it.
        Raises FormatError for malformed files, UnsupportedError for what llama.cpp cannot do.
        """

    @abstractmethod
    def owns(self, keys: Mapping[str, Any]) -> bool:
        """Are these GGUF keys of this kind?"""

    @abstractmethod
    def parts(self, keys: Mapping[str, Any], vocab: dict[str, int], path: str | Path) -> dict[str, Any]:
        """tokenizer.json's normalizer, pre_tokenizer, decoder and model from GGUF's keys.

        vocab: text -> id of the tokens that are in use. Raises FormatError, UnsupportedError.
        """


def regex_split(regex: str) -> dict[str, Any]:
    """A step of tokenizer.json that splits by a regex and keeps what is between."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replacement(pattern: dict[str, str], content: str) -> dict[str, Any]:
    """A normalizer or decoder of tokenizer.json: {"String": ...} or {"Regex": ...} replaced."""
    return {"type": "Replace", "pattern": pattern, "content": content}
