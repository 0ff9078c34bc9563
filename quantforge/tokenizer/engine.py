"""Running a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf

from ..errors import FormatError, UnsupportedError
from .from_gguf import to_json
from .special import adds, ends
from .to_gguf import metadata

_K = gguf.Keys.Tokenizer


class Tokenizer:
    """A tokenizer that runs: from a checkpoint's files, or rebuilt from GGUF metadata."""

    def __init__(self, path: str | Path, config: Mapping[str, Any], *, gguf_metadata: bool) -> None:
        """path: the model; config: its config.json, or, with gguf_metadata, its key-value pairs. Raises FormatError."""
        from tokenizers import Tokenizer as Engine

        path = Path(path)
        file = (path if path.is_dir() else path.parent) / "tokenizer.json"
        keys: Mapping[str, Any] = {}
        try:
            keys = config if gguf_metadata else metadata(file.parent, config)
            text = file.read_text(encoding="utf-8-sig") if not gguf_metadata and file.is_file() else to_json(keys, path)
        except UnsupportedError:
            if gguf_metadata or not file.is_file():
                raise
            text = file.read_text(encoding="utf-8-sig")
        try:
            self._engine = Engine.from_str(text)
        except Exception as e:  # the tokenizers library raises bare Exception
            raise FormatError(path, f"the tokenizers library does not take this tokenizer: {e}") from None
        self.tokens: list[str] | None = keys.get(_K.LIST)
        """Every token's text by id, where the tokenizer is of a kind that GGUF knows."""
        self.bos: int | None = keys.get(_K.BOS_ID, config.get("bos_token_id"))
        self.eos: list[int] = ends(keys) or _ids(config.get("eos_token_id"))
        self.adds_bos = self.bos is not None and adds(keys)["bos"]
        """Does llama.cpp put BOS in front of a text?"""
        if not keys:
            start = self._engine.encode("", add_special_tokens=True).ids
            self.adds_bos, self.bos = bool(start) and start[0] not in self.eos, start[0] if start else self.bos

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without BOS or EOS, and the position in the text at which each begins."""
        done = self._engine.encode(text, add_special_tokens=False)
        return done.ids, [a for a, _ in done.offsets]

    def transformers(self) -> Any:
        """The same as transformers has it, for libraries that want one."""
        from transformers import PreTrainedTokenizerFast

        name = self._engine.id_to_token
        named = {"bos_token": self.bos, "eos_token": self.eos[0] if self.eos else None}
        special = {k: name(i) for k, i in named.items() if i is not None}
        build: Any = PreTrainedTokenizerFast
        return build(tokenizer_object=self._engine, pad_token=special.get("eos_token"), **special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it."""
        texts = [self.decode(ids[:n]) for n in range(len(ids) + 1)]
        return [b[len(a) :] if b.startswith(a) else b[len(_common(a, b)) :] for a, b in pairwise(texts)]


def _common(a: str, b: str) -> str:
    return next((a[:i] for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), a[: len(b)])


def _ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(map(int, ids)))
