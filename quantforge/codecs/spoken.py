"""Names of types that people bring from elsewhere, and what has that meaning here: said in an error, never taken silently."""

from __future__ import annotations

import re

_IN_GGUF = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M (or Q4_0, IQ4_XS)", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0"}
_IN_CHECKPOINTS = {2: "int2-g64", 3: "int3-g128", 4: "int4-g128-sym, nf4", 8: "int8-channel-sym, fp8-channel"}
_WIDTH = re.compile(
    r"(?:(?:bnb|bitsandbytes|gptq|awq|hqq|mlx|load[-_]in)[-_]?)?(?:u?int|i|q|w)?[-_]?([2-8])[-_]?(?:bits?|b|bpw|\.0bpw)?"
    r"(?:[-_](?:gptq|awq|bnb|f(?:loat)?(?:16|32)))?"
)
_SAYINGS = (
    (re.compile(r"b(?:rain)?float[-_]?16|bfp16"), "BF16"),
    (re.compile(r"f(?:loat|p)[-_]?16|half"), "F16"),
    (re.compile(r"f(?:loat|p)[-_]?32|full|single"), "F32"),
    (
        re.compile(r"f(?:loat|p)?[-_]?8(?:[-_](?:e4m3(?:fn)?|channel|tensor|block128))?|e4m3(?:fn)?"),
        "FP8 is fp8-channel or fp8-block128 in a checkpoint directory (--format compressed-tensors -t FP8_DYNAMIC); GGUF has no "
        "FP8, but Q8_0",
    ),
    (
        re.compile(r"[nf]p?f?[-_]?4"),
        f"of 4 bits, GGUF has {_IN_GGUF[4]}; a checkpoint directory nf4, fp4 (--format bitsandbytes)",
    ),
    (
        re.compile(r"w\d+a\d+.*"),
        "a scheme of checkpoint directories: --format compressed-tensors -t W4A16, W8A8, FP8_DYNAMIC, ...",
    ),
    (re.compile(r"gptq|awq|bnb|bitsandbytes|compressed-tensors"), "a format of checkpoint directories: --format {0} --bits 4"),
    (re.compile(r"exl[23].*"), "ExLlama's files are not written; of few bits, GGUF has IQ2_XXS to IQ4_XS"),
)


def meant(name: str) -> str:
    """What people mean by a type's name from elsewhere ("int4", "fp16", "4bit"), as the end of a message; "" if unknown."""
    word = name.lower().strip()
    for pattern, meaning in _SAYINGS:
        if pattern.fullmatch(word):
            return f" ({meaning.format(word)})" if " " in meaning else f" (that is {meaning})"
    if (match := _WIDTH.fullmatch(word)) is None:
        return ""
    bits = int(match[1])
    if bits not in _IN_GGUF:
        return f" ({bits} bits: none has as many; {_IN_GGUF[6]} or {_IN_GGUF[8]})"
    checkpoint = f"; in a checkpoint directory {_IN_CHECKPOINTS[bits]} (or --bits {bits})" if bits in _IN_CHECKPOINTS else ""
    return f" ({bits} bits are {_IN_GGUF[bits]} in GGUF{checkpoint})"
