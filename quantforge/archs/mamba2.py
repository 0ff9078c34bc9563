"""Mamba 2: state spaces of heads, a gated norm by groups."""

import gguf

from .base import Arch
from .mamba import ANY_CONTEXT, NEEDED
from .tensors import Config, From, Tensor
from .weight import MINUS_EXP

_llm, _att, _ssm = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.SSM
_LAYER = "backbone.layers.{bid}."


def mixer(stem: str) -> dict[str, Tensor]:
    """Mamba 2's state space without its norm; stem: its name in the checkpoint, with {bid}."""
    return {
        "ssm_in": Tensor(("2*inner+2*groups*state+ssm_heads", "embd"), stem + "in_proj"),
        "ssm_conv1d": Tensor(
            ("inner+2*groups*state", "conv"), From(stem + "conv1d", ("inner+2*groups*state", "1", "conv")), bias=True
        ),
        "ssm_dt": Tensor(("ssm_heads",), From(stem + "dt_bias", suffix=""), suffix=".bias"),
        "ssm_a": Tensor(("ssm_heads", "1"), From(stem + "A_log", ("ssm_heads",), suffix=""), suffix="", value=MINUS_EXP),
        "ssm_d": Tensor(("ssm_heads", "1"), From(stem + "D", ("ssm_heads",), suffix=""), suffix=""),
        "ssm_out": Tensor(("embd", "inner"), stem + "out_proj"),
    }


def any_step(h: Config) -> object:
    """time_step_limit, where it limits nothing."""
    given = h.get("time_step_limit")
    free = given is None or list(given) in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
    return given if free else [0.0, float("inf")]


ARCH = Arch(
    hf=("Mamba2ForCausalLM",),
    name="mamba2",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "backbone.embeddings", also=("backbone.embedding",)),
        "output_norm": Tensor(("embd",), "backbone.norm_f"),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        "attn_norm": Tensor(("embd",), _LAYER + "norm"),
        "ssm_norm": Tensor(("groups", "inner/groups"), From(_LAYER + "mixer.norm", ("inner",))),
    }
    | mixer(_LAYER + "mixer."),
    needed=(*NEEDED, "num_heads", "n_groups", "state_size", "conv_kernel"),
    defaults={
        "state_size": 128,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5,
        "n_groups": 8,
        "num_heads": 128,
        "tie_word_embeddings": False,
    },
    metadata_keys={
        _llm.BLOCK_COUNT: ("num_hidden_layers", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _ssm.CONV_KERNEL: ("conv_kernel", int),
        _ssm.STATE_SIZE: ("state_size", int),
        _ssm.TIME_STEP_RANK: ("num_heads", int),
        _ssm.GROUP_COUNT: ("n_groups", int),
        _att.LAYERNORM_RMS_EPS: ("layer_norm_epsilon", float),
    },
    computed=lambda h: {
        _llm.CONTEXT_LENGTH: ANY_CONTEXT,
        _llm.FEED_FORWARD_LENGTH: 0,
        _att.HEAD_COUNT: 0,
        _ssm.INNER_SIZE: 2 * h["hidden_size"],
    },
    dims=lambda h, layer: {
        "inner": 2 * h["hidden_size"],
        "state": h["state_size"],
        "conv": h["conv_kernel"],
        "groups": h["n_groups"],
        "inner/groups": 2 * h["hidden_size"] // h["n_groups"],
        "ssm_heads": h["num_heads"],
    },
    implied={
        "expand": 2,
        "head_dim": lambda h: 2 * h["hidden_size"] // h["num_heads"],
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": any_step,
    },
    rope_types=frozenset(),
    samples={
        "": {
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 16,
        },
        "tied": {
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "num_heads": 4,
            "head_dim": 32,
            "n_groups": 1,
            "state_size": 32,
            "tie_word_embeddings": True,
        },
    },
)
