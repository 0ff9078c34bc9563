"""llama.cpp's presets: exactly the types that llama-quantize chooses, as data.

A preset is a base type and rows `(category, conditions, type)`, first match wins. Beside them:
which tensors are quantized at all, what the others are stored as, and what happens to rows that
are no multiple of a block. Facts: llama.cpp src/llama-quant.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from .. import codecs
from ..archs.weight import Weight
from ..codecs.base import Codec
from ..errors import ShapeError

# --- which tensors are quantized at all ---------------------------------------------------------

# Parts of names that llama-quantize leaves alone: norms, routers, small or position-like tensors.
_LEFT_ALONE = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w0|w1|w2|v0|v1|v2|a0|a1|a2|g1|g2|decay_w1|decay_w2|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)

# What convert_hf_to_gguf writes in F32 whatever --outtype says, besides norms and 1-D tensors.
_ALWAYS_F32 = {"indexer.proj"} | frozenset(
    gguf.TENSOR_NAMES[t].removeprefix("blk.{bid}.")
    for t in (
        gguf.MODEL_TENSOR.FFN_GATE_INP,
        gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP,
        gguf.MODEL_TENSOR.POS_EMBD,
        gguf.MODEL_TENSOR.TOKEN_TYPES,
        gguf.MODEL_TENSOR.SSM_CONV1D,
        gguf.MODEL_TENSOR.SHORTCONV_CONV,
        gguf.MODEL_TENSOR.TIME_MIX_FIRST,
        gguf.MODEL_TENSOR.TIME_MIX_W1,
        gguf.MODEL_TENSOR.TIME_MIX_W2,
        gguf.MODEL_TENSOR.TIME_MIX_DECAY_W1,
        gguf.MODEL_TENSOR.TIME_MIX_DECAY_W2,
        gguf.MODEL_TENSOR.TIME_MIX_LERP_FUSED,
        gguf.MODEL_TENSOR.ALTUP_CORRECT_COEF,
        gguf.MODEL_TENSOR.ALTUP_PREDICT_COEF,
        gguf.MODEL_TENSOR.V_ENC_EMBD_POS,
        gguf.MODEL_TENSOR.SSM_CONV1D_Q,
        gguf.MODEL_TENSOR.SSM_CONV1D_K,
        gguf.MODEL_TENSOR.SSM_CONV1D_V,
    )
)

FLOATS = ("F32", "F16", "BF16")
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"

# Where a row is no multiple of the block: the next type of block 32. Above the line what
# llama-quantize does, below it (where llama-quantize stops) what is nearest.
_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    # ---
    "Q1_0": "Q4_0",
    "NVFP4": "MXFP4",
}

# What `nearest` chooses from where rows do not fit, best first where they are as large: general types of block 32.
_NEAREST = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")

FALLBACKS = ("llama-quantize", "nearest")
"""What replaces a type whose blocks do not divide a tensor's rows: llama-quantize's choice, or the type closest in size."""

# Types that llama-quantize refuses without importance (not for embedding and output).
BLIND = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


def quantizable(w: Weight) -> bool:
    """True if llama-quantize quantizes this tensor: a matrix `*weight` that is not in the list above."""
    shape = w.shape
    while shape and shape[0] == 1:  # ggml does not count leading axes of one
        shape = shape[1:]
    return len(shape) >= 2 and w.name.endswith("weight") and not _LEFT_ALONE.search(w.name)


_CATEGORIES = (
    ("attn_v", ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")),
    ("attn_k", ("attn_k.weight",)),
    ("attn_q", ("attn_q.weight",)),
    ("attn_output", ("attn_output.weight",)),
    ("ffn_up", ("ffn_up",)),
    ("ffn_gate", ("ffn_gate",)),
    ("ffn_down", ("ffn_down",)),
)


def category_of(name: str) -> str:
    """The group of tensors, across architectures, that preset rules speak about."""
    if name == OUTPUT:
        return "output"
    if name in (EMBEDDING, "per_layer_token_embd.weight"):
        return "token_embd"
    return next((c for c, parts in _CATEGORIES if any(p in name for p in parts)), "other")


# --- presets ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """What preset rules may ask about a model."""

    arch: str
    layers: int
    gqa: int
    experts: int
    importance: bool
    tied: bool
    large: bool
    """llama.cpp counts it as a 70 B model, whose few value heads deserve more bits."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any], names: Collection[str], importance: bool) -> Model:
        """Read GGUF key-values; what is missing takes llama.cpp's default or is counted from the tensor names."""
        arch = str(metadata.get("general.architecture", ""))

        def count(key: str, default: int) -> int:
            values = np.ravel(metadata.get(key.format(arch=arch), default))
            return int(values[0]) if values.size else default  # one number, or one per layer: the first counts

        seen = [int(m[1]) for m in map(re.compile(r"blk\.(\d+)\.").match, names) if m]
        layers = count(gguf.Keys.LLM.BLOCK_COUNT, max(seen, default=-1) + 1)
        heads = count(gguf.Keys.Attention.HEAD_COUNT, 1)
        kv = count(gguf.Keys.Attention.HEAD_COUNT_KV, heads)
        experts = count(gguf.Keys.LLM.EXPERT_COUNT, 0)
        large = (arch, layers) in _LARGE or (arch == "llama" and layers == 80 and heads != kv and experts != 8)
        return cls(arch, layers, heads // kv if kv else 0, experts, importance, OUTPUT not in names, large)


_LARGE = {("deci", 80), ("qwen2", 80), ("qwen2vl", 80), ("olmo", 80), ("jais2", 68)}

# Conditions of preset rules, for the i-th of n tensors of a category in layer order.
_CONDITIONS: dict[str, Callable[[Model, int, int], bool]] = {
    "": lambda m, i, n: True,
    "falcon": lambda m, i, n: m.arch == "falcon",
    "imatrix": lambda m, i, n: m.importance,
    "gqa>=4": lambda m, i, n: m.gqa >= 4,
    "experts>=4": lambda m, i, n: m.experts >= 4,
    "experts=8": lambda m, i, n: m.experts == 8,
    "i<2": lambda m, i, n: i < 2,
    "i<4": lambda m, i, n: i < 4,
    "first/8": lambda m, i, n: i < n // 8,
    "first/16": lambda m, i, n: i < n // 16,
    "middle": lambda m, i, n: n // 8 <= i < 7 * n // 8,
    "more_bits": lambda m, i, n: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
}
_Row = tuple[str, str, str]
"""Category, conditions that must all hold ("!": must not), type."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A mixture of types, by llama-quantize's name for it."""

    file_type: int
    """LLAMA_FTYPE, `general.file_type` in the file."""
    base: str
    rows: tuple[_Row, ...] = ()
    output: str = "Q6_K"
    """Type of the output matrix (the embedding, if tied) where its rows fit the base type; else Q8_0."""
    embedding: str | None = None
    """Type of an untied embedding; None: base."""
    low_bit: bool = False
    """The presets around two bits: they count tensors, not layers, and have no general rules."""


def _mix(file_type: int, base: str, *rows: _Row, output: str = "Q6_K", embedding: str | None = None) -> Preset:
    """A preset with the rules that all but the low-bit ones share."""
    general = (("attn_v", "experts=8", "Q8_0"), ("attn_k", "experts=8", "Q8_0"))
    return Preset(file_type, base, general + rows, output, embedding)


def _low(file_type: int, base: str, more: str, embedding: str, attn_output: str | None) -> Preset:
    """A preset around two bits; `more` goes to sensitive tensors."""
    rows: tuple[_Row, ...] = (
        ("attn_v", "gqa>=4", "Q4_K"),
        ("attn_v", "experts>=4", "Q4_K"),
        ("attn_v", "", more),
        ("attn_k", "experts=8", "Q4_K"),
        ("ffn_down", "first/8", more),
        ("attn_output", "experts=8", "Q5_K"),
        ("attn_output", "", attn_output or base),
    )
    return Preset(file_type, base, rows, "Q5_K", embedding, low_bit=True)


_OUT8: _Row = ("attn_output", "!falcon experts=8", "Q5_K")


def _out(type: str) -> _Row:
    return ("attn_output", "!falcon !experts=8", type)


PRESETS: dict[str, Preset] = {
    "F32": Preset(0, "F32"),
    "F16": Preset(1, "F16"),
    "BF16": Preset(32, "BF16"),
    "Q8_0": _mix(7, "Q8_0", output="Q8_0"),
    "Q6_K": _mix(18, "Q6_K"),
    "Q5_K_M": _mix(17, "Q5_K", ("attn_v", "more_bits", "Q6_K"), ("ffn_down", "more_bits", "Q6_K")),
    "Q5_K_S": _mix(16, "Q5_K"),
    "Q5_1": _mix(9, "Q5_1"),
    "Q5_0": _mix(8, "Q5_0", ("ffn_down", "imatrix first/8", "Q5_1")),
    "Q4_K_M": _mix(
        15,
        "Q4_K",
        ("attn_v", "more_bits", "Q6_K"),
        ("ffn_down", "falcon first/16", "Q6_K"),
        ("ffn_down", "falcon more_bits", "Q5_K"),
        ("ffn_down", "!falcon more_bits", "Q6_K"),
        _OUT8,
    ),
    "Q4_K_S": _mix(14, "Q4_K", ("attn_v", "i<4", "Q5_K"), ("ffn_down", "!falcon first/8", "Q5_K"), _OUT8),
    "Q4_1": _mix(3, "Q4_1"),
    "Q4_0": _mix(2, "Q4_0", ("ffn_down", "imatrix first/8", "Q4_1")),
    "IQ4_NL": _mix(25, "IQ4_NL", ("attn_v", "gqa>=4", "Q5_K"), ("ffn_down", "!imatrix first/8", "Q5_K"), _OUT8),
    "IQ4_XS": _mix(30, "IQ4_XS", ("attn_v", "gqa>=4", "Q5_K"), ("ffn_down", "!imatrix first/8", "Q5_K"), _OUT8),
    "MXFP4_MOE": Preset(38, "MXFP4", output="Q8_0", embedding="Q8_0"),
    "NVFP4": _mix(39, "NVFP4"),
    "Q3_K_L": _mix(
        13,
        "Q3_K",
        ("attn_v", "", "Q5_K"),
        ("ffn_down", "falcon", "Q4_K"),
        ("ffn_down", "", "Q5_K"),
        ("attn_output", "falcon", "Q4_K"),
        _out("Q5_K"),
    ),
    "Q3_K_M": _mix(
        12,
        "Q3_K",
        ("attn_v", "i<2", "Q5_K"),
        ("attn_v", "", "Q4_K"),
        ("ffn_down", "first/16", "Q5_K"),
        ("ffn_down", "falcon !more_bits", "Q3_K"),
        ("ffn_down", "", "Q4_K"),
        _OUT8,
        _out("Q4_K"),
    ),
    "Q3_K_S": _mix(11, "Q3_K", _OUT8),
    "IQ3_M": _mix(
        27,
        "IQ3_S",
        ("attn_v", "", "Q4_K"),
        ("ffn_down", "first/8", "Q4_K"),
        ("ffn_down", "experts=8 more_bits", "Q4_K"),
        _OUT8,
        _out("Q4_K"),
    ),
    "IQ3_S": _mix(26, "IQ3_S", ("attn_v", "gqa>=4", "Q4_K"), _OUT8),
    "IQ3_XS": _mix(
        22,
        "IQ3_S",
        ("attn_v", "gqa>=4", "Q4_K"),
        ("attn_k", "", "IQ3_XXS"),
        ("attn_q", "", "IQ3_XXS"),
        ("ffn_gate", "middle", "IQ3_XXS"),
        ("ffn_up", "middle", "IQ3_XXS"),
        _OUT8,
    ),
    "IQ3_XXS": _mix(
        23,
        "IQ3_XXS",
        ("attn_v", "gqa>=4", "Q4_K"),
        ("attn_v", "!imatrix", "IQ3_S"),
        ("attn_k", "", "IQ2_S"),
        ("attn_q", "", "IQ2_S"),
        ("ffn_down", "!imatrix first/8", "Q4_K"),
        ("ffn_down", "!imatrix", "Q3_K"),
        _OUT8,
        _out("IQ3_S"),
        output="Q5_K",
        embedding="IQ3_S",
    ),
    "Q2_K": _mix(10, "Q2_K", ("attn_v", "gqa>=4", "Q4_K"), ("attn_v", "", "Q3_K"), ("ffn_down", "", "Q3_K"), _OUT8, _out("Q3_K")),
    "Q2_K_S": _mix(21, "Q2_K", ("attn_v", "gqa>=4", "Q4_K"), ("ffn_down", "first/8", "Q4_K")),
    "IQ2_M": _low(29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_S": _low(28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_XS": _low(20, "IQ2_XS", "Q2_K", "Q2_K", None),
    "IQ2_XXS": _low(19, "IQ2_XXS", "Q2_K", "Q2_K", None),
    "Q2_0": _mix(41, "Q2_0", embedding="Q4_K"),
    "TQ2_0": _mix(37, "TQ2_0", embedding="Q4_K"),
    "TQ1_0": _mix(36, "TQ1_0", embedding="Q4_K"),
    "IQ1_M": _low(31, "IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_S": _low(24, "IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "Q1_0": _mix(40, "Q1_0"),
}

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mixture(preset: Preset, model: Model, w: Weight, category: str, i: int, n: int) -> str:
    """The type that llama-quantize's mixture gives a tensor, before its shape is looked at."""
    if category == "output" or (category == "token_embd" and model.tied):
        block = codecs.get(preset.base).block_size
        return "Q8_0" if model.arch == "falcon" or w.shape[-1] % block else preset.output
    if preset.base == "MXFP4":  # experts, which are the tensors of three axes; all else in Q8_0
        stacked = len(w.shape) > 2 and w.shape[0] > 1 and (model.arch != "bailingmoe3" or category.startswith("ffn_"))
        return "MXFP4" if stacked else "Q8_0"
    if category == "token_embd":
        return preset.embedding or preset.base
    chosen = preset.base
    for group, conditions, type in preset.rows:
        if group == category and all(_CONDITIONS[c.lstrip("!")](model, i, n) != c.startswith("!") for c in conditions.split(" ")):
            chosen = type
            break
    if category == "attn_v" and model.large and not preset.low_bit and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def kept(w: Weight, stored: Codec | None, base: str) -> Codec:
    """The codec of a tensor that is not quantized: what convert_hf_to_gguf writes.

    F32 for norms, vectors and routers; else a float preset's type, or the checkpoint's own.
    """
    if stored is not None and stored.ggml_type is not None and stored.name not in (*FLOATS, "F64"):
        return stored  # quantized or integer already
    if (
        len(w.shape) <= 1
        or not w.name.endswith((".weight", ".lora_a", ".lora_b"))
        or w.name.endswith("_norm.weight")
        or w.role in _ALWAYS_F32
    ):
        return codecs.get("F32")
    if base in FLOATS:
        return codecs.get(base)
    if stored is None or stored.name == "F64":
        return codecs.get("F32")
    return stored if stored.name in FLOATS else codecs.get("BF16")  # fp8 and the like


def fit(codec: Codec, w: Weight, as_is: Codec, fallback: str = FALLBACKS[0]) -> tuple[Codec, str | None]:
    """`codec`, or what replaces it where it cannot hold the tensor's shape, and why. fallback: of `FALLBACKS`."""
    if _holds(codec, w.shape):
        return codec, None
    if codec.ggml_type is None:
        other = as_is
    elif fallback == "nearest":
        holding = [c for c in map(codecs.get, _NEAREST) if _holds(c, w.shape)]
        other = min(holding, key=lambda c: abs(_bpw(c) - _bpw(codec)))
    else:
        other = codecs.get(_FALLBACK.get(codec.name, "F16"))
        if not _holds(other, w.shape):
            other = codecs.get("F16")
    if w.shape[-1] % codec.block_size:
        return other, f"{w.shape[-1]} columns are no multiple of {codec.block_size}: {other.name} instead of {codec.name}"
    return other, f"{codec.name} cannot hold shape {list(w.shape)}: {other.name} instead"


def _bpw(codec: Codec) -> float:
    return 8 * codec.nbytes((1, codec.block_size)) / codec.block_size


def _holds(codec: Codec, shape: tuple[int, ...]) -> bool:
    try:
        codec.layout(shape)
    except ShapeError:
        return False
    return True
