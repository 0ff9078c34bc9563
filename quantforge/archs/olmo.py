"""OLMo: 1 without weights in its norms, 2 and 3 with norms after attention and MLP, and the mixture of experts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from .base import Arch
from .decoder import ATTENTION_ONLY, ATTENTION_SCALE_GROUPS, DECODER, experts
from .keys import EXPERTS_OF_WHICH_SOME, METADATA
from .llama import PAIRED
from .rope import rope_by_kind, sliding_theta
from .tensors import Config, Tensor
from .windows import restored_types, window_pattern

_att, _llm = gguf.Keys.Attention, gguf.Keys.LLM
_LAYER = "model.layers.{bid}."


def _computed_3(h: Config) -> Mapping[str, Any]:
    return {gguf.Keys.Rope.FREQ_BASE_SWA: sliding_theta(h, h["rope"]["rope_theta"]), **window_pattern(h, 4)}


def _restored_3(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {"layer_types": restored_types(get, 4), "rope_parameters": rope_by_kind(get)}


_usual_heads = {
    "hidden_act": "silu",
    "attention_bias": False,
    # the graph takes the head size from these
    "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
}
_norms_of_all_heads = {
    "attn_q_norm": Tensor(("q",), _LAYER + "self_attn.q_norm"),
    "attn_k_norm": Tensor(("kv",), _LAYER + "self_attn.k_norm"),
}
_yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5000.0}

OLMO = Arch(
    hf=("OlmoForCausalLM",),
    name="olmo",
    tensors={role: t for role, t in (DECODER | PAIRED).items() if not role.endswith("norm")},
    defaults={"max_position_embeddings": 2048},
    metadata_keys={
        **{k: v for k, v in METADATA.items() if k != _att.LAYERNORM_RMS_EPS},
        _att.CLAMP_KQV: ("clip_qkv", float),
    },
    computed=lambda h: {_att.LAYERNORM_EPS: 1e-5},
    implied=_usual_heads,
    samples={"": {"clip_qkv": 0.8}, "tied": {"tie_word_embeddings": True, "rope_parameters": _yarn}},
)
OLMO2 = Arch(
    hf=("Olmo2ForCausalLM",),
    name="olmo2",
    tensors={role: t for role, t in DECODER.items() if role not in ("attn_norm", "ffn_norm")}
    | _norms_of_all_heads
    | {
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm"),
        "post_ffw_norm": Tensor(("embd",), _LAYER + "post_feedforward_layernorm"),
    },
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    metadata_keys=METADATA,
    implied={**_usual_heads, "tie_word_embeddings": False},  # the graph asks for a head of its own
    samples={"": {}, "yarn": {"rope_parameters": _yarn}},
)
OLMO3 = replace(
    OLMO2,
    hf=("Olmo3ForCausalLM",),
    model_type="olmo3",
    defaults={**OLMO2.defaults, "rope_theta": 5e5, "sliding_window": 4096},
    metadata_keys={**METADATA, _att.SLIDING_WINDOW: ("sliding_window", int)},
    computed=_computed_3,
    restored=_restored_3,
    window=True,
    told_by=lambda get: bool(get(_att.SLIDING_WINDOW)),
    samples={
        "": {"sliding_window": 32, "num_hidden_layers": 5},
        "yarn": {
            "sliding_window": 48,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {"full_attention": _yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        },
    },
)
OLMOE = Arch(
    hf=("OlmoeForCausalLM",),
    name="olmoe",
    tensors=ATTENTION_ONLY | _norms_of_all_heads | experts(),
    scale_groups=ATTENTION_SCALE_GROUPS,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    aliases={"num_local_experts": "num_experts"},
    metadata_keys={**METADATA, **EXPERTS_OF_WHICH_SOME, _llm.EXPERT_COUNT: ("num_experts", int)},
    implied={
        **_usual_heads,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "num_key_value_heads": lambda h: h["num_attention_heads"],  # the norm of keys is as wide as the model
    },
    samples={"": {"num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 3}},
)
ARCH = (OLMO, OLMO2, OLMO3, OLMOE)
