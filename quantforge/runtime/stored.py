"""A model file's tensors under the names that a checkpoint has for the parameters of transformers' module."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import archs
from ..archs import from_gguf
from ..archs.weight import Weight
from ..arrays import F32
from ..codecs import Codec, Encoded
from ..errors import FormatError, NonFiniteError, QuantForgeError
from ..formats.rows import codec_of, decoded, read_encoded, read_rows
from .skeleton import FUSED, checkpoint_shapes, find_layers, find_tied, meta_module, module_name

if TYPE_CHECKING:
    from ..formats import Source

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredModel:
    """A model file and transformers' empty module for it: every parameter can be decoded by its name."""

    def __init__(self, source: Source, name: str, dtype: torch.dtype) -> None:
        """dtype: of the module's parameters; what is decoded here is f32."""
        self.source, self.name, self.dtype = source, name, dtype
        self.arch = _arch(source)
        self.config = gguf_config(source) if source.format == "gguf" else dict(source.config)
        self.module = meta_module(self.config, source, dtype)
        self.layers = find_layers(self.module, name)
        self.prefix = next(k for k, m in self.module.named_modules() if m is self.layers)
        self.tied = find_tied(self.module)
        """Head's weight -> embedding's weight, where they are one."""
        self.places = self._places()

    def _places(self) -> dict[str, Weight]:
        """Checkpoint name -> what it is made of in the source, for every tensor that the source has."""
        source, shapes = self.source, dict(checkpoint_shapes(self.module))
        if source.format != "gguf":
            base = self.module.base_model_prefix
            names = {module_name(k, set(shapes), base): k for k in source.weights}
            return {name: Weight.of(name, source.weights[k].shape, k) for name, k in names.items()}
        assert self.arch is not None
        return self.arch.checkpoint(self.config, {k: s.shape for k, s in source.weights.items()}, shapes)

    def _place(self, name: str) -> Weight:
        try:
            return self.places[name]
        except KeyError:
            raise FormatError(self.source.path, f"tensor {name} is missing") from None

    def stored(self, name: str) -> tuple[Codec, tuple[int, ...]]:
        """Codec and shape of a checkpoint tensor, without reading it."""
        place = self._place(name)
        return codec_of(self.source, place), place.shape

    def decode(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> F32:
        """The numbers of a checkpoint tensor as this file has them: f32, in the checkpoint's layout.

        rows: only these; other rows are not decoded, where the codec can do without them.
        Raises NonFiniteError naming the tensor if there is NaN or infinity among them.
        """
        place, threads = self._place(name), os.cpu_count() or 1
        if isinstance(rows, slice):
            rows = slice(*rows.indices(place.shape[0])[:2])
        if rows is None or len(place.shape) != 2:
            w = decoded(read_rows(self.source, place), threads).reshape(place.shape)
            w = w if rows is None else w[rows]
        elif isinstance(rows, slice):
            w = decoded(read_rows(self.source, place, rows.start, rows.stop), threads)
        else:
            some = read_rows(self.source, place)
            w = decoded(some.rows(rows) if isinstance(some, Encoded) else some[rows], threads)
        if w.size and not (math.isfinite(w.min()) and math.isfinite(w.max())):
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(w))[0])
            value = w[index]
            if rows is not None:
                index = (rows.start + index[0] if isinstance(rows, slice) else int(rows[index[0]]), *index[1:])
            raise NonFiniteError(f"{self.name}: {place.sources[0]}: weight {list(index)} is {value}; the file is damaged", index)
        self.release(name)
        return w

    def release(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        for stored in self._place(name).sources:
            self.source.release(stored)

    def encoded(self, name: str) -> Encoded | None:
        """A matrix of the checkpoint as it is stored, its rows in the checkpoint's order; None where only its numbers
        can be had, and where a plain parameter of this model's dtype would be the same bytes.
        """
        e = read_encoded(self.source, self.places[name]) if name in self.places else None
        return None if e is None or len(e.shape) != 2 or FLOATS.get(e.codec.name) == self.dtype else e

    def parts(self, name: str) -> list[str]:
        """The checkpoint tensors that a parameter of the module is made of; empty if it has none of its own."""
        if name in self.places:
            return [name]
        for fused, parts in FUSED.items():
            if name.endswith(f".experts{fused}"):
                count = int(self.module.get_parameter(name).shape[0])
                return [f"{name.removesuffix(fused)}.{e}.{p}.weight" for e in range(count) for p in parts]
        return []

    def parameter(self, name: str) -> F32:
        """A parameter of the module by its name there: a checkpoint tensor, or experts' tensors stacked."""
        name = self.tied.get(name, name)
        if name in self.places:
            return self.decode(name)
        if pieces := self.parts(name):
            shape = tuple(self.module.get_parameter(name).shape)
            return np.concatenate([self.decode(p) for p in pieces]).reshape(shape)
        raise FormatError(self.source.path, f"tensor {name} is missing")

    def roles(self) -> dict[str, str]:
        """Checkpoint name -> role (GGUF stem), where the architecture is known."""
        try:
            weights = self.arch.weights(self.config, dict(checkpoint_shapes(self.module))) if self.arch else []
        except QuantForgeError:  # something that transformers runs and llama.cpp does not
            weights = []
        return {source: w.role for w in weights for source in w.sources}

    def outer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors outside the blocks and their shapes: embeddings, final norm, head."""
        inside = f"{self.prefix}."
        return {k: s for k, s in checkpoint_shapes(self.module) if not k.startswith(inside) and k in self.places}

    def outer_names(self) -> set[str]:
        """Names in the file of the embeddings and the head."""
        ends = (self.module.get_input_embeddings(), self.module.get_output_embeddings())
        names = {f"{k}.weight" for k, m in self.module.named_modules() if any(m is e for e in ends)}
        return {s for n in names if n in self.places for s in self.places[n].sources}

    def shape(self) -> dict[str, int]:
        """Sizes: layers, hidden, vocabulary, context, and the bytes that a token takes in an f16 KV cache."""
        c = self.module.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return {
            "layers": len(self.layers),
            "hidden": int(c.hidden_size),
            "vocabulary": int(c.vocab_size),
            "context": int(getattr(c, "max_position_embeddings", None) or 0),
            "kv_bytes_per_token": 2 * 2 * len(self.layers) * int(heads) * int(width),
        }


def _arch(source: Source) -> archs.Arch | None:
    """The architecture of a model file; None for a checkpoint of one that only transformers knows."""
    known = archs.supported()
    if source.format != "gguf":
        return next((known[a] for a in source.config.get("architectures") or () if a in known), None)
    return from_gguf.find_arch(source.config, source.path)


def gguf_config(source: Source) -> dict[str, Any]:
    """config.json rebuilt from GGUF metadata; Llama 3's rope factors are in a tensor of their own."""
    return from_gguf.config(source.config, {k: s.shape for k, s in source.weights.items()}, source.path)
