"""Reading a checkpoint's tokenizer files: tokenizer.json or what stands in for it, and the settings beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .spm_file import SentencePieceModel

logger = logging.getLogger(__name__)

_SPM_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model")
# Mistral's own tokenizer, which its tekken.json belongs to, has these names and always puts BOS first.
_TEKKEN = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
# Files from which transformers builds a tokenizer where there is no tokenizer.json.
_OTHER_NAMES = ("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "qwen.tiktoken")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file. Raises FormatError."""
    content = parsed(path)
    if content is not None and not isinstance(content, dict):
        raise FormatError(path, "not a JSON object")
    return content or {}


def parsed(path: Path) -> Any:
    """What a JSON file holds, or None where there is no such file. Raises FormatError."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith("version https://git-lfs"):
            raise FormatError(path, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise FormatError(path, f"not readable as JSON: {e}") from None


def chat_templates(directory: Path, settings: Mapping[str, Any]) -> Any:
    """The chat template, or several by name: .jinja files before tokenizer_config.json (`settings`), as in transformers."""
    default = directory / "chat_template.jinja"
    jinja = {"default": default} if default.is_file() else {}
    jinja |= {p.stem: p for p in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if jinja:
        return {name: path.read_text(encoding="utf-8-sig") for name, path in jinja.items()}
    template = settings.get("chat_template")
    return read_json(directory / "chat_template.json").get("chat_template") if template is None else template


def text_of(value: Any) -> str | None:
    """A token's text where files give either a string or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


@dataclass(frozen=True, slots=True)
class Added:
    """A token that is looked for before the text is split."""

    text: str
    special: bool = False
    strips: bool = False
    """Does it take spaces around it, or stand for whole words only?"""


@dataclass
class Files:
    """What these files say; an empty table stands for one that is missing."""

    directory: Path
    tokenizer: dict[str, Any]
    """tokenizer.json."""
    config: dict[str, Any]
    special_tokens: dict[str, Any]
    generation: dict[str, Any]
    entries: list[tuple[int, Added]]
    """Added tokens with the ids that files state, tokenizer.json's first; see `added`."""

    @classmethod
    def read(cls, directory: Path) -> Files:
        """The files of a checkpoint. Raises FormatError."""
        tokenizer = read_json(directory / "tokenizer.json")
        if not tokenizer and not any((directory / n).is_file() for n in _SPM_NAMES):
            tokenizer = _by_transformers(directory)
        config = read_json(directory / "tokenizer_config.json")
        if not (directory / "tokenizer.json").is_file() and (directory / "tekken.json").is_file():
            config = _TEKKEN | config
        special_tokens = read_json(directory / "special_tokens_map.json")
        try:
            entries = [
                *((int(e["id"]), _entry(e)) for e in tokenizer.get("added_tokens") or []),
                *((int(i), _entry(e)) for i, e in (config.get("added_tokens_decoder") or {}).items()),
                *((int(i), Added(t)) for t, i in read_json(directory / "added_tokens.json").items()),
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FormatError(directory, f"the list of added tokens is malformed: {e!r}") from None
        if bad := next((i for i, _ in entries if i < 0), None):
            raise FormatError(directory, f"the list of added tokens is malformed: id {bad}")
        named = set(_named(config, special_tokens))
        entries = [(i, replace(t, special=t.special or t.text in named)) for i, t in entries]
        return cls(directory, tokenizer, config, special_tokens, read_json(directory / "generation_config.json"), entries)

    def added(self, vocab: Mapping[str, int], *, replaces: bool = False) -> dict[int, Added]:
        """Added tokens by the ids that transformers gives them, whatever is stated.

        A text that has an id keeps it, others get the next free one. vocab: text -> id of the model's tokens;
        replaces: SentencePiece's files, where a stated id counts and takes the place of the piece that has it.
        """
        ids, added = dict(vocab), dict[int, Added]()
        taken = set() if replaces else set(ids.values())
        for stated, token in self.entries:
            i = ids.get(token.text)
            if i is None:
                i = stated if replaces and stated not in taken else max(taken, default=-1) + 1
            if i != stated:
                logger.warning("%s: added token %r has id %d, not %d as stated", self.directory, token.text, i, stated)
            ids[token.text] = i
            taken.add(i)
            added[i] = replace(token, special=token.special or (i in added and added[i].special))
        return added

    @cached_property
    def spm(self) -> tuple[Path, SentencePieceModel] | None:
        """SentencePiece's own file, if there is one. Raises FormatError."""
        path = next((p for n in _SPM_NAMES if (p := self.directory / n).is_file()), None)
        return (path, SentencePieceModel.read(path)) if path else None

    @property
    def model(self) -> str | None:
        """The type of tokenizer.json's model: "BPE", "Unigram", "WordPiece"; None where there is no tokenizer.json."""
        return str(self.tokenizer["model"].get("type", "BPE")) if self.tokenizer else None

    @property
    def normalizers(self) -> list[Mapping[str, Any]]:
        """The steps of tokenizer.json's normalizer, sequences flattened."""
        return _flat(self.tokenizer.get("normalizer"), "normalizers")

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The steps of tokenizer.json's pre-tokenizer, sequences flattened."""
        return _flat(self.tokenizer.get("pre_tokenizer"), "pretokenizers")

    @property
    def is_byte_level(self) -> bool:
        """Is text mapped to an alphabet of 256 letters first?"""
        return any(step.get("type") == "ByteLevel" for step in self.steps)

    @property
    def has_prefix(self) -> bool:
        """Is ▁ put before the text: by a normalizer, or by Metaspace?"""
        return any(n.get("type") == "Prepend" for n in self.normalizers) or any(
            p.get("type") == "Metaspace"
            and p.get("prepend_scheme", "always" if p.get("add_prefix_space", True) else "never") != "never"
            for p in self.steps
        )

    def vocabulary(self) -> dict[str, int]:
        """Token -> id of tokenizer.json's BPE or WordPiece model, without added ones. Raises FormatError."""
        vocab = self.tokenizer["model"].get("vocab")
        if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
            raise FormatError(self.directory / "tokenizer.json", "model.vocab is not a map of tokens to ids")
        if len(set(vocab.values())) != len(vocab):
            raise FormatError(self.directory / "tokenizer.json", "model.vocab has several tokens with one id")
        return vocab

    def merges(self) -> list[tuple[str, str]]:
        """Merges in rank order; both spellings, "a b" and ["a", "b"], occur. Raises FormatError."""
        pairs = []
        for merge in self.tokenizer["model"].get("merges") or []:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
                raise FormatError(self.directory / "tokenizer.json", f"merge {merge!r} is not a pair of tokens")
            pairs.append((pair[0], pair[1]))
        return pairs


def _entry(entry: Mapping[str, Any]) -> Added:
    strips = any(entry.get(k) for k in ("lstrip", "rstrip", "single_word"))
    return Added(str(entry["content"]), bool(entry.get("special")), strips)


def _named(*settings: Mapping[str, Any]) -> Iterator[str]:
    """Texts of tokens that have a name (bos_token, ...): transformers makes them special."""
    for d in settings:
        yield from (t for k, v in d.items() if k.endswith("_token") and (t := text_of(v)))
        for key in ("additional_special_tokens", "extra_special_tokens"):
            entries = d.get(key) or []
            for entry in entries.values() if isinstance(entries, Mapping) else entries:
                yield text_of(entry) or ""


def _by_transformers(directory: Path) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of the older files, or nothing. Runs no code of the model's.

    Raises FormatError.
    """
    older = [n for n in _OTHER_NAMES if (directory / n).is_file()]
    if not older:
        return {}
    from transformers import AutoTokenizer

    try:
        made: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        content = json.loads(made.backend_tokenizer.to_str())
    except Exception as e:  # whatever a tokenizer class raises on files that it does not like
        line = str(e).strip().split("\n")[0]
        raise FormatError(directory / older[0], f"no tokenizer.json, and transformers makes none of this: {line}") from None
    logger.info("%s: tokenizer.json as transformers makes it of %s", directory, " and ".join(older))
    return dict(content)


def _flat(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [s for part in step.get(inner, ()) for s in _flat(part, inner)]
    return [step]
