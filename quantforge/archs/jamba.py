"""Jamba: layers of state spaces, some of attention; MLPs, some of experts."""

from collections.abc import Callable
from typing import Any

import gguf

from .base import NEEDED, Arch
from .decoder import DECODER, experts
from .keys import METADATA
from .mamba import mixer, rank
from .tensors import Config, Tensor

_llm, _att, _ssm = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.SSM
_LAYER = "model.layers.{bid}."


def _layers(h: Config) -> list[tuple[str, ...]]:
    def at(i: int, kind: str) -> bool:
        return bool(i % h[f"{kind}_layer_period"] == h[f"{kind}_layer_offset"])

    return [
        ("attention" if at(i, "attn") else "mamba", "experts" if h["num_experts"] > 1 and at(i, "expert") else "dense")
        for i in range(h["num_hidden_layers"])
    ]


def _restored(get: Callable[[str], Any]) -> dict[str, Any]:
    n, heads = int(get(_llm.BLOCK_COUNT)), get(_att.HEAD_COUNT_KV)
    which = {
        "attn": [i for i, kv in enumerate(heads) if kv],
        "expert": [i for i in range(n) if get(f"blk.{i}.ffn_gate_inp.weight") is not None],
    }
    config: dict[str, Any] = {
        "num_key_value_heads": int(max(heads)),
        "mamba_dt_rank": int(get(_ssm.TIME_STEP_RANK)),
    }
    for kind, at in which.items():
        config[f"{kind}_layer_period"] = at[1] - at[0] if len(at) > 1 else n + 1
        config[f"{kind}_layer_offset"] = at[0] if at else n
    return config


ARCH = Arch(
    hf=("JambaForCausalLM",),
    name="jamba",
    tensors={
        "token_embd": DECODER["token_embd"],
        "output_norm": Tensor(("embd",), "model.final_layernorm"),
        "output": DECODER["output"],
        "attn_norm": DECODER["attn_norm"],
        "attn_q": Tensor(("q", "embd"), _LAYER + "self_attn.q_proj", where="attention"),
        "attn_k": Tensor(("kv", "embd"), _LAYER + "self_attn.k_proj", where="attention"),
        "attn_v": Tensor(("kv", "embd"), _LAYER + "self_attn.v_proj", where="attention"),
        "attn_output": Tensor(("embd", "q"), _LAYER + "self_attn.o_proj", where="attention"),
        "ssm_dt_norm": Tensor(("rank",), _LAYER + "mamba.dt_layernorm", where="mamba"),
        "ssm_b_norm": Tensor(("state",), _LAYER + "mamba.b_layernorm", where="mamba"),
        "ssm_c_norm": Tensor(("state",), _LAYER + "mamba.c_layernorm", where="mamba"),
        "ffn_norm": Tensor(("embd",), _LAYER + "pre_ff_layernorm"),
        "ffn_gate": Tensor(("ff", "embd"), _LAYER + "feed_forward.gate_proj", where="dense"),
        "ffn_up": Tensor(("ff", "embd"), _LAYER + "feed_forward.up_proj", where="dense"),
        "ffn_down": Tensor(("embd", "ff"), _LAYER + "feed_forward.down_proj", where="dense"),
    }
    | mixer(_LAYER + "mamba.", "mamba")
    | experts(_LAYER + "feed_forward", "experts", router="router"),
    needed=(*NEEDED, "num_experts", "attn_layer_period", "expert_layer_period", "mamba_d_state", "mamba_d_conv"),
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
    },
    metadata_keys={
        **{k: v for k, v in METADATA.items() if k not in (_att.HEAD_COUNT_KV, gguf.Keys.Rope.FREQ_BASE)},
        _ssm.CONV_KERNEL: ("mamba_d_conv", int),
        _ssm.STATE_SIZE: ("mamba_d_state", int),
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
    },
    computed=lambda h: {
        _att.HEAD_COUNT_KV: [h["num_key_value_heads"] if "attention" in kinds else 0 for kinds in _layers(h)],
        _ssm.INNER_SIZE: 2 * h["hidden_size"],
        _ssm.TIME_STEP_RANK: rank(h, "mamba_dt_rank"),
    },
    restored=_restored,
    layers=_layers,
    dims=lambda h, layer: {
        "inner": 2 * h["hidden_size"],
        "state": h["mamba_d_state"],
        "conv": h["mamba_d_conv"],
        "rank": rank(h, "mamba_dt_rank"),
    },
    implied={"hidden_act": "silu", "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False},
    rope_types=frozenset(),
    samples={
        "": {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 3,
            "expert_layer_offset": 1,
            "num_hidden_layers": 5,
            "mamba_d_state": 12,
            "mamba_dt_rank": 7,
        },
        "dense": {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "tie_word_embeddings": True,
        },
    },
)
