"""Mamba 1 and Falcon Mamba: blocks of selective state spaces, no attention, no positions."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .base import Arch
from .tensors import Config, From, Tensor
from .weight import MINUS_EXP

logger = logging.getLogger(__name__)
_llm, _att, _ssm = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.SSM
NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
ANY_CONTEXT = 1 << 20
"""What llama.cpp's converter states for models whose state is all the context they have."""


def mixer(stem: str, where: str = "") -> dict[str, Tensor]:
    """Mamba 1's state space; stem: its name in the checkpoint, with {bid}."""
    return {
        "ssm_in": Tensor(("2*inner", "embd"), stem + "in_proj", where=where),
        "ssm_conv1d": Tensor(("inner", "conv"), From(stem + "conv1d", ("inner", "1", "conv")), bias=True, where=where),
        "ssm_x": Tensor(("rank+2*state", "inner"), stem + "x_proj", where=where),
        "ssm_dt": Tensor(("inner", "rank"), stem + "dt_proj", bias=True, where=where),
        "ssm_a": Tensor(("inner", "state"), From(stem + "A_log", suffix=""), suffix="", value=MINUS_EXP, where=where),
        "ssm_d": Tensor(("inner",), From(stem + "D", suffix=""), suffix="", where=where),
        "ssm_out": Tensor(("embd", "inner"), stem + "out_proj", where=where),
    }


def rank(h: Config, key: str = "time_step_rank") -> int:
    """Width of the step size before its last projection."""
    given = h.get(key, "auto")
    return -(-h["hidden_size"] // 16) if given == "auto" else int(given)


def _computed(normed: bool) -> Callable[[Config], dict[str, Any]]:
    return lambda h: {
        _llm.CONTEXT_LENGTH: ANY_CONTEXT,
        _llm.FEED_FORWARD_LENGTH: 0,
        _att.HEAD_COUNT: 0,
        _ssm.INNER_SIZE: 2 * h["hidden_size"],
        _ssm.TIME_STEP_RANK: rank(h),
        _ssm.DT_B_C_RMS: normed,
    }


_mamba = Arch(
    hf=("MambaForCausalLM", "MambaLMHeadModel"),
    name="mamba",
    tensors={
        "token_embd": Tensor(("vocab", "embd"), "backbone.embeddings", also=("backbone.embedding",)),
        "output_norm": Tensor(("embd",), "backbone.norm_f"),
        "output": Tensor(("vocab", "embd"), "lm_head", tied="tie_word_embeddings"),
        "attn_norm": Tensor(("embd",), "backbone.layers.{bid}.norm"),
    }
    | mixer("backbone.layers.{bid}.mixer."),
    needed=(*NEEDED, "state_size", "conv_kernel"),
    defaults={"state_size": 16, "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    metadata_keys={
        _llm.BLOCK_COUNT: ("num_hidden_layers", int),
        _llm.EMBEDDING_LENGTH: ("hidden_size", int),
        _ssm.CONV_KERNEL: ("conv_kernel", int),
        _ssm.STATE_SIZE: ("state_size", int),
        _att.LAYERNORM_RMS_EPS: ("layer_norm_epsilon", float),
    },
    computed=_computed(False),
    restored=lambda get: {"time_step_rank": int(get(_ssm.TIME_STEP_RANK))},
    dims=lambda h, layer: {
        "inner": 2 * h["hidden_size"],
        "state": h["state_size"],
        "conv": h["conv_kernel"],
        "rank": rank(h),
    },
    implied={
        "expand": 2,
        "intermediate_size": lambda h: 2 * h["hidden_size"],
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
    },
    rope_types=frozenset(),
    told_by=lambda get: not get(_ssm.DT_B_C_RMS),
    samples={
        "": {
            "intermediate_size": 128,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "state_size": 12,
            "time_step_rank": 7,
        },
        "tied": {"intermediate_size": 128, "num_attention_heads": None, "num_key_value_heads": None, "tie_word_embeddings": True},
    },
)


def _falcon_computed(h: Config) -> dict[str, Any]:
    """The graph has one epsilon for all norms, which in releases are 1e-5 and 1e-6: that much is passed over."""
    both = h["layer_norm_epsilon"], h["mixer_rms_eps"]
    if both[0] != both[1]:
        said = f"config.json: layer_norm_epsilon {both[0]}, mixer_rms_eps {both[1]}: llama.cpp takes the first for both"
        if max(both) > 1e-5:
            raise UnsupportedError(said)
        logger.warning("%s", said)
    return _computed(True)(h)


ARCH = (
    _mamba,
    replace(
        _mamba,
        hf=("FalconMambaForCausalLM",),
        model_type="falcon_mamba",
        defaults={**_mamba.defaults, "mixer_rms_eps": 1e-6},
        computed=_falcon_computed,
        told_by=lambda get: bool(get(_ssm.DT_B_C_RMS)),
        samples={
            "": {**_mamba.samples[""], "layer_norm_epsilon": 1e-6},
            "released epsilons": {**_mamba.samples["tied"], "layer_norm_epsilon": 1e-5},
        },
    ),
)
