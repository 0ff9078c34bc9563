"""Forward passes of stored models through transformers' own modules, one decoder block at a time.

A `Model` is transformers' module with its weights on the meta device: blocks, embeddings and head
are decoded when they run and dropped afterwards. `advance` takes several models through their
blocks side by side, so that peak memory is about one block of each plus the hidden states.
No code of a model repository runs: classes come from transformers, by config.json's model_type.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import archs, checkpoint
from .arrays import F32
from .codecs import Codec, Encoded
from .errors import FormatError, NonFiniteError, QuantForgeError, RecipeError, ShapeError, UnsupportedError
from .nn import QuantEmbedding, QuantExperts, QuantLinear

if TYPE_CHECKING:
    from .formats import Source

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
"""Tokens that go through a block together: enough for full speed, few enough for small activations."""


SLICE_BYTES = 32 << 20
"""Embeddings and heads are decoded in slices of rows; what the slices of all models take together."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of one parameter lie: a tensor of the source, or one expert of it, and how to turn it back."""

    stored: str
    inverse: archs.Transform | None = None
    expert: int | None = None


class Model:
    """A model file as a transformers model whose weights are decoded on demand, in f32 or bf16.

    packed: linear layers, embeddings and experts are not decoded, but hold their tensors as they are stored and compute
    from those (quantforge.nn); activations: as in `QuantLinear`.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        activations: str = "float",
    ) -> None:
        if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
            raise RecipeError(f"--device {device}: " + ("no CUDA device here" if device.startswith("cuda") else "cpu or cuda"))
        self.source, self.name, self.dtype = source, name, dtype
        self.packed, self.activations = packed, activations
        self.device = torch.device(device)
        self.arch = _arch(source)
        self.config = gguf_config(source) if source.format == "gguf" else dict(source.config)
        self.module = _meta_module(self.config, source, dtype)
        self.layers = _layers(self.module, name)
        self.prefix = next(k for k, m in self.module.named_modules() if m is self.layers)
        self.tied = _tied(self.module)
        """Head's weight -> embedding's weight, where they are one."""
        self.places = self._places()
        self._rope_factors()
        for owner in self.module.modules():
            owner._buffers.update({k: b.to(self.device) for k, b in owner._buffers.items() if b is not None})
        self._inputs: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._returns_tuple = False
        self._output: type = type(None)
        self.resident_bytes = 0
        """Of weights that `resident` held at a time."""

    # ---- weights

    def _places(self) -> dict[str, Place]:
        """Checkpoint name -> where it is stored, for every tensor that the source has."""
        source = self.source
        if source.format != "gguf":
            expected = {k for k, _ in _checkpoint_shapes(self.module)}
            return {_module_name(k, expected, self.module.base_model_prefix): Place(k) for k in source.weights}
        assert self.arch is not None
        shapes = dict(_checkpoint_shapes(self.module))
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

    def _rope_factors(self) -> None:
        """Llama 3's rope scaling as llama.cpp keeps it: a tensor that divides the frequencies."""
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        if self.source.format == "gguf" and name in self.source.weights:
            factors = torch.from_numpy(self.source.read(name).decode().reshape(-1).copy())
            for module in self.module.modules():
                if isinstance(frequencies := getattr(module, "inv_freq", None), torch.Tensor):
                    module.register_buffer("inv_freq", frequencies / factors.to(frequencies), persistent=False)

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

    def parts(self, name: str) -> list[str]:
        """The checkpoint tensors that a parameter of the module is made of; empty if it has none of its own."""
        if name in self.places:
            return [name]
        for fused, parts in FUSED.items():
            if name.endswith(f".experts{fused}"):
                count = int(self.module.get_parameter(name).shape[0])
                return [f"{name.removesuffix(fused)}.{e}.{p}.weight" for e in range(count) for p in parts]
        return []

    def roles(self) -> dict[str, str]:
        """Checkpoint name -> role (GGUF stem), where the architecture is known."""
        try:
            weights = self.arch.weights(self.config, dict(_checkpoint_shapes(self.module))) if self.arch else []
        except QuantForgeError:  # something that transformers runs and llama.cpp does not
            weights = []
        return {source: w.role for w in weights for source in w.sources}

    def outer_parameters(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint tensors outside the blocks and their shapes: embeddings, final norm, head."""
        inside = f"{self.prefix}."
        return {k: s for k, s in _checkpoint_shapes(self.module) if not k.startswith(inside) and k in self.places}

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

    def parameter(self, name: str) -> F32:
        """A parameter of the module by its name there: a checkpoint tensor, or experts' tensors stacked."""
        name = self.tied.get(name, name)
        if name in self.places:
            return self.decode(name)
        if pieces := self.parts(name):
            shape = tuple(self.module.get_parameter(name).shape)
            return np.concatenate([self.decode(p) for p in pieces]).reshape(shape)
        raise FormatError(self.source.path, f"tensor {name} is missing")

    def load(self, module: nn.Module, prefix: str, skip: Sequence[nn.Module] = ()) -> None:
        """Decode the parameters of `module`, whose name is `prefix`, into it; sub-modules in `skip` stay empty."""
        avoided = {id(m) for s in skip for m in s.modules()}
        if self.packed:
            self._pack(module, prefix, avoided)
        done: dict[str, nn.Parameter] = {}
        for path, owner in module.named_modules():
            if id(owner) in avoided:
                continue
            stem = ".".join(p for p in (prefix, path) if p)
            for leaf, parameter in list(owner._parameters.items()):
                if parameter is None or parameter.device.type != "meta":
                    continue
                name = self.tied.get(f"{stem}.{leaf}", f"{stem}.{leaf}")
                if name not in done:  # a tied head is decoded once
                    w = self.parameter(name)
                    self._check_shape(name, w.shape, tuple(parameter.shape))
                    done[name] = nn.Parameter(self._tensor(w), requires_grad=False)
                owner._parameters[leaf] = done[name]
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is not None and leaf not in owner._non_persistent_buffers_set and f"{stem}.{leaf}" in self.places:
                    owner._buffers[leaf] = torch.from_numpy(self.decode(f"{stem}.{leaf}")).to(self.device, buffer.dtype)

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
        if len(e.shape) != 2 or _PLAIN.get(e.codec.name) == self.dtype:
            return None
        if place.inverse is not None and place.inverse.rows is not None:
            if not e.codec.sliceable:
                return None
            e = e.rows(place.inverse.rows)
        return e

    def _pack(self, module: nn.Module, prefix: str, avoided: set[int]) -> None:
        """Put modules that hold stored tensors in the place of linears, embeddings and experts without weights."""
        owners = [(".".join(p for p in (prefix, k) if p), m) for k, m in module.named_modules() if id(m) not in avoided]
        for kind in (nn.Embedding, nn.Linear):  # a tied head needs its embedding
            for stem, owner in owners:
                for key, child in list(owner._modules.items()):
                    if type(child) is kind and id(child) not in avoided and child.weight.is_meta:
                        name = f"{stem}.{key}.weight" if stem else f"{key}.weight"
                        if (fresh := self._packed(child, name)) is not None:
                            owner._modules[key] = fresh.to(self.device)
                            fresh.__dict__["_replaced"] = child
                            if isinstance(child, nn.Linear):
                                fresh.bias = child.bias  # decoded with what else is left
        for stem, owner in owners:
            for key, parameter in list(owner._parameters.items()):
                if parameter is None or not parameter.is_meta or parameter.ndim != 3:
                    continue
                if (stacked := self._stacked(f"{stem}.{key}", len(parameter))) is not None:
                    del owner._parameters[key]
                    owner._modules[key] = experts = QuantExperts(stacked, dtype=self.dtype).to(self.device)
                    experts.__dict__["_replaced"] = parameter
                    self.module.config._experts_implementation = "eager"  # which takes experts one by one

    def _packed(self, child: nn.Module, name: str) -> nn.Module | None:
        if name in self.tied:
            embedding = self.module.get_submodule(self.tied[name].removesuffix(".weight"))
            if isinstance(embedding, QuantEmbedding):
                return QuantLinear.tied(embedding, activations=self.activations)
            name = self.tied[name]
        e = self.encoded(name)
        if e is None or (isinstance(child, nn.Embedding) and not e.codec.sliceable):
            if name in self.places and self.stored(name)[0].name not in _PLAIN:
                logger.info("%s: %s is decoded: its rows have another order or cannot be had one by one", self.name, name)
            return None
        expected = tuple(child.weight.shape)  # type: ignore[arg-type]
        if e.shape != expected:
            raise ShapeError(f"{self.name}: {name}: shape {list(e.shape)}, config says {list(expected)}")
        linear = isinstance(child, nn.Linear)
        fresh = QuantLinear(e, activations=self.activations) if linear else QuantEmbedding(e, dtype=self.dtype)
        self.source.release(self.places[name].stored)
        return fresh

    def _stacked(self, name: str, count: int) -> list[list[Encoded]] | None:
        """The stored matrices of each expert of a fused parameter, or None if some must be decoded."""
        if name in self.places:
            e = self.source.read(self.places[name].stored)
            if e.codec.row_local and len(e.shape) == 3 and _PLAIN.get(e.codec.name) != self.dtype:
                n = e.shape[1]
                return [[e.flat().rows(slice(i * n, (i + 1) * n))] for i in range(count)]
            return None
        found = [self.encoded(p) for p in self.parts(name)]
        if not found or any(e is None for e in found):
            return None
        per = len(found) // count
        return [[e for e in found[i * per : (i + 1) * per] if e is not None] for i in range(count)]

    def _tensor(self, w: F32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(w)).to(self.device, self.dtype)

    def _check_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(found) != tuple(expected):
            raise ShapeError(f"{self.name}: {name}: shape {list(found)}, config says {list(expected)}")

    @staticmethod
    def unload(module: nn.Module) -> None:
        """Give the memory of a module's parameters back."""
        for owner in list(module.modules()):
            for key, child in list(owner._modules.items()):
                replaced = child.__dict__.get("_replaced")
                if isinstance(replaced, nn.Module):
                    owner._modules[key] = replaced
                elif replaced is not None:
                    del owner._modules[key]
                    owner._parameters[key] = replaced
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Decoder block `i` with its weights."""
        layer = self.layers[i]
        self.load(layer, f"{self.prefix}.{i}")
        try:
            yield layer
        finally:
            self.unload(layer)

    @contextmanager
    def resident(self, memory: int | None = None) -> Iterator[nn.Module]:
        """The whole model with its weights, for generation.

        memory: bytes for them, default half of what is free; blocks that do not fit are decoded at every pass.
        """
        limit = _free_memory(self.device) // 2 if memory is None else memory
        blocks = [sum(p.nbytes for p in layer.parameters()) for layer in self.layers]
        whole = sum(p.nbytes for p in self.module.parameters())
        share = self.source.total_bytes / whole if self.packed else 1
        held, streamed = share * (whole - sum(blocks)), 0.0
        self.load(self.module, "", skip=[self.layers])
        # one position of many is strided: torch would copy a bf16 matrix for each row of such an input
        hooks = [self.module.get_output_embeddings().register_forward_pre_hook(lambda _, x: (x[0].contiguous(), *x[1:]))]
        for i, (layer, size) in enumerate(zip(self.layers, blocks, strict=True)):
            if not streamed and held + share * size <= limit:
                self.load(layer, f"{self.prefix}.{i}")
                held += share * size
                continue
            streamed = max(streamed, share * size)
            hooks.append(layer.register_forward_pre_hook(lambda m, _, i=i: self.load(m, f"{self.prefix}.{i}")))
            hooks.append(layer.register_forward_hook(lambda m, _, out: self.unload(m)))
        self.resident_bytes = int(held + streamed)
        if streamed:
            logger.info("%s: blocks that exceed %.2f GB are decoded for every token", self.name, limit / 1e9)
        try:
            yield self.module
        finally:
            for hook in hooks:
                hook.remove()
            self.unload(self.module)

    # ---- running

    @contextmanager
    def _instead(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Blocks do `forward(index, hidden, *args, **kwargs)` for a while: transformers' own code
        around them (embedding, masks, rotary tables, final norm, head) runs without them."""
        try:
            for i, layer in enumerate(self.layers):
                layer.forward = lambda *a, _i=i, **k: forward(_i, *a, **k)
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def enter(self, ids: torch.Tensor, batch: int) -> torch.Tensor:
        """Hidden states in front of the first block: [windows, ctx, hidden] from ids int[windows, ctx].

        Remembers what else transformers hands to each block (masks, rotary tables).
        """
        with self._around_blocks() as base:
            embedding = self.module.get_input_embeddings()
            vectors = self._embed(embedding, ids)
            width = self.module.config.hidden_size
            states = vectors if vectors.shape[-1] == width else vectors.new_empty(*ids.shape, width)
            for chunk, given, out in zip(*(torch.split(x, batch) for x in (ids, vectors, states)), strict=True):
                seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
                first: list[torch.Tensor] = []

                def note(i: int, hidden: torch.Tensor, *args: Any, seen: Any = seen, first: Any = first, **kwargs: Any) -> Any:
                    seen.append((args, kwargs))
                    if i == 0:
                        first.append(hidden)
                    return hidden

                with self._instead(note), _forward(embedding, _const(given)):
                    base(input_ids=chunk, use_cache=False)
                self._inputs[len(chunk)] = seen
                out.copy_(first[0])
        return states

    @contextmanager
    def _around_blocks(self) -> Iterator[Any]:
        """transformers' decoder with the weights that belong neither to blocks nor to embeddings."""
        base = self.module.get_decoder()
        prefix = next(k for k, m in self.module.named_modules() if m is base)
        self.load(base, prefix, skip=[self.layers, self.module.get_input_embeddings()])
        try:
            yield base
        finally:
            self.unload(base)

    def _embed(self, embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [windows, ctx, width] of tokens, from the rows of the embedding that occur, some at a time."""
        name = next(k for k, m in self.module.named_modules() if m is embedding) + ".weight"
        meta: Any = embedding.weight
        embedding.padding_idx = None  # it matters to gradients alone, and is no row of a slice
        self._check_shape(name, self.stored(name)[1], tuple(meta.shape))
        width = meta.shape[-1]
        vectors = torch.empty(*ids.shape, width, dtype=self.dtype, device=self.device)
        try:
            for used in torch.split(torch.unique(ids), rows_at_once(width)):
                w = self._tensor(self.decode(name, used.cpu().numpy()))
                embedding._parameters["weight"] = nn.Parameter(w, requires_grad=False)
                at = torch.searchsorted(used, ids).clamp_(max=len(used) - 1)
                here = used[at] == ids
                vectors[here] = embedding(at[here])
        finally:
            embedding.weight = meta
        return vectors

    def run_block(self, i: int, layer: nn.Module, hidden: torch.Tensor, batch: int) -> None:
        """Advance hidden states [windows, ctx, hidden] through one block, in place."""
        for chunk in torch.split(hidden, batch):
            args, kwargs = self._inputs[len(chunk)][i]
            out = layer(chunk, *args, **kwargs)
            self._returns_tuple = isinstance(out, tuple)
            out = out[0] if self._returns_tuple else out
            if not bool(torch.isfinite(out.sum())) and not bool(torch.isfinite(out).all()):
                where = _blame(layer, chunk, args, kwargs)
                raise NonFiniteError(
                    f"{self.name}: not a number after {self.prefix}.{i}.{where}; weights are finite, activations overflow",
                    (),
                )
            chunk.copy_(out)

    def finish(self, hidden: torch.Tensor, chosen: torch.Tensor, batch: int) -> torch.Tensor:
        """What the head sees at chosen positions (bool[windows, ctx]) of hidden states behind the last block: [chosen, hidden].

        Overwrites `hidden`. Raises NonFiniteError.
        """
        total = int(chosen.sum())
        found, n = hidden.view(-1, hidden.shape[-1])[:total], 0  # never ahead of what is still to be read
        with self._around_blocks() as base:
            for chunk, keep in zip(torch.split(hidden, batch), torch.split(chosen, batch), strict=True):

                def final(i: int, _: torch.Tensor, *args: Any, chunk: torch.Tensor = chunk, **kwargs: Any) -> Any:
                    return (chunk,) if self._returns_tuple else chunk

                with self._instead(final):
                    out = base(inputs_embeds=chunk, use_cache=False)
                self._output = type(out)
                states = out.last_hidden_state[keep]
                if not bool(torch.isfinite(states).all()):
                    raise NonFiniteError(f"{self.name}: not a number after the final norm; activations overflow", ())
                if not n and states.shape[-1] != found.shape[-1]:
                    found = states.new_empty(total, states.shape[-1])
                found[n : n + len(states)] = states
                n += len(states)
        self._inputs.clear()
        return found

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The output layer, empty: `Head.take` decodes rows."""
        base, linear = self.module.get_decoder(), self.module.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(f"{self.name}: the output layer of {type(self.module).__name__} is not a linear map")
        self.load(self.module, "", skip=[base, linear, getattr(self.module, self.module.base_model_prefix, base)])
        try:
            yield Head(self, base, linear, self._output)
        finally:
            self.unload(self.module)


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Head:
    """The output layer of a model for some rows of the vocabulary at a time.

    transformers' own code runs around a linear map of these rows alone, so that whatever it does to
    logits (scaling, soft caps) is done. Where it does something that is not column by column, `whole` is true:
    all rows are needed at once.
    """

    def __init__(self, model: Model, base: nn.Module, linear: nn.Linear, output: type) -> None:
        self._model, self._base, self._linear, self._output = model, base, linear, output
        own = next(k for k, m in model.module.named_modules() if m is linear) + ".weight"
        self.name = model.tied.get(own, own)
        """Of the matrix, in the checkpoint."""
        model._check_shape(self.name, model.stored(self.name)[1], tuple(linear.weight.shape))
        self.vocabulary, self.width = linear.weight.shape
        self._bias = None
        if getattr(linear, "bias", None) is not None:
            self._bias = model._tensor(model.decode(own.removesuffix("weight") + "bias"))
        self._weight = self._part = torch.empty(0)
        self.whole = not self._by_column()

    def _by_column(self) -> bool:
        """Does transformers treat every logit by itself? Seen from what it makes of random ones, and of some of them."""
        logits = torch.randn(1, 1, self.vocabulary, generator=torch.Generator().manual_seed(0)).to(self._model.device)
        logits, some = logits.to(self._model.dtype) * 10, slice(self.vocabulary // 3, self.vocabulary // 2 + 1)
        states = torch.zeros(1, self.width, dtype=self._model.dtype, device=self._model.device)
        try:
            whole, part = (self._run(states, _const(x)) for x in (logits, logits[..., some].clone()))
        except (RuntimeError, IndexError, AttributeError):
            return False
        return whole.shape == logits.shape[1:] and torch.allclose(whole[..., some], part)

    def take(self, rows: slice) -> None:
        """Decode these rows, and drop those from before."""
        self._weight = self._part = torch.empty(0)
        self._weight = self._model._tensor(self._model.decode(self.name, rows))
        if self._bias is not None:
            self._part = self._bias[rows]

    @property
    def nbytes(self) -> int:
        """Of the rows that are held."""
        return int(self._weight.nbytes)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [n, rows] of states [n, hidden]."""
        bias = None if self._bias is None else self._part
        return self._run(states, lambda x: nn.functional.linear(x, self._weight, bias))

    def _run(self, states: torch.Tensor, linear: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = states[None]
        with _forward(self._base, _const(self._output(last_hidden_state=x))), _forward(self._linear, linear):
            logits = self._model.module(inputs_embeds=x, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits[0]


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module does something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _const(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def rows_at_once(width: int, models: int = 1) -> int:
    """Rows of embeddings or heads that are decoded together, of all models, in f32."""
    return max(64, SLICE_BYTES // (4 * width * models))


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

Observer = Callable[[int, Sequence[nn.Module], Sequence[torch.Tensor]], None]


@torch.inference_mode()
def advance(
    models: Sequence[Model],
    ids: torch.Tensor,
    *,
    before: Observer | None = None,
    after: Observer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Take windows of tokens through all blocks of all models, block by block.

    ids: int[windows, ctx]. Returns hidden states in front of the final norm, [windows, ctx, hidden] each.
    before, after: called with (block index, blocks, hidden states) around every block that all models have;
    progress: (blocks done, of). Raises NonFiniteError naming the layer.
    """
    device = models[0].device
    ids = ids.to(device)
    batch = max(1, TOKENS_AT_ONCE[device.type] // ids.shape[1])
    hidden = [m.enter(ids, batch) for m in models]
    depth = max(len(m.layers) for m in models)
    for i in range(depth):
        at = [k for k, m in enumerate(models) if i < len(m.layers)]
        shared = len(at) == len(models)
        blocks = []
        for k in at:
            m = models[k]
            m.load(m.layers[i], f"{m.prefix}.{i}")
            blocks.append(m.layers[i])
        if before and shared:
            before(i, blocks, hidden)
        for k, block in zip(at, blocks, strict=True):
            models[k].run_block(i, block, hidden[k], batch)
        if after and shared:
            after(i, blocks, hidden)
        for block in blocks:
            Model.unload(block)
        if progress:
            progress(i + 1, depth)
    return hidden


@torch.inference_mode()
def finish(models: Sequence[Model], hidden: list[torch.Tensor], chosen: torch.Tensor) -> list[torch.Tensor]:
    """What heads see at chosen positions (bool[windows, ctx]): [chosen, hidden] each, in the memory of `hidden`."""
    chosen = chosen.to(hidden[0].device)
    batch = max(1, TOKENS_AT_ONCE[chosen.device.type] // chosen.shape[1])
    return [m.finish(h, chosen, batch) for m, h in zip(models, hidden, strict=True)]


@torch.inference_mode()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], tokens: int, eos: Sequence[int], memory: int | None = None
) -> list[list[int]]:
    """Greedy answers to prompts (token ids), up to `tokens` each, cut in front of an end-of-sequence token.

    memory: bytes for weights and the KV cache; default: as `Model.resident`, all prompts at once.
    """
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: answers start at one column
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    cache = (width + tokens) * model.shape()["kv_bytes_per_token"] // 2 * model.dtype.itemsize
    at_once = len(prompts) if memory is None else max(1, memory // 4 // cache)
    answers: list[list[int]] = []
    with model.resident(None if memory is None else memory - memory // 4) as module:
        for some, shown in zip(torch.split(ids, at_once), torch.split(mask, at_once), strict=True):
            out = module.generate(  # type: ignore[operator]
                input_ids=some.to(model.device),
                attention_mask=shown.to(model.device),
                max_new_tokens=tokens,
                min_new_tokens=None,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(eos) or None,
                pad_token_id=eos[0] if eos else 0,
                use_cache=True,
            )
            answers += out[:, width:].tolist()
    ends = set(eos)
    return [a[: next((i for i, t in enumerate(a) if t in ends), len(a))] for a in answers]


@torch.inference_mode()
def embed(model: Model, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> F32:
    """Mean of the final hidden states over the tokens of each answer, read after its prompt: f32[texts, hidden]."""
    ids = torch.zeros(len(texts), max(1, *(len(p) + len(a) for p, a in texts)), dtype=torch.int64)
    answered = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):  # padded on the right: what follows a token does not change it
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        answered[row, len(prompt) : len(prompt) + len(answer)] = True
    (states,) = finish([model], advance([model], ids), answered)
    owner = answered.nonzero()[:, 0].to(states.device)
    sums = states.new_zeros(len(texts), states.shape[-1], dtype=torch.float32).index_add_(0, owner, states.float())
    return np.asarray((sums / answered.sum(1, keepdim=True).clamp_min(1).to(sums)).cpu().numpy(), np.float32)


# ---- building


def _arch(source: Source) -> archs.Arch | None:
    """The architecture of a model file; None for a checkpoint of one that only transformers knows."""
    known = archs.supported()
    if source.format != "gguf":
        return next((known[a] for a in source.config.get("architectures") or () if a in known), None)
    return checkpoint.find_arch(source.config, source.path)


def gguf_config(source: Source) -> dict[str, Any]:
    """config.json rebuilt from GGUF metadata; Llama 3's rope factors are in a tensor of their own."""
    return checkpoint.config(source.config, {k: s.shape for k, s in source.weights.items()}, source.path)


def _meta_module(config: Mapping[str, Any], source: Source, dtype: torch.dtype) -> Any:
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


def _layers(module: Any, name: str) -> nn.ModuleList:
    lists = [m for m in module.get_decoder().children() if isinstance(m, nn.ModuleList)]
    if len(lists) != 1:
        raise UnsupportedError(f"{name}: {type(module).__name__} has {len(lists)} lists of blocks; one is needed")
    return lists[0]


def _module_name(name: str, expected: set[str], base: str) -> str:
    """What the module calls a tensor of a checkpoint: older names, and those saved without the head, which lack "model."."""
    if name in expected:
        return name
    newer = name
    for old, new in RENAMED:
        newer = re.sub(old, new, newer)
    return next((k for k in (newer, f"{base}.{name}", f"{base}.{newer}") if k in expected), name)


def _tied(module: Any) -> dict[str, str]:
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    names = {id(m): k for k, m in module.named_modules()}
    same = head is not None and head.weight is embedding.weight
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"} if same else {}


def _checkpoint_shapes(module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as a checkpoint has them: a tied head left out, stacked experts one by one."""
    tied = _tied(module)
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


def _blame(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> str:
    """Name of the first sub-module of a block whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor) and not bool(torch.isfinite(out).all()):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(look(k)) for k, m in layer.named_modules() if k]
    try:
        layer(hidden, *args, **kwargs)
    finally:
        for h in handles:
            h.remove()
    return found[0] if found else "the residual sum"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
