"""Adapters as PEFT saves them, made by hand, and small checkpoints to put them on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

F32 = np.ndarray[Any, np.dtype[np.float32]]
HIDDEN, INTER, VOCAB, LAYERS = 32, 48, 40, 2
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTER,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "max_position_embeddings": 128,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng([seed, *shape]).normal(0, 0.3, shape).astype(np.float32)


def llama(directory: Path, **config: Any) -> dict[str, F32]:
    """A checkpoint of a Llama in f32; its tensors. A tied one stores no head."""
    given = LLAMA | config
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not given["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return checkpoint(directory, given, shapes)


def checkpoint(directory: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, F32]:
    """Random tensors of these shapes."""
    directory.mkdir()
    tensors = {n: random(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def save(directory: Path, tensors: Mapping[str, F32], prefix: str = "base_model.model.", **config: Any) -> Path:
    """An adapter with these tensors."""
    directory.mkdir()
    save_file({prefix + k: np.ascontiguousarray(v) for k, v in tensors.items()}, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"} | config
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def low_rank(module: str, out: int, n: int, rank: int = 4, seed: int = 1) -> dict[str, F32]:
    """lora_A and lora_B of a linear layer."""
    return {
        f"{module}.lora_A.weight": random(rank, n, seed=seed),
        f"{module}.lora_B.weight": random(out, rank, seed=seed + 1),
    }
