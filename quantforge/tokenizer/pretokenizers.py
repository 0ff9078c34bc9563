"""Pre-tokenizers: how byte-level BPE splits text before merging, as tokenizer.json says it and by llama.cpp's names."""

from __future__ import annotations

import difflib
import itertools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .files import Files

logger = logging.getLogger(__name__)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT4O = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# Escaped: some of these letters are canonical equivalents of others, and editors would replace them.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True, slots=True)
class Kind:
    """A pre-tokenizer of llama.cpp: the regexes that split the text one after the other."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    """Does llama.cpp put BOS first unless add_bos_token says otherwise?"""


# Source: llama.cpp src/llama-vocab.cpp (which name selects which regexes, merges and BOS handling)
# and the original patterns of the models' tokenizer.json; written in the form of _canonical.
KINDS = (
    Kind("gpt-2", (GPT2,)),
    Kind("llama-bpe", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    Kind("smaug-bpe", (_LLAMA3,)),
    Kind("qwen2", (_QWEN2,)),
    Kind(
        "qwen35",
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    ),
    Kind("smollm", (r"\p{N}", GPT2)),
    Kind(
        "tekken",
        (_CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        ignore_merges=True,
        adds_bos=True,
    ),
    Kind("gpt-4o", (_GPT4O,)),
    # llama.cpp does without falcon's \p{N}+: no token spans its edge.
    Kind("falcon", (r"[\p{P}$+<=>^~|`]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    Kind("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    Kind("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}+")),
    Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}")),
    Kind("bloom", (_BLOOM,)),
    Kind("viking", (_BLOOM, r"\p{N}")),
    Kind("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    Kind("seed-coder", (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    Kind(
        "jais-2",
        (
            rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]"
            r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
            r"|\s{1,2}(?!\S)|\s{1}",
        ),
    ),
    Kind(
        "exaone-moe",
        (
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_SPACES}",
        ),
    ),
)

ALIASES = {
    alias: kind
    for kind, aliases in {
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "smaug-bpe": "dbrx glm4 chatglm-bpe",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
        "gpt-2": "phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
        "qwen2": "deepseek-r1-qwen kormo stablelm2 hunyuan solar-open megrez grok-2 bailingmoe llada-moe",
        "gpt-4o": "llama4 kanana2 minimax-m2",
        "deepseek-v3": "hunyuan-dense joyai-llm",
        "bloom": "poro-chat gpt3-finnish",
    }.items()
    for alias in aliases.split()
}
"""llama.cpp's names for pre-tokenizers that split like one of the kinds -> that kind's name."""
OTHER_NAMES = {
    *ALIASES,
    *("default", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "jina-v1-en", "modern-bert", "roberta-bpe"),
    *("chameleon", "bailingmoe2", "afmoe", "tiny_aya", "youtu", "kimi-k2"),
}
"""All names but the kinds' that llama.cpp accepts."""
_BOS_KINDS = {k.name for k in KINDS if k.adds_bos}
ADDS_BOS = _BOS_KINDS | {alias for alias, kind in ALIASES.items() if kind in _BOS_KINDS} | {"chameleon"}
"""The names with which llama.cpp puts BOS first unless add_bos_token says otherwise."""


def _canonical(regex: str) -> str:
    """The regex in one of several spellings that split every text alike."""
    for old, new in (
        ("\r", r"\r"),
        ("\n", r"\n"),
        (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
        (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
        (r"(?i:'s|'t|'re|'ve|'m|'d|'ll)", _CONTRACTIONS),
        # \s* gives back one newline and takes all before it: one or more is the same.
        (r"\s*[\r\n]+", r"\s*[\r\n]"),
        (r"\p{N}{1}", r"\p{N}"),
        # Possessive quantifiers before a disjoint class.
        ("]?+", "]?"),
        ("]++", "]+"),
        (r"\p{N}{1,3}+", r"\p{N}{1,3}"),
        (r"\s++", r"\s+"),
    ):
        regex = regex.replace(old, new)
    return regex


def _splits(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The canonical regexes by which a step splits; something unlike any regex where that is not how it works."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}" if step.get("individual_digits") else r"\p{N}+",)
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return (r"[\p{P}$+<=>^~|`]+",)
    if kind == "Split":
        pattern = step.get("pattern") or {}
        regex = _canonical(pattern["Regex"]) if "Regex" in pattern else re.escape(str(pattern.get("String", "")))
        # "keep what matches, drop the rest" is the same where the regex matches everything
        isolates = step.get("behavior") == "Isolated" or (
            step.get("behavior") == "Removed" and step.get("invert") and regex.endswith(r"\s+")
        )
        return (regex if isolates else f"{step.get('behavior')}({regex})",)
    return (f"{kind}({json.dumps({k: v for k, v in step.items() if k != 'type'}, ensure_ascii=False)})",)


def recognise(files: Files) -> Kind:
    """The pre-tokenizer of llama.cpp that splits as this tokenizer.json does. Raises UnsupportedError."""
    tokenizer = files.tokenizer
    splits = tuple(s for step in files.steps for s in _splits(step))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    odd = [f"normalizer {step.get('type')}" for step in steps if step.get("type") != "NFC"]
    if not files.is_byte_level:
        odd.append("no ByteLevel step")
    alike = [] if odd else sorted((k for k in KINDS if k.splits == splits), key=lambda k: k.ignore_merges != ignore_merges)
    # Taking whole tokens without merging makes no difference where merges lead to every token anyway.
    if alike and (alike[0].ignore_merges == ignore_merges or _merges_reach_all(files)):
        if steps:
            logger.info("tokenizer.json normalizes text to NFC, llama.cpp does not: ids differ on decomposed text")
        return alike[0]
    near = max(KINDS, key=lambda k: difflib.SequenceMatcher(None, " ".join(k.splits), " ".join(splits), False).ratio())
    shown = f"regex {' then '.join(splits) or '(none)'}, ignore_merges {str(ignore_merges).lower()}"
    shown = ", ".join([shown, *odd])
    raise UnsupportedError(
        f"tokenizer.json: llama.cpp has no pre-tokenizer with {shown}; the nearest is {near.name}: "
        f"--pre-tokenizer {near.name} to go on with it"
    )


def _merges_reach_all(files: Files) -> bool:
    """Does BPE turn the text of every token, added ones aside, into that token?"""
    merges = files.merges()
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for token, i in files.vocabulary().items():
        parts = [token] if i in files.added else list(token)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(merges)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(merges):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) > 1:
            return False
    return True
