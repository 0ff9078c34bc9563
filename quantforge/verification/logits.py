"""What two models say to a few tokens, and what the first would say, rounded plainly to the types of the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import codecs
from ..codecs import Codec, Encoded
from ..errors import ShapeError
from ..formats import Source, Stored

TOKENS = 64
FACTOR, FLOOR = 4.0, 1e-3
"""How far a model may be from its original, in KL divergence: so many times as far as plain rounding, or so many nats."""


@dataclass(frozen=True, slots=True)
class Distance:
    """KL divergence from the original, nats per token, and where the likeliest token is the same."""

    kld: float
    same_top: float


class Rounded(Source):
    """A model as it would be if each tensor was rounded plainly to the type that it has in another file."""

    def __init__(self, source: Source, types: Mapping[str, Codec]) -> None:
        self.source, self.types = source, types
        self.format, self.path, self.config, self.gguf_names = source.format, source.path, source.config, source.gguf_names
        f32 = codecs.get("F32")
        self.weights = {k: Stored(f32, s.shape) if k in types else s for k, s in source.weights.items()}
        self.optional = source.optional

    def checkpoint_config(self) -> dict[str, object]:
        """The model's own."""
        return self.source.checkpoint_config()

    @property
    def directory(self) -> Path:
        """The model's own."""
        return self.source.directory

    @property
    def total_bytes(self) -> int:
        """The model's own."""
        return self.source.total_bytes

    def read(self, name: str) -> Encoded:
        """The tensor, rounded to its type and back where it can be."""
        e, codec = self.source.read(name), self.types.get(name)
        if codec is None:
            return e
        w = e.decode()
        try:
            rounded = codec.decode(codec.encode(w), w.shape)
        except ShapeError:  # rows of another length here
            rounded = w
        return Encoded(codecs.get("F32"), w.shape, {"data": rounded.reshape(w.shape)})


def distances(out: Source, model: Source, types: Mapping[str, Codec], ids: list[int]) -> tuple[Distance, Distance | None]:
    """How far `out` is from `model` on some tokens, and how far plain rounding would be (None where nothing is rounded).

    types: of tensors of `model`, what they are in `out`. Raises UnsupportedError for models that have no such logits,
    NonFiniteError.
    """
    import torch

    from ..runtime import Model, advance, finish, rows_at_once

    sources: list[Source] = [model, out]
    lossy = {k: c for k, c in types.items() if c is not model.weights[k].codec and c.name != "F32"}
    if lossy:
        sources.append(Rounded(model, lossy))
    models = [Model(s, n) for s, n in zip(sources, ("the model", "the output", "the model, rounded"), strict=False)]
    tokens = torch.tensor([ids])
    states = finish(models, advance(models, tokens), torch.ones_like(tokens, dtype=torch.bool))
    logits = []
    with torch.inference_mode():
        for m, s in zip(models, states, strict=True):
            with m.head() as head:
                step = head.vocabulary if head.whole else rows_at_once(head.width)
                some = []
                for a in range(0, head.vocabulary, step):
                    head.take(slice(a, min(a + step, head.vocabulary)))
                    some.append(head(s).float())
                logits.append(torch.cat(some, -1).log_softmax(-1))
    if any(p.shape != logits[0].shape for p in logits):
        raise ShapeError(f"vocabularies of {' and '.join(str(p.shape[-1]) for p in logits[:2])} tokens")
    reference = logits[0]

    def distance(p: torch.Tensor) -> Distance:
        kld = (reference.exp() * (reference - p)).sum(-1).mean()
        return Distance(float(kld), float((p.argmax(-1) == reference.argmax(-1)).float().mean()))

    return distance(logits[1]), distance(logits[2]) if lossy else None
