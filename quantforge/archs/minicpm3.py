"""MiniCPM3: queries, keys and values through low ranks; scaled embeddings, residuals and logits."""

import gguf

from .base import NEEDED, Arch
from .decoder import DECODER
from .keys import METADATA
from .tensors import Config, Tensor

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_SELF = "model.layers.{bid}.self_attn."


def _values(h: Config) -> int:
    return int(h.get("v_head_dim") or h["hidden_size"] // h["num_attention_heads"])


ARCH = Arch(
    hf=("MiniCPM3ForCausalLM",),
    name="minicpm3",
    tensors={role: t for role, t in DECODER.items() if role not in ("attn_q", "attn_k", "attn_v")}
    | {
        "attn_q_a": Tensor(("q_rank", "embd"), _SELF + "q_a_proj"),
        "attn_q_a_norm": Tensor(("q_rank",), _SELF + "q_a_layernorm"),
        "attn_q_b": Tensor(("q", "q_rank"), _SELF + "q_b_proj"),
        "attn_kv_a_mqa": Tensor(("kv_rank+rotated", "embd"), _SELF + "kv_a_proj_with_mqa"),
        "attn_kv_a_norm": Tensor(("kv_rank",), _SELF + "kv_a_layernorm"),
        "attn_kv_b": Tensor(("heads*plain+values", "kv_rank"), _SELF + "kv_b_proj"),
        "attn_output": Tensor(("embd", "values"), _SELF + "o_proj"),
    },
    needed=(*NEEDED, "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "tie_word_embeddings": True,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if v[0] != "head_dim"},
        _llm.VOCAB_SIZE: ("vocab_size", int),
        _att.Q_LORA_RANK: ("q_lora_rank", int),
        _att.KV_LORA_RANK: ("kv_lora_rank", int),
        _rope.DIMENSION_COUNT: ("qk_rope_head_dim", int),
        _att.VALUE_LENGTH: ("v_head_dim", int),
    },
    computed=lambda h: {
        _att.KEY_LENGTH: h["qk_nope_head_dim"] + h["qk_rope_head_dim"],
        _att.VALUE_LENGTH: _values(h),
    },
    restored=lambda get: {
        "qk_nope_head_dim": int(get(_att.KEY_LENGTH) - get(_rope.DIMENSION_COUNT)),
        "head_dim": int(get(_rope.DIMENSION_COUNT)),
    },
    dims=lambda h, layer: {
        "q": h["num_attention_heads"] * (h["qk_nope_head_dim"] + h["qk_rope_head_dim"]),
        "q_rank": h["q_lora_rank"],
        "kv_rank": h["kv_lora_rank"],
        "rotated": h["qk_rope_head_dim"],
        "plain": h["qk_nope_head_dim"],
        "values": h["num_attention_heads"] * _values(h),
    },
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "num_key_value_heads": lambda h: h["num_attention_heads"],
    },
    rope_types=frozenset({"default"}),
    samples={
        "": {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 20,
            "qk_rope_head_dim": 12,
            "v_head_dim": 28,
        },
        "tied": {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "tie_word_embeddings": True,
        },
    },
)
