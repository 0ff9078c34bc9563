"""Model files as transformers models that run on what the file holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import available
from ..errors import FormatError, RecipeError, UnsupportedError
from ..formats import Adapters, Source, merged, open_path
from ..tokenizer import Tokenizer
from ..tokenizer.files import read_json
from ..tokenizer.special import ends

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    activations: str = "float",
    lora: Adapters = (),
) -> Any:
    """A transformers model, ready to `generate`, whose matrices stay as the file has them, in any format that is read.

    Linear layers are `quantforge.nn.QuantLinear`, embeddings `QuantEmbedding`; both hold the stored bytes, so that the
    weights take the file's size in memory. dtype: of hidden states, norms and biases, "float32", "bfloat16" or
    "float16"; default float32 on the CPU, bfloat16 on CUDA. activations: "float", or "int8", which is faster on the CPU
    and less exact (see `QuantLinear`). lora: adapters to merge, as in `convert`; the tensors that they change are decoded.
    `model.tokenizer` is the file's tokenizer, None if it has none. No code of a model repository runs.
    Raises FormatError, UnsupportedError (not a causal language model of transformers), RecipeError (device, dtype),
    ShapeError.
    """
    import torch

    from ..nn.linear import Packed
    from . import Model

    device = str(available(device))
    if activations not in ("float", "int8"):
        raise RecipeError(f"activations {activations}: float or int8")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    kind = kinds["float32" if device == "cpu" else "bfloat16"] if dtype is None else kinds.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise RecipeError(f"dtype {dtype}: {', '.join(kinds)}")
    path = Path(path)
    with merged(open_path(path), lora) as source:
        model = Model(source, path.resolve().name, device=device, dtype=kind, packed=True, activations=activations)
        model.load(model.module, "")
        module = model.module
        for m in module.modules():
            m.__dict__.pop("_replaced", None)  # what it stood for, on the meta device
        module.tokenizer = _tokenizer(path, source)
        _generation(module, source)
    if any(isinstance(m, Packed) for m in module.modules()):
        module.save_pretrained = partial(_no_file, str(path))
    return module


def _no_file(path: str, *_: Any, **__: Any) -> None:
    raise UnsupportedError(
        f"{path}: a loaded model cannot be saved by transformers: its weights are the file's own bytes. Copy the file, or make "
        "another with `quantforge convert`; adapters (PEFT) and state_dict() can be saved"
    )


def answer(
    path: str | Path,
    prompt: str,
    max_tokens: int = 64,
    *,
    device: str = "cpu",
    activations: str = "int8",
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int | None = None,
    lora: Adapters = (),
) -> Iterator[str]:
    """What a model says after a prompt, in pieces as they come.

    temperature: 0 for the likeliest token at every step; else tokens are drawn, from the top_k likeliest (0: from all) and
    the likeliest that together have a probability of top_p. The prompt is taken as it is: no chat template is applied.
    Raises what `load` raises, and RecipeError for a model without a tokenizer.
    """
    import torch

    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise RecipeError(f"temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}: from 0 on; from 0 on; above 0, up to 1")
    model = load(path, device=device, activations=activations, lora=lora)
    if model.tokenizer is None:
        raise RecipeError(f"{path}: no tokenizer, so that a text cannot be read; see `quantforge -v generate`")
    with merged(open_path(Path(path)), lora) as source:
        tokenizer = source.tokenizer()
    ids, _ = tokenizer.encode(prompt)
    ids = [tokenizer.bos, *ids] if tokenizer.adds_bos and tokenizer.bos is not None else ids
    if not ids:
        raise RecipeError("--prompt: an empty text, and this model has no token for the beginning of one")
    own = model.generation_config.eos_token_id
    stops = {*tokenizer.eos, *(own if isinstance(own, list) else [] if own is None else [own])}
    device = str(available(device))
    draw = torch.Generator(device)
    draw.manual_seed(seed) if seed is not None else draw.seed()

    def tokens() -> Iterator[int]:
        cache: Any = None
        step = torch.tensor([ids], device=device)
        for _ in range(max_tokens):
            with torch.inference_mode():
                out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, logits = out.past_key_values, out.logits[:, -1]
                step = (
                    _drawn(logits.float() / temperature, top_k, top_p, draw) if temperature else logits.argmax(-1, keepdim=True)
                )
            if int(step) in stops:
                return
            yield int(step)

    return _pieces(tokenizer, tokens())


def _drawn(logits: torch.Tensor, top_k: int, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """A token by its probability: f32[1, vocabulary] -> i64[1, 1]."""
    chances, which = logits.softmax(-1).sort(-1, descending=True)
    before = chances.cumsum(-1) - chances
    chances[before >= top_p] = 0
    chances[:, top_k or chances.shape[-1] :] = 0
    return which.gather(-1, chances.multinomial(1, generator=generator))


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens, as soon as it is certain: a character may be in several."""
    made, start, shown = list[int](), 0, 0  # decoded from a token before those that are new: it says if a space is due
    before = text = ""
    for token in tokens:
        made.append(token)
        before, text = tokenizer.decode(made[start:shown]), tokenizer.decode(made[start:])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            yield text[len(before) :]
            start, shown = shown, len(made)
            before = text
    if len(text) > len(before):
        yield text[len(before) :]


def _tokenizer(path: Path, source: Source) -> Any:
    try:
        return source.tokenizer().transformers()
    except (FormatError, UnsupportedError) as e:
        logger.info("no tokenizer: %s", e)
        return None


def _generation(module: Any, source: Source) -> None:
    """generation_config.json, where a checkpoint has one; of a GGUF file the tokens that end a text."""
    from transformers import GenerationConfig

    if source.gguf_names:
        stops = ends(source.config)
        module.generation_config.eos_token_id = stops if len(stops) > 1 else next(iter(stops), None)
        return
    file = source.directory / "generation_config.json"
    if settings := read_json(file):
        try:
            module.generation_config = GenerationConfig.from_dict(settings)
        except (ValueError, TypeError, AttributeError) as e:
            raise FormatError(file, f"not a generation config: {e}") from None
