"""transformers' module of a model without its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import archs
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..formats import Source

_NOT_SIZES = ("quantization_config", "architectures", "torch_dtype", "dtype", "auto_map")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _value(v) for k, v in config.items() if k not in _NOT_SIZES}


def _value(v: Any) -> Any:
    """A value of config.json, where infinity is written {"__float__": "Infinity"}."""
    if isinstance(v, Mapping):
        return float(v["__float__"]) if set(v) == {"__float__"} else _plain(v)
    return [_value(x) for x in v] if isinstance(v, list) else v


def _text_part(cls: Any, settings: Any) -> tuple[Any, Any]:
    """The class and the config of what reads and writes text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = settings.get_text_config(decoder=True)
    own = getattr(transformers, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)), None)
    if text is settings or own is None or not isinstance(text, own.config_class):
        return cls, settings
    text.tie_word_embeddings = getattr(settings, "tie_word_embeddings", text.tie_word_embeddings)
    return own, text


def meta_module(config: Mapping[str, Any], source: Source, dtype: torch.dtype) -> Any:
    """transformers' causal language model for a config, parameters on the meta device, buffers real.

    Of a model of several kinds of input it is the text model's own class, where transformers has one.
    """
    import transformers

    names = list(config.get("architectures") or ())
    if (arch := archs.known(config)) is not None and not any(n in arch.hf for n in names):
        names = [arch.hf[0]]
    classes = [getattr(transformers, n, None) for n in names]
    cls = next((c for c in classes if c is not None), None)
    if cls is None or not hasattr(cls, "config_class") or "PreTrainedModel" not in {b.__name__ for b in cls.__mro__}:
        what = f"architectures {names}" if names else "no architectures in config.json" if config else "no config.json"
        raise UnsupportedError(f"{source.path}: {what}: not a model class of transformers {transformers.__version__}")
    cls, settings = _text_part(cls, cls.config_class(**_plain(config)))
    if not hasattr(cls, "get_output_embeddings") or not hasattr(settings.get_text_config(), "vocab_size"):
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
    if module.get_output_embeddings() is None:
        raise UnsupportedError(f"{source.path}: {cls.__name__} is not a causal language model")
    return module.eval()


def find_decoder(module: Any) -> Any:
    """What is between tokens and the output layer."""
    decoder = module.get_decoder()
    if decoder is not module:
        return decoder
    inner = [m for m in module.children() if m is not module.get_output_embeddings()]
    return max(inner, key=lambda m: sum(p.numel() for p in m.parameters()))


def find_layers(module: Any, name: str) -> nn.ModuleList:
    """The decoder's blocks: of its lists of modules, the one that has most of the parameters.

    name: the model's. Raises UnsupportedError where there is none.
    """
    decoder = find_decoder(module)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList)]
    lists = lists or [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UnsupportedError(f"{name}: {type(module).__name__} has no list of blocks")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def find_tied(module: Any, stored: Collection[str]) -> dict[str, str]:
    """Name of a parameter -> the name under which the same one is read, where they are one; stored: what the file has."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [some for some in names.values() if len(some) > 1]
    return {
        n: first for some in shared for first in [next((n for n in some if n in stored), some[0])] for n in some if n != first
    }
