"""HRM: two stacks of blocks, run in turns many times over; norms without weights, gated attention."""

from dataclasses import replace
from typing import Any

import gguf

from .base import NEEDED, Arch
from .keys import METADATA
from .tensors import Config, From, Tensor, part

_llm, _att, _rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope


def _stack(h: Config) -> int:
    """Blocks of one stack; older configs have that in num_hidden_layers, which now counts every turn."""
    return int(h.get("num_layers_per_stack") or h["num_hidden_layers"])


def _turns(h: Config) -> int:
    return int(h["H_cycles"] * (h["L_cycles"] + 1))


def _blocks(stack: str, number: str) -> dict[str, Tensor]:
    layer = f"model.{stack}_module.layers.{{{number}}}."

    def fused(which: int) -> tuple[From, ...]:
        return (From(layer + "attn.gqkv_proj", ("4*q", "embd"), part(which, "q", "q", "q", "q")),)

    def joined(which: int) -> tuple[From, ...]:
        return (From(layer + "mlp.gate_up_proj", ("2*ff", "embd"), part(which, "ff", "ff")),)

    roles = {
        "attn_gate": Tensor(("q", "embd"), layer + "self_attn.gate_proj", also=fused(0)),
        "attn_q": Tensor(("q", "embd"), layer + "self_attn.q_proj", also=fused(1)),
        "attn_k": Tensor(("q", "embd"), layer + "self_attn.k_proj", also=fused(2)),
        "attn_v": Tensor(("q", "embd"), layer + "self_attn.v_proj", also=fused(3)),
        "attn_output": Tensor(("embd", "q"), layer + "self_attn.o_proj", also=(layer + "attn.o_proj",)),
        "ffn_gate": Tensor(("ff", "embd"), layer + "mlp.gate_proj", also=joined(0)),
        "ffn_up": Tensor(("ff", "embd"), layer + "mlp.up_proj", also=joined(1)),
        "ffn_down": Tensor(("embd", "ff"), layer + "mlp.down_proj"),
    }
    return {role: replace(t, where=stack) for role, t in roles.items()}


def _scale(h: Config) -> float:
    return float(h.get("embedding_scale") or 1.0 / h["initializer_range"])


def _computed(h: Config) -> dict[str, Any]:
    return {
        _llm.BLOCK_COUNT: _stack(h) * _turns(h),
        "{arch}.embedding_scale": _scale(h),
        "{arch}.hrm.layers_per_stack": _stack(h),
    }


ARCH = Arch(
    hf=("HrmTextForCausalLM",),
    name="hrm_text",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "model.embed_tokens"),
        "hrm.z_l_init": Tensor(("embd",), From("model.z_L_init", suffix=""), suffix=""),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        **_blocks("L", "bid"),
        **{f"blk.{{bid}}.{role}": t for role, t in _blocks("H", "above").items()},
    },
    needed=(*NEEDED, "H_cycles", "L_cycles"),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "H_cycles": 2,
        "L_cycles": 3,
        "initializer_range": 0.02,
        "prefix_lm": True,
    },
    metadata_keys={
        **METADATA,
        _rope.DIMENSION_COUNT: ("key_length", int),
        "{arch}.embedding_scale": ("embedding_scale", float),
        "{arch}.hrm.layers_per_stack": ("num_layers_per_stack", int),
        "{arch}.hrm.h_cycles": ("H_cycles", int),
        "{arch}.hrm.l_cycles": ("L_cycles", int),
        "{arch}.hrm.prefix_lm": ("prefix_lm", bool),
    },
    computed=_computed,
    block_count=lambda h: 2 * _stack(h),
    layers=lambda h: [("L",)] * _stack(h) + [("H",)] * _stack(h),
    dims=lambda h, layer: {"above": (layer or 0) - _stack(h)},
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": lambda h: h["num_attention_heads"],
    },
    samples={
        "": {
            "num_key_value_heads": 4,
            "head_dim": 24,
            "num_hidden_layers": 2,
            "H_cycles": 2,
            "L_cycles": 2,
            "embedding_scale": 3.0,
            "prefix_lm": False,
        },
        "tied": {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_hidden_layers": 1,
            "tie_word_embeddings": True,
        },
    },
)
