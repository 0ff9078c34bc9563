"""A model file's tensors under the names that a checkpoint has for the parameters of transformers' module."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import archs
from ..archs import from_gguf
from ..arrays import F32
from ..codecs import Codec, Encoded
from ..errors import FormatError, NonFiniteError, QuantForgeError
from .skeleton import FUSED, checkpoint_shapes, find_layers, find_tied, meta_module, module_name

if TYPE_CHECKING:
    from ..formats import Source

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of one parameter lie: a tensor of the source, or one expert of it, and how to turn it back."""

    stored: str
    inverse: archs.Transform | None = None
    expert: int | None = None


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

    def _places(self) -> dict[str, Place]:
        """Checkpoint name -> where it is stored, for every tensor that the source has."""
        source = self.source
        if source.format != "gguf":
            expected = {k for k, _ in checkpoint_shapes(self.module)}
            return {module_name(k, expected, self.module.base_model_prefix): Place(k) for k in source.weights}
        assert self.arch is not None
        shapes = dict(checkpoint_shapes(self.module))
        found = {}
        for w in self.arch.weights(self.config, shapes):
            if w.name not in source.weights:
                if w.constant is None:
                    raise FormatError(source.path, f"tensor {w.name} is missing")
                continue
            if tuple(source.weights[w.name].shape) != tuple(w.shape):
                raise FormatError(
                    source.path, f"{w.name}: shape {list(source.weights[w.name].shape)}, the metadata make it {list(w.shape)}"
                )
            for i, name in enumerate(w.sources):
                found[name] = Place(w.name, w.transform.inverse, i if len(w.sources) > 1 or len(w.shape) > 2 else None)
        return found

    def _place(self, name: str) -> Place:
        try:
            return self.places[name]
        except KeyError:
            raise FormatError(self.source.path, f"tensor {name} is missing") from None

    def stored(self, name: str) -> tuple[Codec, tuple[int, ...]]:
        """Codec and shape of a checkpoint tensor, without reading it."""
        place = self._place(name)
        info = self.source.weights[place.stored]
        return info.codec, info.shape if place.expert is None else info.shape[1:]

    def decode(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> F32:
        """The numbers of a checkpoint tensor as this file has them: f32, in the checkpoint's layout.

        rows: only these; other rows are not decoded, where the codec can do without them.
        Raises NonFiniteError naming the tensor if there is NaN or infinity among them.
        """
        place = self._place(name)
        encoded = self.source.read(place.stored)
        order = None if place.inverse is None else place.inverse.rows
        if place.expert is not None and encoded.codec.row_local and len(encoded.shape) == 3:
            n = encoded.shape[1]
            encoded = encoded.flat().rows(slice(place.expert * n, (place.expert + 1) * n))
            w = encoded.decode(threads=os.cpu_count() or 1)
        elif rows is not None and order is None and place.expert is None and encoded.codec.sliceable and len(encoded.shape) == 2:
            w = encoded.rows(rows).decode(threads=os.cpu_count() or 1)
            return self._checked(w, place, rows)
        else:
            w = encoded.decode(threads=os.cpu_count() or 1)
            w = w if place.expert is None else w[place.expert]
        if order is not None:
            w = w.reshape(-1, *w.shape[max(1, w.ndim - 1) :])[order].reshape(w.shape)
        return self._checked(w if rows is None else w[rows], place, rows)

    def _checked(self, w: F32, place: Place, rows: slice | NDArray[np.int64] | None) -> F32:
        if place.inverse is not None and place.inverse.value is not None:
            w = place.inverse.value(w)
        if w.size and not (math.isfinite(w.min()) and math.isfinite(w.max())):
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(w))[0])
            value = w[index]
            if rows is not None:
                index = ((rows.start or 0) + index[0] if isinstance(rows, slice) else int(rows[index[0]]), *index[1:])
            raise NonFiniteError(f"{self.name}: {place.stored}: weight {list(index)} is {value}; the file is damaged", index)
        self.source.release(place.stored)
        return w

    def encoded(self, name: str) -> Encoded | None:
        """A matrix of the checkpoint as it is stored, its rows in the checkpoint's order; None where only its numbers
        can be had, and where a plain parameter of this model's dtype would be the same bytes.
        """
        place = self.places.get(name)
        if place is None or (place.inverse is not None and place.inverse.value is not None):
            return None
        e = self.source.read(place.stored)
        if place.expert is not None and len(e.shape) == 3 and e.codec.row_local:
            n = e.shape[1]
            e = e.flat().rows(slice(place.expert * n, (place.expert + 1) * n))
        if len(e.shape) != 2 or FLOATS.get(e.codec.name) == self.dtype:
            return None
        if place.inverse is not None and place.inverse.rows is not None:
            if not e.codec.sliceable:
                return None
            e = e.rows(place.inverse.rows)
        return e

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
        return {self.places[n].stored for n in names if n in self.places}

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
