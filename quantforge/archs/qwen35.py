"""Qwen3.5, dense and mixtures of experts: Qwen3-Next's layers with the heads of the delta nets in another order."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from .base import Arch
from .decoder import DECODER, experts
from .keys import METADATA
from .nextn import apart, with_mtp
from .qwen2moe import SHARED_EXPERT, SHARED_EXPERT_KEYS
from .qwen3next import ATTENTION, DEFAULTS, IMPLIED, SCALE_GROUPS, computed, dims, layers, on_linear, restored
from .tensors import Config, From, Sizes, Tensor
from .weight import MINUS_EXP, PLUS_ONE

_LINEAR = "model.layers.{bid}.linear_attn."
_SECTIONS = gguf.Keys.Rope.DIMENSION_SECTIONS
VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|merger)\.")


def _tiled(size: str, after: str = "0") -> Callable[[Sizes], NDArray[np.int64]]:
    """Rows of heads of values, from those of each key's head together to the first of each, the second of each, ...

    size: rows of a head; after: so many other rows come first.
    """

    def rows(s: Sizes) -> NDArray[np.int64]:
        n = int(size) if size.isdigit() else s[size]
        first = sum(int(t) if t.isdigit() else s[t] for t in after.split("+"))
        heads = np.arange(s["value_heads"] * n, dtype=np.int64).reshape(s["key_heads"], s["per_key"], n)
        return np.concatenate([np.arange(first, dtype=np.int64), first + heads.swapaxes(0, 1).reshape(-1)])

    return rows


_linear = {
    "attn_qkv": Tensor(("2*keys+values", "embd"), From(_LINEAR + "in_proj_qkv", rows=_tiled("value", "keys+keys"))),
    "attn_gate": Tensor(("values", "embd"), From(_LINEAR + "in_proj_z", rows=_tiled("value"))),
    "ssm_beta": Tensor(("value_heads", "embd"), From(_LINEAR + "in_proj_b", rows=_tiled("1"))),
    "ssm_alpha": Tensor(("value_heads", "embd"), From(_LINEAR + "in_proj_a", rows=_tiled("1"))),
    "ssm_conv1d": Tensor(
        ("2*keys+values", "kernel"),
        From(_LINEAR + "conv1d", ("2*keys+values", "1", "kernel"), rows=_tiled("value", "keys+keys")),
    ),
    "ssm_dt": Tensor(("value_heads",), From(_LINEAR + "dt_bias", rows=_tiled("1"), suffix=""), suffix=".bias"),
    "ssm_a": Tensor(("value_heads",), From(_LINEAR + "A_log", rows=_tiled("1"), suffix=""), suffix="", value=MINUS_EXP),
    "ssm_norm": Tensor(("value",), _LINEAR + "norm"),
    "ssm_out": Tensor(("embd", "values"), From(_LINEAR + "out_proj", columns=_tiled("value"))),
}


def sections(h: Config, pairs: int, default: list[int]) -> list[int]:
    """How many of the rotated pairs turn by time, height, width. Raises UnsupportedError.

    Interleaved, pair i belongs to axis i mod 3. llama.cpp turns pairs that are beyond an axis' section by nothing.
    """
    given = list(h["rope"].get("mrope_section", default))
    whole = sum(given)
    at = [i % whole if whole else 0 for i in range(pairs)]
    if len(given) != 3 or not whole or any(i >= 3 * given[i % 3] for i in at):
        raise UnsupportedError(f"config.json: mrope_section {given} leaves some of the {pairs} rotated pairs without an axis")
    return [*given, 0]


def restored_sections(get: Callable[[str], Any]) -> list[int]:
    """Sections as config.json has them."""
    return [int(n) for n in get(_SECTIONS)][:3]


def _computed(h: Config) -> Mapping[str, Any]:
    keys = computed(h)
    return {**keys, _SECTIONS: sections(h, keys[gguf.Keys.Rope.DIMENSION_COUNT] // 2, [11, 11, 10])}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {**restored(get), "rope_scaling": {"rope_type": "default", "mrope_section": restored_sections(get)}}


_dense = {r: DECODER[r] for r in ("ffn_gate", "ffn_up", "ffn_down")}
_small = {
    "initializer_range": 0.06,  # delta nets of larger random numbers are chaotic
    "head_dim": 64,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    },
}
_other = {
    "initializer_range": 0.06,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "tie_word_embeddings": True,
    "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
}
_experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
_implied = {**IMPLIED, "attn_output_gate": True}

ARCH = (
    Arch(
        hf=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        name="qwen35",
        model_type="qwen3_5_text",
        tensors=with_mtp(ATTENTION | on_linear(_linear) | _dense, PLUS_ONE),
        scale_groups=SCALE_GROUPS,
        defaults={**DEFAULTS, "num_key_value_heads": 4},
        metadata_keys=METADATA,
        computed=_computed,
        restored=_restored,
        implied=_implied,
        dims=dims,
        layers=layers,
        nextn=apart,
        rope_types=frozenset({"default"}),
        partial_rotary=True,
        others=VISION,
        samples={"": _small, "mixed": _other},
    ),
    Arch(
        hf=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        name="qwen35moe",
        model_type="qwen3_5_moe_text",
        tensors=with_mtp(ATTENTION | on_linear(_linear) | experts() | SHARED_EXPERT, PLUS_ONE),
        scale_groups=SCALE_GROUPS,
        defaults={
            **DEFAULTS,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        metadata_keys={**METADATA, **SHARED_EXPERT_KEYS},
        computed=_computed,
        restored=_restored,
        implied={**_implied, "norm_topk_prob": True},
        needed=("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
        dims=dims,
        layers=layers,
        nextn=apart,
        rope_types=frozenset({"default"}),
        partial_rotary=True,
        others=VISION,
        samples={"": {**_small, **_experts}, "mixed": {**_other, **_experts, "num_experts": 4, "num_experts_per_tok": 3}},
    ),
)
