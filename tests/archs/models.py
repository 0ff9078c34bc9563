"""Small random models of every registered architecture, as transformers makes them from its own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from quantforge import archs
from tests import checkpoints

USUAL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
"""Head sizes, kinds of layers and the like are each architecture's `samples`."""


def names() -> list[tuple[str, str]]:
    """(class of transformers, sample) of everything that is registered and that transformers has."""
    known = archs.supported()
    return [(n, s) for n in known if hasattr(transformers, n) for s in known[n].samples if n == known[n].hf[0] or s == ""]


def settings(name: str, sample: str = "", **changes: Any) -> dict[str, Any]:
    """Arguments of the class's config: the usual small ones under the names that it has, and the sample's."""
    arch, config = archs.supported()[name], getattr(transformers, name).config_class
    own = {k: v for k, v in arch.aliases.items() if isinstance(v, str)}
    given = {own.get(k, k): v for k, v in USUAL.items()} | dict(arch.samples.get(sample, {})) | changes
    parts = getattr(config, "sub_configs", {})
    if "text_config" not in parts:
        return {k: v for k, v in given.items() if not k.endswith("_config")}
    outside = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    others = {k: given.pop(k) for k in list(given) if k.endswith("_config") or k in outside}
    return {"text_config": given, **others}


def decoder(directory: Path) -> bool:
    """Does a model have a head and nothing to read from but its own tokens?"""
    config = transformers.AutoConfig.from_pretrained(directory)
    return not config.is_encoder_decoder and not config.architectures[0].endswith("Model")


def make(directory: Path, name: str, sample: str = "", **changes: Any) -> Path:
    """A random model in a directory, with a byte-level tokenizer; every norm, bias and vector matters."""
    import torch

    cls = getattr(transformers, name)
    torch.manual_seed(3)
    made = cls(cls.config_class(**settings(name, sample, **changes))).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in key and bool((p == 1).all()) else 0.0))
        for key, b in made.named_buffers():
            if key.endswith(("e_score_correction_bias", "expert_bias")):  # decides which experts are taken
                b.copy_(torch.randn_like(b) * 0.3)
    made.save_pretrained(directory)
    checkpoints.byte_level(directory, 300)
    return directory
