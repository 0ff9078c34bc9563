"""transformers' module of a model without its weights, and what a checkpoint calls its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..formats import Source

FUSED = {".gate_up_proj": ("gate_proj", "up_proj"), ".down_proj": ("down_proj",)}
"""transformers 5 keeps experts stacked; checkpoints have them one by one: suffix after "experts" -> what is joined."""

RENAMED = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"^embed_out\.", "lm_head."),
)
"""Older names in checkpoints that transformers 5 renames while loading."""


def meta_module(config: Mapping[str, Any], source: Source, dtype: torch.dtype) -> Any:
    """transformers' causal language model for a config, parameters on the meta device, buffers real."""
    import transformers

    names = list(config.get("architectures") or ())
    classes = [getattr(transformers, n, None) for n in names]
    cls = next((c for c in classes if c is not None), None)
    if cls is None or not hasattr(cls, "config_class") or "PreTrainedModel" not in {b.__name__ for b in cls.__mro__}:
        what = f"architectures {names}" if names else "no architectures in config.json"
        raise UnsupportedError(f"{source.path}: {what}: not a model class of transformers {transformers.__version__}")
    plain = {
        k: v for k, v in config.items() if k not in ("quantization_config", "architectures", "torch_dtype", "dtype", "auto_map")
    }
    settings = cls.config_class(**plain)
    if not hasattr(cls, "get_output_embeddings") or not hasattr(settings, "vocab_size"):
        raise UnsupportedError(f"{source.path}: {names[0]} is not a causal language model")
    settings._attn_implementation = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"

    def to_meta(owner: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # what is there already must stay the same object: a head is tied by registering the embedding's weight
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)

    # a fresh parameter becomes meta the moment a module registers it: its memory is never touched
    hook = nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        module = cls(settings)
    finally:
        torch.set_default_dtype(before)
        hook.remove()
    return module.eval()


def find_layers(module: Any, name: str) -> nn.ModuleList:
    """The decoder's blocks. Raises UnsupportedError where there is more than one list of them; name: the model's, for that."""
    lists = [m for m in module.get_decoder().children() if isinstance(m, nn.ModuleList)]
    if len(lists) != 1:
        raise UnsupportedError(f"{name}: {type(module).__name__} has {len(lists)} lists of blocks; one is needed")
    return lists[0]


def module_name(name: str, expected: set[str], base: str) -> str:
    """What the module calls a tensor of a checkpoint: older names, and those saved without the head, which lack "model."."""
    if name in expected:
        return name
    newer = name
    for old, new in RENAMED:
        newer = re.sub(old, new, newer)
    return next((k for k in (newer, f"{base}.{name}", f"{base}.{newer}") if k in expected), name)


def find_tied(module: Any) -> dict[str, str]:
    """Head's weight -> embedding's weight, where they are one."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    names = {id(m): k for k, m in module.named_modules()}
    same = head is not None and head.weight is embedding.weight
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"} if same else {}


def checkpoint_shapes(module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as a checkpoint has them: a tied head left out, stacked experts one by one."""
    tied = find_tied(module)
    for name, value in module.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        match = re.search(r"\.experts(\.\w+)$", name)
        if match and match.group(1) in FUSED and value.ndim == 3:
            parts = FUSED[match.group(1)]
            stem = name.removesuffix(match.group(1))
            for e in range(value.shape[0]):
                for part in parts:
                    yield f"{stem}.{e}.{part}.weight", (value.shape[1] // len(parts), value.shape[2])
        else:
            yield name, tuple(value.shape)
