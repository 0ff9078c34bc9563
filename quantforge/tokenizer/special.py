"""Special tokens: their ids and which of them are put around a text, from a checkpoint's files and from GGUF's keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from .files import Files, text_of
from .pretokenizers import BY_NAME

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
EOS_IDS = "tokenizer.ggml.eos_token_ids"
"""All tokens that end a text, where there are several: read by other programs and by the way back, not by llama.cpp."""

# What llama.cpp takes for granted where a file does not say, by tokenizer.ggml.model: ids, and what goes around a text.
_ASSUMED_IDS = {
    "llama": {"unk": 0, "bos": 1, "eos": 2},
    "t5": {"pad": 0, "eos": 1, "unk": 2},
    "bert": {"pad": 0, "unk": 100, "bos": 101, "sep": 102, "mask": 103},
}
_ASSUMED_ADDS = {"llama": {"bos": True}, "t5": {"eos": True}, "bert": {"bos": True, "eos": True}, "gemma4": {"bos": True}}

# llama.cpp ends a text at each of these, whatever the keys say.
_ENDS_BY_TEXT = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "</s>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|ifm|im_end|>",
))  # fmt: skip


def special_keys(
    files: Files, config: Mapping[str, Any], ids: Mapping[str, int], size: int, assumed: Mapping[str, bool]
) -> dict[str, Any]:
    """GGUF's keys for the ids of special tokens and for which of them are added to a text.

    ids: of the tokens that are in use, below `size`; assumed: what llama.cpp would add with a file that does not say.
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
    if files.tokenizer:
        for name in ("bos", "eos"):
            if assumed[name]:
                adds.setdefault(name, False)

    keys: dict[str, Any] = {}
    for name, key in _IDS.items():
        stated = {**config, **(config.get("text_config") or {})}.get(f"{name}_token_id")
        if isinstance(stated, list) and stated:  # several end tokens: the first is the one to write
            stated = stated[0]
        number = ids.get(text.get(name, ""), stated)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
            keys[key] = number
    keys.update({_ADDS[name]: flag for name, flag in adds.items()})
    return keys | _ends(files, config, {i: t for t, i in ids.items()}, keys)


def _ends(files: Files, config: Mapping[str, Any], text: Mapping[int, str], written: Mapping[str, Any]) -> dict[str, Any]:
    """Keys for end tokens beside EOS. llama.cpp has room for two (end of turn, end of message) and knows others by text."""
    stated = (files.generation.get("eos_token_id"), {**config, **(config.get("text_config") or {})}.get("eos_token_id"))
    several = next((ids for ids in stated if isinstance(ids, list) and ids), [])
    ends = list(dict.fromkeys(i for i in several if isinstance(i, int) and i in text))
    if len(ends) < 2:
        return {}
    keys: dict[str, Any] = {EOS_IDS: np.array(ends, np.int32)}
    room = [k for k in (_K.EOT_ID, _K.EOM_ID) if k not in written]
    known = {written.get(k) for k in (_K.EOS_ID, _K.EOT_ID, _K.EOM_ID)}
    for i in ends:
        if i in known or text[i] in _ENDS_BY_TEXT:
            continue
        if not room:
            logger.warning("llama.cpp has no room for another end token: it will not stop at %r (%d)", text[i], i)
            continue
        keys[room.pop(0)] = i
    return keys


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


def special_ids(keys: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens by name ("bos", "eos", "eot", ...) of GGUF's tokenizer.* keys."""
    size = len(keys.get(_K.LIST) or ())
    assumed = {n: i for n, i in _ASSUMED_IDS.get(str(keys.get(_K.MODEL)), {}).items() if i < size}
    ids = assumed | {name: int(keys[key]) for name, key in _IDS.items() if keys.get(key) is not None}
    return ids | ({"eos": ids["sep"]} if keys.get(_K.MODEL) == "bert" and "sep" in ids else {})


def ends(keys: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a text, by GGUF's tokenizer.* keys."""
    if (every := keys.get(EOS_IDS)) is not None:
        return [int(i) for i in every]
    ids = special_ids(keys)
    return list(dict.fromkeys(ids[n] for n in ("eos", "eot", "eom") if n in ids))


def adds(keys: Mapping[str, Any]) -> dict[str, bool]:
    """Which of "bos" and "eos" llama.cpp puts around a text, by GGUF's tokenizer.* keys."""
    model = str(keys.get(_K.MODEL))
    assumed = {"bos": False, "eos": False} | _ASSUMED_ADDS.get(model, {})
    if model == "gpt2" and (kind := BY_NAME.get(str(keys.get(_K.PRE)))):
        assumed["bos"] = kind.adds_bos
    if model == "bert":  # where keys make no difference
        return assumed
    return {"bos": bool(keys.get(_K.ADD_BOS, assumed["bos"])), "eos": bool(keys.get(_K.ADD_EOS, assumed["eos"]))}
