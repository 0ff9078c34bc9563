"""What most decoders have: their tensors, experts, the scales that AWQ may move, tensors of rope factors."""

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedError
from .rope import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, llama3_rope_factors, rotated
from .tensors import Config, Dims, From, ScaleGroup, Tensor, part
from .weight import Weight


def rope_freqs(h: Config) -> list[Weight]:
    """The tensor in which llama.cpp takes Llama 3's rope scaling, if the model has one."""
    if h["rope"]["rope_type"] != "llama3":
        return []
    factors = llama3_rope_factors(h["rope"], h["key_length"])
    return [Weight(ROPE_FREQS, factors.shape, constant=factors)]


def longrope_factors(h: Config) -> list[Weight]:
    """The tensors in which llama.cpp takes LongRoPE's factors, if the model has them. Raises UnsupportedError."""
    if h["rope"]["rope_type"] != "longrope":
        return []
    made = []
    for name, key in ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor")):
        factors = np.array(h["rope"][key], np.float32)
        if factors.size != rotated(h) // 2:
            raise UnsupportedError(f"config.json: rope {key} has {factors.size} numbers, but {rotated(h) // 2} pairs are rotated")
        made.append(Weight(name, factors.shape, constant=factors))
    return made


DECODER: dict[str, Tensor] = {
    "token_embd": Tensor(("vocab", "embd"), "model.embed_tokens"),
    "output_norm": Tensor(("embd",), "model.norm"),
    "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
    "attn_norm": Tensor(("embd",), "model.layers.{bid}.input_layernorm"),
    "attn_q": Tensor(("q", "embd"), "model.layers.{bid}.self_attn.q_proj"),
    "attn_k": Tensor(("kv", "embd"), "model.layers.{bid}.self_attn.k_proj"),
    "attn_v": Tensor(("kv", "embd"), "model.layers.{bid}.self_attn.v_proj"),
    "attn_output": Tensor(("embd", "q"), "model.layers.{bid}.self_attn.o_proj"),
    "ffn_norm": Tensor(("embd",), "model.layers.{bid}.post_attention_layernorm"),
    "ffn_gate": Tensor(("ff", "embd"), "model.layers.{bid}.mlp.gate_proj"),
    "ffn_up": Tensor(("ff", "embd"), "model.layers.{bid}.mlp.up_proj"),
    "ffn_down": Tensor(("embd", "ff"), "model.layers.{bid}.mlp.down_proj"),
}
"""A pre-norm decoder with gated MLP, without biases; architectures override roles and add to them."""

ATTENTION_ONLY: dict[str, Tensor] = {r: t for r, t in DECODER.items() if r not in ("ffn_gate", "ffn_up", "ffn_down")}
"""DECODER without its MLP, where experts are in its place."""

QK_NORM: dict[str, Tensor] = {
    "attn_q_norm": Tensor(("head",), "model.layers.{bid}.self_attn.q_norm"),
    "attn_k_norm": Tensor(("head",), "model.layers.{bid}.self_attn.k_norm"),
}
"""A norm on each head's queries and keys."""

DECODER_SCALE_GROUPS = (
    ScaleGroup("attn_norm", ("attn_q", "attn_k", "attn_v")),
    ScaleGroup("attn_v", ("attn_output",)),
    ScaleGroup("ffn_norm", ("ffn_gate", "ffn_up")),
    ScaleGroup("ffn_up", ("ffn_down",)),
)

ATTENTION_SCALE_GROUPS = DECODER_SCALE_GROUPS[:2]


def experts(
    mlp: str = "model.layers.{bid}.mlp", where: str = "", router: str = "gate", words: str = "gate up down", module: str = ""
) -> dict[str, Tensor]:
    """A router and the stacked experts, which releases have one by one or, as transformers holds them, joined.

    words: what gate, up and down are called; "gate_proj" and so on by default. module: what transformers calls `mlp`.
    """
    gate, up, down = (f"{w}_proj" if w in ("gate", "up", "down") else w for w in words.split())
    both: Dims = ("experts", "2*expert_ff", "embd")
    joined = [f"{m}.experts" for m in dict.fromkeys((mlp, module or mlp))]

    def half(which: int) -> tuple[From, ...]:
        rows = part(which, "expert_ff", "expert_ff", per="experts")
        return tuple(From(f"{m}.gate_up_proj", both, rows, suffix="") for m in joined)

    return {
        "ffn_gate_inp": Tensor(
            ("experts", "embd"), f"{mlp}.{router}", where=where, also=(f"{module}.{router}",) if module else ()
        ),
        "ffn_gate_exps": Tensor(
            ("experts", "expert_ff", "embd"),
            f"{mlp}.experts.{{eid}}.{gate}",
            where=where,
            also=half(0),
        ),
        "ffn_up_exps": Tensor(
            ("experts", "expert_ff", "embd"),
            f"{mlp}.experts.{{eid}}.{up}",
            where=where,
            also=half(1),
        ),
        "ffn_down_exps": Tensor(
            ("experts", "embd", "expert_ff"),
            f"{mlp}.experts.{{eid}}.{down}",
            where=where,
            also=tuple(From(f"{m}.down_proj", suffix="") for m in joined),
        ),
    }
