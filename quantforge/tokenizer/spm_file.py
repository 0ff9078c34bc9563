"""Reading a SentencePiece model file (tokenizer.model, spiece.model), a protobuf message of sentencepiece_model.proto."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError


def _fields(data: memoryview, path: Path, base: int) -> Iterator[tuple[int, int | memoryview, int]]:
    """Protobuf fields of a message as number, value and offset: varints as int, others as bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise FormatError(path, "truncated or malformed SentencePiece model", base + at)
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    at = 0
    while at < len(data):
        tag, at = varint(at)
        if tag & 7 == 0:
            value, at = varint(at)
            yield tag >> 3, value, base + at
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 2:
            size, at = varint(at)
        if size is None or size > len(data) - at:
            raise FormatError(path, "truncated or malformed SentencePiece model", base + at)
        yield tag >> 3, data[at : at + size], base + at
        at += size


@dataclass(slots=True)
class SentencePieceModel:
    """What the file says that matters here."""

    pieces: list[tuple[str, float, int]]
    """Text, score and type of each piece by id."""
    model_type: int = 1
    """1 unigram, 2 BPE, 3 word, 4 char."""
    normalizer: str = ""
    charsmap: bytes = b""
    """The normalizer, compiled: a trie of prefixes and their replacements."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """The model in a file. Raises FormatError."""
        model = cls([])
        for number, value, at in _fields(memoryview(path.read_bytes()), path, 0):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                text, score, kind = "", 0.0, 1
                for n, v, _ in _fields(value, path, at):
                    if n == 1 and isinstance(v, memoryview):
                        try:
                            text = str(v, "utf-8")
                        except UnicodeDecodeError:
                            raise FormatError(path, f"piece {len(model.pieces)} is not UTF-8", at) from None
                    elif n == 2 and isinstance(v, memoryview) and len(v) == 4:
                        (score,) = struct.unpack("<f", v)
                    elif n == 3 and isinstance(v, int):
                        kind = v
                model.pieces.append((text, score, kind))
            elif number == 2:
                model.model_type = next((v for n, v, _ in _fields(value, path, at) if n == 3 and isinstance(v, int)), 1)
            elif number == 3:
                for n, v, _ in _fields(value, path, at):
                    if n == 1 and isinstance(v, memoryview):
                        model.normalizer = str(v, "utf-8", "replace")
                    elif n == 2 and isinstance(v, memoryview):
                        model.charsmap = bytes(v)
                    elif n == 3:
                        model.add_dummy_prefix = bool(v)
                    elif n == 4:
                        model.remove_extra_whitespaces = bool(v)
        if not model.pieces:
            raise FormatError(path, "not a SentencePiece model: it has no pieces")
        return model
