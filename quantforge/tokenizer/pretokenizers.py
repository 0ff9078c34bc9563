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
from .files import Files, text_of

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


_CASED_DIGIT = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_KIMI = (
    r"[\p{Han}]+|" + _CASED.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]") % (_CONTRACTIONS + "?", _CONTRACTIONS + "?")
    + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)  # fmt: skip
_EAST = "[一-龥぀-ゟ゠-ヿ]+"
_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"
_ASIAN = (
    "[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f"
    "\uaa60-\uaa7f\ua9e0-\ua9ff가-\ud7af\u1100-\u11ff]+"
)
_YOUTU = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"

# Where llama.cpp's own splitting is another than the tokenizer's, as regexes of the text around which ids may differ.
_FOREIGN_CASE = r"[^\W\d_a-zA-Z][^\W\d_]|[^\W\d_][^\W\d_a-zA-Z]"
_ANY_CASE = rf"[^\W\d_]*[A-Z][^\W\d_]*|{_FOREIGN_CASE}"
_DIGITS_IN_WORDS = r"[^\D0-9]|[\u00bc-\u00be\u2150-\u218b]|\d+[^\d\s!-/:-@\[-`{-~]|\s{2,}[\d\ue000-\uf8ff]"


@dataclass(frozen=True, slots=True)
class Kind:
    """A pre-tokenizer of llama.cpp: the regexes that split the text one after the other."""

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    """Does llama.cpp put BOS first unless add_bos_token says otherwise?"""
    aliases: str = ""
    """llama.cpp's other names for the same."""
    apart: str = ""
    """A regex of words on which llama.cpp's own regex splits otherwise, if there are such."""


# Source: llama.cpp src/llama-vocab.cpp (which name selects which regexes, merges and BOS handling)
# and the original patterns of the models' tokenizer.json; written in the form of _canonical.
KINDS = (
    Kind(
        "gpt-2",
        (GPT2,),
        aliases="phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum"
        " modern-bert mpt olmo jais trillion granite-docling exaone4",
    ),
    Kind(
        "llama-bpe",
        (_LLAMA3,),
        ignore_merges=True,
        adds_bos=True,
        aliases="llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    Kind("glm4", (_LLAMA3,), ignore_merges=True, aliases="glm5"),
    Kind("smaug-bpe", (_LLAMA3,), aliases="dbrx chatglm-bpe"),
    Kind(
        "qwen2",
        (_QWEN2,),
        aliases="deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2 bailingmoe bailingmoe2 llada-moe",
    ),
    Kind(
        "qwen35",
        (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    ),
    Kind("ufakzeka", (_QWEN2.removeprefix(f"{_CONTRACTIONS}|"),)),
    Kind("minicpm5", (r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True),
    Kind(
        "k2-horizon",
        (_LLAMA3.replace(_WORD, r"[^\r\n\p{L}\p{N}]?(?:\p{L}|\p{M}|\u200C|\u200D)+"),),
    ),
    Kind("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    Kind("smollm", (r"\p{N}", GPT2), aliases="starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    Kind(
        "tekken",
        (_CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        ignore_merges=True,
        adds_bos=True,
        apart=_FOREIGN_CASE,
    ),
    Kind("gpt-4o", (_GPT4O,), aliases="llama4 kanana2 talkie minimax-m2", apart=_FOREIGN_CASE),
    Kind("granite-embed-multi-97m", (_GPT4O,), ignore_merges=True, apart=_FOREIGN_CASE),
    Kind("tiny_aya", (_THREES, _GPT4O), aliases="cohere2moe", apart=f"{_ANY_CASE}|{_DIGITS_IN_WORDS}"),
    Kind("youtu", (_YOUTU, _CASED_DIGIT), ignore_merges=True, apart=_ANY_CASE),
    Kind("kimi-k2", (_KIMI,)),
    # llama.cpp does without falcon's \p{N}+: no token spans its edge.
    Kind("falcon", (r"[\p{P}$+<=>^~|`]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    Kind("default", (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    Kind(
        "chameleon",
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        adds_bos=True,
    ),
    Kind("deepseek-v3", (r"\p{N}{1,3}", _EAST, _DEEPSEEK3), aliases="hunyuan-dense joyai-llm hy_v4"),
    Kind(
        "spark2_5",
        (
            r"\p{N}{1,3}",
            _EAST,
            _DEEPSEEK3.replace(rf"[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}", r"[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"),
            r"\p{N}",
        ),
    ),
    Kind("afmoe", (_THREES, _ASIAN, _DEEPSEEK3), apart=_DIGITS_IN_WORDS),
    Kind("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}+")),
    Kind("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK, r"\p{N}")),
    Kind("bloom", (_BLOOM,), aliases="poro-chat gpt3-finnish"),
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

BY_NAME = {name: kind for kind in reversed(KINDS) for name in (kind.name, *kind.aliases.split())}
"""Every name that llama.cpp has for a byte-level pre-tokenizer -> its kind, the first of several with one name."""


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


# tokenizers counts all of ASCII's marks as punctuation
_PUNCTUATION = {"Contiguous": r"[\p{P}$+<=>^~|`]+", "Isolated": r"[\p{P}!-/:-@\[-`{-~]"}


def _splits(step: Mapping[str, Any]) -> tuple[str, ...]:
    """The canonical regexes by which a step splits; something unlike any regex where that is not how it works."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return (GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits":
        return (r"\p{N}" if step.get("individual_digits") else r"\p{N}+",)
    if kind == "Punctuation" and step.get("behavior", "Isolated") in _PUNCTUATION:
        return (_PUNCTUATION[step.get("behavior", "Isolated")],)
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
    odd = [f"normalizer {step.get('type')}" for step in files.normalizers if step.get("type") != "NFC"]
    if not files.is_byte_level:
        odd.append("no ByteLevel step")
    has_bos = text_of(files.config.get("bos_token")) is not None
    alike = [] if odd else [k for k in KINDS if k.splits == splits]
    alike.sort(key=lambda k: (k.ignore_merges != ignore_merges, k.adds_bos and not has_bos))
    # Taking whole tokens without merging makes no difference where merges lead to every token anyway.
    if alike and (alike[0].ignore_merges == ignore_merges or _merges_reach_all(files)):
        if files.normalizers:
            logger.info("tokenizer.json normalizes text to NFC, llama.cpp does not: ids differ on decomposed text")
        if alike[0].apart:
            logger.info("llama.cpp splits some words unlike tokenizer.json: ids may differ on %s", alike[0].apart)
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
    merges, added = files.merges(), files.added(files.vocabulary())
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for token, i in files.vocabulary().items():
        parts = [token] if i in added else list(token)
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(merges)), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == len(merges):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) > 1:
            return False
    return True
