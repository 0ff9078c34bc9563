"""IBM's Granite: Llama with multipliers on embeddings, attention, residuals and logits; its mixtures of experts."""

from dataclasses import replace

import gguf

from .base import Arch
from .decoder import ATTENTION_SCALE_GROUPS, rope_freqs
from .keys import EXPERTS_OF_WHICH_SOME, PAIRED_METADATA
from .llama import ARCH as LLAMA
from .llama import ROPE_TYPES
from .tensors import From, Tensor, part

_llm = gguf.Keys.LLM
MULTIPLIERS = {
    gguf.Keys.Attention.SCALE: ("attention_multiplier", float),
    _llm.EMBEDDING_SCALE: ("embedding_multiplier", float),
    _llm.RESIDUAL_SCALE: ("residual_multiplier", float),
    _llm.LOGIT_SCALE: ("logits_scaling", float),
}
DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_MOE = "model.layers.{bid}.block_sparse_moe."
_SHARED = "model.layers.{bid}.shared_mlp."
_gate_and_up = (
    From(_MOE + "input_linear", ("experts", "2*expert_ff", "embd"), part(0, "expert_ff", "expert_ff", per="experts")),
    From(_MOE + "input_linear", ("experts", "2*expert_ff", "embd"), part(1, "expert_ff", "expert_ff", per="experts")),
)
EXPERTS = {
    "ffn_gate_inp": Tensor(("experts", "embd"), _MOE + "router.layer"),
    "ffn_gate_exps": Tensor(("experts", "expert_ff", "embd"), _gate_and_up[0]),
    "ffn_up_exps": Tensor(("experts", "expert_ff", "embd"), _gate_and_up[1]),
    "ffn_down_exps": Tensor(("experts", "embd", "expert_ff"), _MOE + "output_linear"),
}


def shared(suffix: str, where: str = "") -> dict[str, Tensor]:
    """The MLP beside the experts, or without such, of size "shared_ff"; suffix: of its roles, "_shexp" or none."""
    fused = ("2*shared_ff", "embd")
    gate, up = (From(_SHARED + "input_linear", fused, part(i, "shared_ff", "shared_ff")) for i in range(2))
    return {
        f"ffn_gate{suffix}": Tensor(("shared_ff", "embd"), gate, where=where),
        f"ffn_up{suffix}": Tensor(("shared_ff", "embd"), up, where=where),
        f"ffn_down{suffix}": Tensor(("embd", "shared_ff"), _SHARED + "output_linear", where=where),
    }


_scaled = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.5}
_llama3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_attention = {role: t for role, t in LLAMA.tensors.items() if role not in ("ffn_gate", "ffn_up", "ffn_down")}

DENSE = Arch(
    hf=("GraniteForCausalLM",),
    name="granite",
    tensors=LLAMA.tensors,
    scale_groups=LLAMA.scale_groups,
    defaults=DEFAULTS,
    metadata_keys={**PAIRED_METADATA, **MULTIPLIERS},
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
    samples={
        "": {**_scaled, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
        "tied": {**_scaled, "attention_multiplier": 0.05, "tie_word_embeddings": True, "rope_parameters": _llama3},
    },
)
MOE = Arch(
    hf=("GraniteMoeForCausalLM",),
    name="granitemoe",
    tensors=_attention | EXPERTS,
    scale_groups=ATTENTION_SCALE_GROUPS,
    defaults={**DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    metadata_keys={**PAIRED_METADATA, **EXPERTS_OF_WHICH_SOME, **MULTIPLIERS},
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
    samples={
        "": {**_scaled, "residual_multiplier": 0.4, "attention_bias": True, "num_local_experts": 5, "num_experts_per_tok": 3},
        "tied": {**_scaled, "num_local_experts": 3, "tie_word_embeddings": True, "rope_parameters": _llama3},
    },
)
ARCH = (
    DENSE,
    MOE,
    replace(
        MOE,
        hf=("GraniteMoeSharedForCausalLM",),
        model_type="granitemoeshared",
        tensors={**MOE.tensors, **shared("_shexp")},
        needed=(*MOE.needed, "shared_intermediate_size"),
        metadata_keys={**MOE.metadata_keys, _llm.EXPERT_SHARED_FEED_FORWARD_LENGTH: ("shared_intermediate_size", int)},
        dims=lambda h, layer: {"shared_ff": h["shared_intermediate_size"]},
        told_by=lambda get: bool(get(_llm.EXPERT_SHARED_FEED_FORWARD_LENGTH)),
        samples={"": {**_scaled, "num_local_experts": 5, "shared_intermediate_size": 32}},
    ),
)
