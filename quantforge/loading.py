"""Model files as transformers models that run on what the file holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, RecipeError, UnsupportedError
from .formats import Source, open_path
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def load(path: str | Path, *, device: str = "cpu", dtype: str | torch.dtype | None = None, activations: str = "float") -> Any:
    """A transformers model, ready to `generate`, whose matrices stay as the file has them, in any format that is read.

    Linear layers are `quantforge.nn.QuantLinear`, embeddings `QuantEmbedding`; both hold the stored bytes, so that the
    weights take the file's size in memory. dtype: of hidden states, norms and biases, "float32", "bfloat16" or
    "float16"; default float32 on the CPU, bfloat16 on CUDA. activations: "float", or "int8", which is faster on the CPU
    and less exact (see `QuantLinear`). `model.tokenizer` is the file's tokenizer, None if it has none. No code of a model
    repository runs.  Raises FormatError, UnsupportedError (not a causal language model of transformers), RecipeError
    (device, dtype), ShapeError.
    """
    import torch

    from .runtime import Model

    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise RecipeError(f"device {device}: " + ("no CUDA device here" if device.startswith("cuda") else "cpu or cuda"))
    if activations not in ("float", "int8"):
        raise RecipeError(f"activations {activations}: float or int8")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = kinds["float32" if device == "cpu" else "bfloat16"] if dtype is None else kinds.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise RecipeError(f"dtype {dtype}: {', '.join(kinds)}")
    path = Path(path)
    with open_path(path) as source:
        model = Model(source, path.resolve().name, device=device, dtype=kind, packed=True, activations=activations)
        model.load(model.module, "")
        module = model.module
        for m in module.modules():
            m.__dict__.pop("_replaced", None)  # what it stood for, on the meta device
        module.tokenizer = _tokenizer(path, source)
        _generation(module, path)
    return module


def answer(
    path: str | Path, prompt: str, max_tokens: int = 64, *, device: str = "cpu", activations: str = "int8"
) -> Iterator[str]:
    """What a model greedily says after a prompt, in pieces as they come.

    Raises what `load` raises, and RecipeError for a model without a tokenizer.
    """
    import torch

    model = load(path, device=device, activations=activations)
    if model.tokenizer is None:
        raise RecipeError(f"{path}: no tokenizer, so that a text cannot be read; see `quantforge -v generate`")
    with open_path(Path(path)) as source:
        tokenizer = Tokenizer(path, source.config, gguf_metadata=source.format == "gguf")
    ids, _ = tokenizer.encode(prompt)
    ids = [tokenizer.bos, *ids] if tokenizer.adds_bos and tokenizer.bos is not None else ids
    if not ids:
        raise RecipeError("--prompt: an empty text, and this model has no token for the beginning of one")
    cache: Any = None
    step, made, said = torch.tensor([ids], device=device), list[int](), ""
    with torch.inference_mode():
        while len(made) < max_tokens:
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            if int(step) in tokenizer.eos:
                break
            made.append(int(step))
            text = tokenizer.decode(made)
            if not text.endswith("\ufffd"):  # part of a character: the rest is in the next token
                yield text[len(said) :]
                said = text


def _tokenizer(path: Path, source: Source) -> Any:
    try:
        return Tokenizer(path, source.config, gguf_metadata=source.format == "gguf").transformers()
    except (FormatError, UnsupportedError) as e:
        logger.info("no tokenizer: %s", e)
        return None


def _generation(module: Any, path: Path) -> None:
    """generation_config.json, where the directory has one."""
    from transformers import GenerationConfig

    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    if path.suffix != ".gguf" and file.is_file():
        try:
            module.generation_config = GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as e:
            raise FormatError(file, f"not a generation config: {e}") from None
