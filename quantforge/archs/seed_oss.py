"""ByteDance's Seed-OSS: Qwen2's biases, a head size of its own."""

from dataclasses import replace

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS
from .keys import METADATA

ARCH = Arch(
    hf=("SeedOssForCausalLM",),
    name="seed_oss",
    tensors={role: t for role, t in DECODER.items() if role != "ffn_norm"}
    | {r: replace(DECODER[r], bias="attention_bias") for r in ("attn_q", "attn_k", "attn_v")}
    | {"post_attention_norm": DECODER["ffn_norm"]},
    scale_groups=tuple(replace(g, source="post_attention_norm") if g.source == "ffn_norm" else g for g in DECODER_SCALE_GROUPS),
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "attention_bias": True,
    },
    metadata_keys=METADATA,
    implied={"hidden_act": "silu", "attention_out_bias": False, "mlp_bias": False},
    samples={
        "": {"head_dim": 32, "attention_bias": True},
        "tied": {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True},
    },
)
