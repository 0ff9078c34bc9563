"""A checkpoint's tokenizer as GGUF's tokenizer.* keys: the vocabulary, special tokens, chat templates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import gguf

from ..errors import FormatError, UnsupportedError, nearest
from .files import Files, chat_templates
from .models import MODELS
from .pretokenizers import BY_NAME
from .special import adds, special_keys

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer


def metadata(directory: str | Path, config: Mapping[str, Any], *, pre_tokenizer: str | None = None) -> dict[str, Any]:
    """All tokenizer.* keys for the GGUF file of the checkpoint in `directory`.

    pre_tokenizer: llama.cpp's name of the byte-level pre-tokenizer, instead of recognising it.
    Values: str, bool, int (UINT32), list[str], int32 and float32 arrays. Raises FormatError for
    malformed files, UnsupportedError for tokenizers that GGUF or llama.cpp cannot express.
    """
    directory = Path(directory)
    if pre_tokenizer is not None and pre_tokenizer not in BY_NAME:
        raise UnsupportedError(
            f"--pre-tokenizer {pre_tokenizer}: llama.cpp has none of that name{nearest(pre_tokenizer, BY_NAME)}"
        )
    try:
        keys = _read(Files.read(directory), config, pre_tokenizer)
        "".join(t for v in keys.values() if isinstance(v, (str, list)) for t in v).encode()
    except UnicodeError as e:
        raise FormatError(directory, f"a token or template is not valid Unicode text: {e}") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as e:
        raise FormatError(directory, f"tokenizer.json or tokenizer_config.json is malformed: {e!r}") from e
    except OSError as e:
        raise FormatError(e.filename or directory, f"cannot be read: {e.strerror}") from None
    return keys


def _read(files: Files, config: Mapping[str, Any], pre_tokenizer: str | None) -> dict[str, Any]:
    directory = files.directory
    model = next((m for m in MODELS if m.claims(files, config)), None)
    if model is None:
        if files.model:
            raise UnsupportedError(f"{directory / 'tokenizer.json'}: llama.cpp has no {files.model} tokenizers")
        if files.spm:
            raise UnsupportedError(f"{files.spm[0]}: a SentencePiece model of words or characters, which llama.cpp has not")
        raise FormatError(directory, "no tokenizer.json and no tokenizer.model: copy the model's tokenizer files there")
    out, keys = model.read(files, config, pre_tokenizer)
    vocab = out.vocab()
    keys |= special_keys(files, config, vocab, len(out.tokens), adds(keys))
    if isinstance(prefix := files.config.get("add_prefix_space"), bool) and keys[_K.MODEL] in ("gpt2", "llama"):
        keys[_K.ADD_PREFIX] = prefix
    if isinstance(count := config.get("type_vocab_size"), int):
        keys[_K.TOKEN_TYPE_COUNT] = count
    out.finish()
    if odd := [t.text for _, t in files.entries if t.strips and t.text in vocab]:
        logger.log(
            logging.WARNING if any(out.types[vocab[t]] == gguf.TokenType.USER_DEFINED for t in odd) else logging.INFO,
            "%s take the spaces beside them (lstrip, rstrip) or stand for whole words (single_word); in llama.cpp they do not",
            ", ".join(map(repr, odd)),
        )
    return keys | _templates(files)


def _templates(files: Files) -> dict[str, Any]:
    """The chat template, or several by name, as text."""
    template = chat_templates(files.directory, files.config)
    if isinstance(template, str):
        return {_K.CHAT_TEMPLATE: template}
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    keys: dict[str, Any] = {}
    names = []
    for choice in template or []:
        name = "".join(c if c in ascii_letters + digits else "_" for c in str(choice.get("name", "")))
        text = choice.get("template")
        if not name or not isinstance(text, str):
            continue
        if name == "default":
            keys[_K.CHAT_TEMPLATE] = text
        else:
            names.append(name)
            keys[_K.CHAT_TEMPLATE_N.format(name=name)] = text
    if names:
        keys[_K.CHAT_TEMPLATES] = names
    return keys
