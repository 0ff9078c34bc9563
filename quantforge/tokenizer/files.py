"""Reading a checkpoint's tokenizer files: tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file. Raises FormatError."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise FormatError(path, f"not readable as JSON: {e}") from None
    if not isinstance(found, dict):
        raise FormatError(path, "not a JSON object")
    return found


def text_of(value: Any) -> str | None:
    """A token's text where files give either a string or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


@dataclass(slots=True)
class Files:
    """What these files say; an empty table stands for one that is missing."""

    directory: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special_tokens: dict[str, Any]
    added: dict[int, tuple[str, bool]]
    """id -> text and "special" of tokens that are matched before the text is split."""

    @classmethod
    def read(cls, directory: Path) -> Files:
        """The files of a checkpoint. Raises FormatError."""
        tokenizer = read_json(directory / "tokenizer.json")
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = read_json(directory / "special_tokens_map.json")
        added: dict[int, tuple[str, bool]] = {}
        try:
            for text, i in read_json(directory / "added_tokens.json").items():
                added[int(i)] = (text, False)
            for key, entry in (config.get("added_tokens_decoder") or {}).items():
                added[int(key)] = (entry["content"], bool(entry.get("special")))
            for entry in tokenizer.get("added_tokens") or []:
                added[int(entry["id"])] = (entry["content"], bool(entry.get("special")))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(directory, f"the list of added tokens is malformed: {e!r}") from None
        # transformers makes every token that has a name (bos_token, ...) special
        named = {t for d in (config, special_tokens) for k, v in d.items() if k.endswith("_token") and (t := text_of(v))}
        for d in (config, special_tokens):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                entries = d.get(key) or []
                for entry in entries.values() if isinstance(entries, Mapping) else entries:
                    named.add(text_of(entry) or "")
        for i, (text, special) in added.items():
            added[i] = (text, special or text in named)
        return cls(directory, tokenizer, config, special_tokens, added)

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The steps of tokenizer.json's pre-tokenizer, sequences flattened."""
        return _flat(self.tokenizer.get("pre_tokenizer"))

    @property
    def is_byte_level(self) -> bool:
        """Is text mapped to an alphabet of 256 letters first?"""
        return any(step.get("type") == "ByteLevel" for step in self.steps)

    @property
    def is_sentencepiece(self) -> bool:
        """No tokenizer.json, or one of Llama's kind: byte fallback instead of a byte alphabet."""
        return not self.tokenizer or (bool(self.tokenizer["model"].get("byte_fallback")) and not self.is_byte_level)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id of tokenizer.json's BPE model, without added ones. Raises FormatError."""
        vocab = self.tokenizer["model"].get("vocab")
        if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
            raise FormatError(self.directory / "tokenizer.json", "model.vocab is not a map of tokens to ids")
        if len(set(vocab.values())) != len(vocab):
            raise FormatError(self.directory / "tokenizer.json", "model.vocab has several tokens with one id")
        return vocab

    def merges(self) -> list[tuple[str, str]]:
        """Merges in rank order; both spellings, "a b" and ["a", "b"], occur. Raises FormatError."""
        found = []
        for merge in self.tokenizer["model"].get("merges") or []:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
                raise FormatError(self.directory / "tokenizer.json", f"merge {merge!r} is not a pair of tokens")
            found.append((pair[0], pair[1]))
        return found


def _flat(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not pre_tokenizer:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [s for step in pre_tokenizer.get("pretokenizers", ()) for s in _flat(step)]
    return [pre_tokenizer]
