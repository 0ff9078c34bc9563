"""The kinds of tokenizer model; the first that claims a checkpoint's files, or owns a GGUF file's keys, has them."""

from __future__ import annotations

from . import byte_level, raw_bpe, sentencepiece, unigram, wordpiece
from .base import Model

MODELS: tuple[Model, ...] = (wordpiece.MODEL, unigram.MODEL, raw_bpe.MODEL, sentencepiece.MODEL, byte_level.MODEL)
