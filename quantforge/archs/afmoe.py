"""AFMoE (Trinity): gated attention, three of four layers with a window and rotation, norms around both halves."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from .base import Arch
from .decoder import DECODER, QK_NORM, experts
from .deepseek import DENSE, SHARED
from .keys import METADATA
from .tensors import Config, From, Sizes, Tensor

_K = gguf.Keys
_llm = _K.LLM
_LAYER = "model.layers.{bid}."
_MLP = _LAYER + "mlp"


def _dims(h: Config, _: int | None) -> Sizes:
    return {"shared_ff": h["moe_intermediate_size"] * h["num_shared_experts"]}


def _computed(_: Config) -> Mapping[str, Any]:
    return {_llm.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID.value, _llm.EXPERT_WEIGHTS_NORM: True}


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    return {"num_shared_experts": int(get(_llm.EXPERT_SHARED_COUNT))}


ARCH = Arch(
    hf=("AfmoeForCausalLM",),
    name="afmoe",
    tensors=dict(DECODER)
    | QK_NORM
    | DENSE
    | {
        "attn_gate": Tensor(("q", "embd"), _LAYER + "self_attn.gate_proj"),
        "post_attention_norm": Tensor(("embd",), _LAYER + "post_attention_layernorm"),
        "ffn_norm": Tensor(("embd",), _LAYER + "pre_mlp_layernorm"),
        "post_ffw_norm": Tensor(("embd",), _LAYER + "post_mlp_layernorm"),
    }
    | experts(where="moe", router="router.gate")
    | {"exp_probs_b": Tensor(("experts",), From(_MLP + ".expert_bias", suffix=""), where="moe", suffix=".bias")}
    | {r: Tensor(t.dims, t.checkpoint, where="moe", when="num_shared_experts") for r, t in SHARED.items()},
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1408,
        "num_dense_layers": 1,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "sliding_window": 1024,
        "mup_enabled": False,
    },
    metadata_keys={
        **METADATA,
        _llm.EXPERT_COUNT: ("num_experts", int),
        _llm.EXPERT_USED_COUNT: ("num_experts_per_tok", int),
        _llm.EXPERT_FEED_FORWARD_LENGTH: ("moe_intermediate_size", int),
        _llm.EXPERT_SHARED_COUNT: ("num_shared_experts", int),
        _llm.LEADING_DENSE_BLOCK_COUNT: ("num_dense_layers", int),
        _llm.EXPERT_WEIGHTS_SCALE: ("route_scale", float),
        _K.Attention.SLIDING_WINDOW: ("sliding_window", int),
    },
    computed=_computed,
    restored=_restored,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mup_enabled": True,  # embeddings are multiplied by the root of their size
        "route_norm": True,
        "score_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "global_attn_every_n_layers": 4,
        "layer_types": lambda h: [
            "sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(h["num_hidden_layers"])
        ],
    },
    window=True,
    dims=_dims,
    layers=lambda h: [("moe",) if i >= h["num_dense_layers"] else () for i in range(h["num_hidden_layers"])],
    samples={
        "": {
            "num_hidden_layers": 8,
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "num_dense_layers": 2,
            "route_scale": 1.5,
            "sliding_window": 48,
            "mup_enabled": True,
        }
    },
)
