"""A model file's tensors under the names that a checkpoint has for the parameters of transformers' module."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from .. import archs, codecs
from ..archs import from_gguf
from ..archs.weight import Shape, Weight, composed, rows_of
from ..arrays import F32
from ..codecs import Codec, Encoded
from ..errors import FormatError, NonFiniteError, QuantForgeError, UnsupportedError
from ..formats.rows import check_numbers, codec_of, decoded, read_encoded, read_rows
from .mapping import Conversion, Origin, origins, saved_shapes
from .skeleton import find_layers, find_tied, meta_module

if TYPE_CHECKING:
    from ..formats import Source

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StoredModel:
    """A model file and transformers' empty module for it: every parameter can be decoded by its name.

    Where a name is asked for, it may also be a tensor's of the checkpoint: of the one that is read, or that a GGUF would be.
    """

    def __init__(self, source: Source, name: str, dtype: torch.dtype) -> None:
        """dtype: of the module's parameters; what is decoded here is f32."""
        self.source, self.name, self.dtype = source, name, dtype
        self.arch = _arch(source)
        self.config = _config(source)
        self.module = meta_module(self.config, source, dtype)
        self.layers = find_layers(self.module, name)
        self.prefix = next(k for k, m in self.module.named_modules() if m is self.layers)
        shapes = {k: s.shape for k, s in source.weights.items()}
        self.places: dict[str, Weight] = {k: Weight.of(k, s) for k, s in shapes.items()}
        """Checkpoint name -> what it is made of in the file, for every tensor that the file has."""
        if source.gguf_names:
            assert self.arch is not None
            self.places = self.arch.checkpoint(self.config, shapes, saved_shapes(self.module))
        self.origins: dict[str, Origin] = origins(self.module, {k: w.shape for k, w in self.places.items()})
        """Parameter of the module -> what transformers makes it of: checkpoint tensors."""
        check_numbers(source, (o for o in self.origins.values() if isinstance(o, Weight) and not source.gguf_names))
        self._made = {k: self._through(o, shapes) for k, o in self.origins.items()}
        self.tied = find_tied(self.module, self.origins)
        """Parameter -> the one that it is, where two are one: the head's weight -> the embedding's."""

    def _through(self, origin: Origin, shapes: Mapping[str, Shape]) -> Weight | None:
        """A parameter as made of what the file stores; None where it is computed from decoded tensors."""
        if isinstance(origin, Conversion):
            return None
        return origin if not self.source.gguf_names else composed(origin, self.places, shapes)

    def weight(self, name: str) -> Weight | None:
        """What a parameter of the module, or a tensor of the checkpoint, is made of in the file.

        None where it is computed. Raises FormatError where the file has it not.
        """
        name = self.tied.get(name, name)
        if name in self._made:
            return self._made[name]
        if name in self.places:
            return self.places[name]
        raise FormatError(self.source.path, f"tensor {name} is missing")

    def sources(self, name: str) -> tuple[str, ...]:
        """Names in the file of what a parameter is made of; empty where it has none of it."""
        name = self.tied.get(name, name)
        if name not in self.origins:
            return self.places[name].sources if name in self.places else ()
        return tuple(dict.fromkeys(s for n in self.origins[name].sources for s in self.places[n].sources))

    def stored(self, name: str) -> tuple[Codec, tuple[int, ...]]:
        """Codec (the first one, where it is made of several tensors) and shape of a parameter, without reading it."""
        weight = self.weight(name)
        if weight is not None:
            return codec_of(self.source, weight), weight.shape
        return self.source.weights[self.sources(name)[0]].codec, self.origins[self.tied.get(name, name)].shape

    def decode(self, name: str, rows: slice | NDArray[np.int64] | None = None) -> F32:
        """The numbers of a parameter, or of a checkpoint tensor, as this file has them: f32, in the checkpoint's layout.

        rows: only these; other rows are not decoded, where the codec can do without them.
        Raises NonFiniteError naming the tensor if there is NaN or infinity among them.
        """
        weight = self.weight(name)
        shape = self.stored(name)[1]
        if isinstance(rows, slice):
            rows = slice(*rows.indices(shape[0])[:2])
        if weight is None:
            w = self._computed(self.tied.get(name, name))
            w = w if rows is None else w[rows]
        elif rows is None or len(shape) != 2:
            w = decoded(read_rows(self.source, weight), os.cpu_count() or 1).reshape(shape)
            w = w if rows is None else w[rows]
        elif isinstance(rows, slice):
            w = decoded(read_rows(self.source, weight, rows.start, rows.stop), os.cpu_count() or 1)
        else:
            some = read_rows(self.source, weight)
            w = decoded(some.rows(rows) if isinstance(some, Encoded) else some[rows], os.cpu_count() or 1)
        if w.size and not (math.isfinite(w.min()) and math.isfinite(w.max())):
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(w))[0])
            value = w[index]
            if rows is not None:
                index = (rows.start + index[0] if isinstance(rows, slice) else int(rows[index[0]]), *index[1:])
            raise NonFiniteError(
                f"{self.name}: {self.sources(name)[0]}: weight {list(index)} is {value}; the file is damaged", index
            )
        self.release(name)
        return w

    def _computed(self, name: str) -> F32:
        """A parameter by transformers' own operations, or by rows of decoded checkpoint tensors."""
        origin = self.origins[name]
        if isinstance(origin, Conversion):
            return origin.apply(self._stored_numbers)
        plain = codecs.get("F32")
        tensors = {s: self._stored_numbers(s) for s in origin.sources}
        held = Held({s: Encoded(plain, w.shape, plain.encode(w)) for s, w in tensors.items()})
        return decoded(read_rows(cast("Source", held), origin)).reshape(origin.shape)

    def _stored_numbers(self, tensor: str) -> F32:
        """A tensor of the checkpoint, whose name may be a parameter's that is made of it: f32."""
        place = self.places[tensor]
        return decoded(read_rows(self.source, place), os.cpu_count() or 1).reshape(place.shape)

    def release(self, name: str) -> None:
        """Tell the system that this tensor's pages are not needed any more."""
        for stored in self.sources(name):
            self.source.release(stored)

    def encoded(self, name: str) -> Encoded | None:
        """A matrix as it is stored, its rows in the checkpoint's order; None where only its numbers
        can be had, and where a plain parameter of this model's dtype would be the same bytes.
        """
        if not self.sources(name) or (weight := self.weight(name)) is None:
            return None
        e = read_encoded(self.source, weight)
        return None if e is None or len(e.shape) != 2 or FLOATS.get(e.codec.name) == self.dtype else e

    def parameter(self, name: str) -> F32:
        """A parameter of the module by its name there. Raises FormatError where the file has it not."""
        return self.decode(self.tied.get(name, name))

    def roles(self) -> dict[str, str]:
        """Parameter -> role (GGUF stem), where the architecture is known and all of it is of one role."""
        by_tensor = {n: {w.role} for n, w in self.places.items()}
        if not self.source.gguf_names:
            by_tensor = {}
            for w in self.gguf.values():
                for s in w.sources:
                    by_tensor.setdefault(s, set()).add(w.role)
        candidates = {k: set[str]().union(*(by_tensor.get(s, ()) for s in o.sources)) for k, o in self.origins.items()}
        return {k: next(iter(roles)) for k, roles in candidates.items() if len(roles) == 1}

    @cached_property
    def gguf(self) -> dict[str, Weight]:
        """Tensors of a GGUF file -> which checkpoint tensors they are made of; empty where the architecture, or something in
        it that transformers runs, is not known."""
        try:
            shapes = {n: w.shape for n, w in self.places.items()}
            weights = self.arch.weights(self.config, shapes, self.source.optional, graph=False) if self.arch else []
        except QuantForgeError:
            weights = []
        return {w.name: w for w in weights if w.sources}

    @cached_property
    def crosswise(self) -> frozenset[str]:
        """Checkpoint tensors whose matrices are stored as [in, out]."""
        whole = (p for w in self.gguf.values() for p in w.pieces if p.groups and (w.experts or p.groups == 1))
        return frozenset(p.source for p in whole)

    def height(self, matrix: str) -> int:
        """Number of outputs of a matrix, as `observing` names it."""
        stem, _ = expert_of(matrix)
        return self.places[stem].shape[-1 if stem in self.crosswise else -2]

    def names(self, layer: int) -> list[str]:
        """Checkpoint tensors that the parameters of a block are made of."""
        inside = f"{self.prefix}.{layer}."
        return list(dict.fromkeys(s for k, o in self.origins.items() if k.startswith(inside) for s in o.sources))

    def observed(self, layer: int) -> dict[str, list[list[str]]]:
        """Parameter of a block, without the block's name -> checkpoint matrices that share its input: one list for each
        of the experts that are stacked in it, one in all for another."""
        inside = f"{self.prefix}.{layer}."
        observed = {}
        for name, origin in self.origins.items():
            if not name.startswith(inside) or len(origin.shape) not in (2, 3):
                continue
            n = origin.shape[0] if len(origin.shape) == 3 else 1
            if n == 1:
                lists = [list(origin.sources)]
            elif len(origin.sources) < n:
                lists = [[f"{s}[{e}]" for s in origin.sources] for e in range(n)]
            else:  # gates one after another, then ups
                lists = [[s for s in origin.sources if self._expert(s) == e] for e in range(n)]
            observed[name.removeprefix(inside)] = lists
        return observed

    @staticmethod
    def _expert(name: str) -> int:
        """The number of the expert in a name: the last number there."""
        return int(next(part for part in reversed(name.split(".")) if part.isdigit()))

    @cached_property
    def _parameter_of(self) -> dict[str, str]:
        """Checkpoint tensor -> the first parameter that has rows of it."""
        parameters: dict[str, str] = {}
        for name, origin in self.origins.items():
            for s in origin.sources:
                parameters.setdefault(s, name)
        return parameters

    def matrix(self, layer: int, name: str) -> torch.Tensor:
        """A tensor of a loaded block by its checkpoint name, or one expert's: a view of the module's parameter or buffer.

        name: as `observing` gives it. Raises UnsupportedError where it is not one run of a parameter's rows.
        """
        stem, e = expert_of(name)
        parameter = self._parameter_of.get(stem, stem)
        owner, _, leaf = parameter.removeprefix(f"{self.prefix}.{layer}.").rpartition(".")
        w: torch.Tensor = getattr(self.layers[layer].get_submodule(owner), leaf).data
        origin = self.origins.get(parameter)
        if isinstance(origin, Weight):
            if origin.plain and origin.shape == tuple(w.shape):
                return w if e is None else w[e]
            rows = origin.span(stem)
            if rows is not None and e is None:
                flat = w.reshape(-1, w.shape[-1]) if w.ndim > 1 else w
                if not origin.groups:
                    return flat[rows]
                high = rows_of(origin.shape) // origin.groups
                wide = sum(p.count for p in origin.pieces) // origin.groups
                if rows.start // wide == (rows.stop - 1) // wide:
                    group = flat[rows.start // wide * high : (rows.start // wide + 1) * high]
                    return group[:, rows.start % wide : rows.start % wide + rows.stop - rows.start].T
        raise UnsupportedError(f"{self.name}: {name} is no run of rows of {parameter}; it cannot be changed by itself")

    def outer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Parameters outside the blocks that the file has, and their shapes: embeddings, final norm, head."""
        inside = f"{self.prefix}."
        parameters = {k: tuple(p.shape) for k, p in self.module.named_parameters() if not k.startswith(inside)}
        return {k: s for k, s in parameters.items() if self.tied.get(k, k) in self.origins and k not in self.tied}

    def outer_names(self) -> set[str]:
        """Names in the file of the embeddings and the head."""
        ends = (self.module.get_input_embeddings(), self.module.get_output_embeddings())
        names = {f"{k}.weight" for k, m in self.module.named_modules() if any(m is e for e in ends)}
        return {s for n in names for s in self.sources(n)}

    def shape(self) -> dict[str, int]:
        """Sizes: layers, hidden, vocabulary, context, and the bytes that a token takes in an f16 KV cache."""
        c = self.module.config.get_text_config(decoder=True)
        attending = [i for i, layer in enumerate(self.layers) if any(_keeps_keys(m) for m in layer.modules())]
        return {
            "layers": len(self.layers),
            "hidden": int(c.hidden_size),
            "vocabulary": int(c.vocab_size),
            "context": int(getattr(c, "max_position_embeddings", None) or 0),
            "kv_bytes_per_token": sum(2 * _kv_width(c, i) for i in attending),
        }


def _keeps_keys(module: torch.nn.Module) -> bool:
    """Is it attention over all tokens, rather than a recurrent layer that is called so?"""
    name = type(module).__name__
    return "Attention" in name and not any(k in name for k in ("Linear", "Delta", "Lightning"))


def _kv_width(c: Any, layer: int) -> int:
    """Numbers that a token adds to the keys and values of a layer."""
    own = getattr(c, "per_layer_config", None)  # of layers that differ
    c = c if own is None else own[layer]
    heads = c.num_attention_heads
    kv = getattr(c, "num_key_value_heads", None) or heads
    heads, kv = (x[layer] if isinstance(x, list | tuple) else x for x in (heads, kv))
    width = getattr(c, "head_dim", None) or c.hidden_size // heads
    keys = getattr(c, "qk_head_dim", None) or width
    return int(kv) * (int(keys) + int(getattr(c, "v_head_dim", None) or width))


def expert_of(name: str) -> tuple[str, int | None]:
    """A matrix's name, as `observing` gives it, apart: the tensor, and which of the experts that are stacked in it."""
    stem, bracket, number = name.removesuffix("]").rpartition("[")
    return (stem, int(number)) if bracket else (name, None)


class Held:
    """Tensors in memory where a source is read."""

    def __init__(self, tensors: Mapping[str, Encoded]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Encoded:
        """One of them."""
        return self._tensors[name]


def _arch(source: Source) -> archs.Arch | None:
    """The architecture of a model file; None for a checkpoint of one that only transformers knows."""
    if not source.gguf_names:
        return archs.known(source.config)
    return from_gguf.find_arch(source.config, source.path, {name: stored.shape for name, stored in source.weights.items()})


def _config(source: Source) -> dict[str, Any]:
    """The model's config.json; Llama 3's rope factors are applied as the file has them."""
    config = source.checkpoint_config()
    if source.gguf_names and (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        config["rope_scaling"] = None
    return config
