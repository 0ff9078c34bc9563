"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 whose layers attend to the tokens that an indexer scores highest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from ..errors import UnsupportedError
from .deepseek import ARCH as DEEPSEEK
from .deepseek import dims, layers
from .tensors import Config, Sizes, Tensor

_indexer = gguf.Keys.Attention.Indexer
_TYPES = "{arch}.attention.indexer.types"
_INDEXER = "model.layers.{bid}.self_attn.indexer."
_V3 = next(a for a in DEEPSEEK if "DeepseekV3ForCausalLM" in a.hf)

_roles = {
    "indexer.attn_q_b": Tensor(("index_heads*index_head", "q_lora"), _INDEXER + "wq_b"),
    "indexer.attn_k": Tensor(("index_head", "embd"), _INDEXER + "wk"),
    "indexer.k_norm": Tensor(("index_head",), _INDEXER + "k_norm", bias=True),
    "indexer.proj": Tensor(("index_heads", "embd"), _INDEXER + "weights_proj"),
}


def _dims(h: Config, layer: int | None) -> Sizes:
    return {**dims(h, layer), "index_heads": h["index_n_heads"], "index_head": h["index_head_dim"]}


def _full(h: Config) -> list[bool]:
    """Which layers have an indexer of their own; others attend to the same tokens as the last of these."""
    count, pattern = h["num_hidden_layers"], h.get("indexer_types") or h.get("index_topk_pattern")
    if pattern is not None:
        return [kind in ("full", "F") for kind in pattern]
    every, offset = max(h.get("index_topk_freq", 1), 1), h.get("index_skip_topk_offset", 2)
    return [max(i - offset + 1, 0) % every == 0 for i in range(count)]


def _layers(h: Config) -> Sequence[Collection[str]]:
    full = _full(h)
    return [(*kinds, "indexer") if i < len(full) and full[i] else kinds for i, kinds in enumerate(layers(h))]


def _computed(shared: bool) -> Callable[[Config], Mapping[str, Any]]:
    def computed(h: Config) -> Mapping[str, Any]:
        if h["index_head_dim"] % 64:
            raise UnsupportedError(f"config.json: index_head_dim {h['index_head_dim']}: llama.cpp rotates by multiples of 64")
        if h["rope"].get("mscale_all_dim", 1.0) != 1.0:
            raise UnsupportedError(
                "config.json: yarn rope scaling: llama.cpp runs deepseek32 models only with mscale_all_dim = 1"
            )
        keys = dict(_V3.computed(h) if _V3.computed else {})
        return keys | ({_TYPES: _full(h)} if shared else {})

    return computed


def _restored(get: Callable[[str], Any]) -> Mapping[str, Any]:
    config = dict(_V3.restored(get) if _V3.restored else {})
    types = get(_TYPES)
    return config | ({} if types is None else {"indexer_types": ["full" if own else "shared" for own in types]})


_implied = {k: v for k, v in _V3.implied.items() if k != "rope_interleave"} | {"mlp_bias": False}
_yarn = _V3.samples[""]["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 1.0}
_small = dict(_V3.samples[""]) | {"rope_parameters": _yarn, "index_n_heads": 8, "index_head_dim": 64, "index_topk": 24}

_v32 = replace(
    _V3,
    hf=("DeepseekV32ForCausalLM",),
    name="deepseek32",
    model_type="deepseek_v32",
    tensors=dict(_V3.tensors) | _roles,
    defaults={
        **_V3.defaults,
        "max_position_embeddings": 163840,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
    },
    metadata_keys={
        **_V3.metadata_keys,
        _indexer.HEAD_COUNT: ("index_n_heads", int),
        _indexer.KEY_LENGTH: ("index_head_dim", int),
        _indexer.TOP_K: ("index_topk", int),
    },
    computed=_computed(shared=False),
    implied={**_implied, "indexer_types": lambda h: ["full"] * h["num_hidden_layers"]},
    dims=_dims,
    told_by=None,
    samples={"": _small},
)

ARCH = (
    _v32,
    replace(
        _v32,
        hf=("GlmMoeDsaForCausalLM",),
        name="glm-dsa",
        model_type="glm_moe_dsa",
        tensors=dict(_V3.tensors)
        | {r: replace(t, where="indexer") for r, t in _roles.items()}
        | {f"{r}@nextn": replace(t, where="nextn & !indexer", optional=True) for r, t in _roles.items()},
        defaults={
            **_v32.defaults,
            "max_position_embeddings": 202752,
            "num_key_value_heads": 64,
            "rms_norm_eps": 1e-5,
            "q_lora_rank": 2048,
            "v_head_dim": 256,
            "qk_nope_head_dim": 192,
            "n_group": 1,
            "topk_group": 1,
            "index_n_heads": 32,
        },
        computed=_computed(shared=True),
        restored=_restored,
        implied=_implied,
        layers=_layers,
        rope_types=frozenset({"default"}),
        samples={
            "": {k: v for k, v in _small.items() if k not in ("rope_parameters", "n_group", "topk_group")}
            | {"n_group": 1, "topk_group": 1, "indexer_types": ["full", "shared", "full", "shared"]},
        },
    ),
)
