"""Mistral (7B, Nemo, Small, ...), dense: GGUF has it as llama."""

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS, rope_freqs
from .keys import LLAMA_METADATA
from .llama import PAIRED, ROPE_TYPES

ARCH = Arch(
    hf=("MistralForCausalLM",),
    name="llama",
    model_type="mistral",
    tensors=DECODER | PAIRED,
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    metadata_keys=LLAMA_METADATA,
    implied={"hidden_act": "silu"},
    rope_types=ROPE_TYPES,
    generated=rope_freqs,
    told_by=lambda get: False,
)
