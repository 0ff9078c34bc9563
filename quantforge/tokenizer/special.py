"""Special tokens: their ids and which of them are put around a text, from a checkpoint's files and from GGUF's keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import gguf

from .files import Files, text_of
from .pretokenizers import ADDS_BOS

logger = logging.getLogger(__name__)

_K = gguf.Keys.Tokenizer
_IDS = {
    "bos": _K.BOS_ID,
    "eos": _K.EOS_ID,
    "unk": _K.UNK_ID,
    "sep": _K.SEP_ID,
    "pad": _K.PAD_ID,
    "mask": _K.MASK_ID,
    "eot": _K.EOT_ID,
    "eom": _K.EOM_ID,
}
_ADDS = {"bos": _K.ADD_BOS, "eos": _K.ADD_EOS, "sep": _K.ADD_SEP}


def special_keys(files: Files, config: Mapping[str, Any], ids: Mapping[str, int], size: int, adds_bos: bool) -> dict[str, Any]:
    """GGUF's keys for the ids of special tokens and for which of them are added to a text.

    ids: of the tokens that are in use, below `size`; adds_bos: what llama.cpp would do with a file that does not say.
    """
    text = {n: t for n in (*_IDS, "cls") for d in (files.special_tokens, files.config) if (t := text_of(d.get(f"{n}_token")))}
    if "cls" in text:
        text.setdefault("bos", text["cls"])
    if "sep" in text:
        text.setdefault("eos", text["sep"])
    adds = _added_by_template(files.tokenizer.get("post_processor"), text)
    for name in _ADDS:
        if isinstance(flag := files.config.get(f"add_{name}_token"), bool):
            adds[name] = flag
    if adds_bos and files.tokenizer:
        adds.setdefault("bos", False)

    found: dict[str, Any] = {}
    for name, key in _IDS.items():
        stated = {**config, **(config.get("text_config") or {})}.get(f"{name}_token_id")
        if isinstance(stated, list) and stated:  # several end tokens: the first is the one to write
            stated = stated[0]
        number = ids.get(text.get(name, ""), stated)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
            found[key] = number
    found.update({_ADDS[name]: flag for name, flag in adds.items()})
    return found


def _added_by_template(post_processor: Mapping[str, Any] | None, text: dict[str, str]) -> dict[str, bool]:
    """Which of bos, eos, sep the post-processor puts around a text; names that it alone defines go into `text`."""

    def token(step: Mapping[str, Any]) -> str | None:
        return (step.get("SpecialToken") or {}).get("id")

    adds: dict[str, bool] = {}
    for processor in (post_processor or {}).get("processors") or [post_processor or {}]:
        if processor.get("type") == "RobertaProcessing":
            adds |= {"bos": True, "eos": True, "sep": True}
            text.setdefault("cls", processor["cls"][0])
            text.setdefault("sep", processor["sep"][0])
        if processor.get("type") != "TemplateProcessing":
            continue
        single, pair = processor.get("single") or [], list(processor.get("pair") or [])
        first = token(single[0]) if len(single) > 1 else None
        last = token(single[-1]) if len(single) > 1 else None
        if first:
            adds["bos"] = first in (text.setdefault("bos", first), text.get("cls"))
            if not adds["bos"]:
                logger.warning("tokenizer.json puts %r first, which is not the bos_token: llama.cpp will not", first)
        if last:
            if (old := text.setdefault("eos", last)) != last:
                text["eot"], text["eos"] = old, last  # the turn's end stays known as such
            adds["eos"] = True
        if first and pair and token(pair[0]) == first:
            del pair[0]
        if last and pair and token(pair[-1]) == last:
            del pair[-1]
        if between := [token(step) for step in pair[1:-1]]:
            ends = (text.get("sep"), text.get("eos"))
            adds["sep"] = (between[0] in ends and not last) or (len(between) == 2 and between[1] in ends)
            if adds["sep"] and "eos" in text:
                text.setdefault("sep", text["eos"])
    return adds


def special_ids(found: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens by name ("bos", "eos", "eot", ...) of GGUF's tokenizer.* keys."""
    assumed = {"unk": 0, "bos": 1, "eos": 2} if found.get(_K.MODEL) == "llama" else {}  # as llama.cpp does
    return assumed | {name: int(found[key]) for name, key in _IDS.items() if found.get(key) is not None}


def adds(found: Mapping[str, Any]) -> dict[str, bool]:
    """Which of "bos" and "eos" llama.cpp puts around a text, by GGUF's tokenizer.* keys."""
    bos = found.get(_K.MODEL) == "llama" or found.get(_K.PRE) in ADDS_BOS
    return {"bos": bool(found.get(_K.ADD_BOS, bos)), "eos": bool(found.get(_K.ADD_EOS, False))}
