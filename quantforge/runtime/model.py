"""A stored model that runs: its weights are decoded, or packed into layers that compute from them, when they are needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..archs.rope import ROPE_FREQS
from ..archs.weight import Weight, numbers
from ..arrays import F32
from ..codecs import Encoded
from ..device import available
from ..errors import NonFiniteError, ShapeError, UnsupportedError
from ..formats.rows import read_encoded, read_rows
from ..nn import QuantEmbedding, QuantExperts, QuantLinear
from .head import Head, const, rows_at_once, stand_in
from .skeleton import find_decoder
from .stored import FLOATS, StoredModel

if TYPE_CHECKING:
    from ..formats import Source

logger = logging.getLogger(__name__)


_Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with beside hidden states."""
_MORE = object()
"""What a block may give beside hidden states; where another block is handed it, blocks need each other."""
_FORMS: tuple[Callable[[torch.Tensor], Any], ...] = (lambda x: x, lambda x: (x,), lambda x: (x, _MORE))


class Model(StoredModel):
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
        super().__init__(source, name, dtype)
        self.packed, self.activations = packed, activations
        self.device = available(device)
        self._rope_factors()
        for owner in self.module.modules():
            owner._buffers.update({k: b.to(self.device) for k, b in owner._buffers.items() if b is not None})
        self._inputs: dict[int, list[_Given]] = {}
        self._by_window: dict[int, list[_Given]] = {}
        self.varying = False
        """Are blocks given something that depends on the windows, beside hidden states?"""
        self._axis = 0
        """Where transformers has the windows among the axes of hidden states."""
        self._form: Callable[[torch.Tensor], Any] | None = None
        """How blocks give their hidden states back."""
        self._output: type = type(None)
        self.resident_bytes = 0
        """Of weights that `resident` held at a time."""

    # ---- weights

    def _rope_factors(self) -> None:
        """Llama 3's rope scaling as llama.cpp keeps it: a tensor that divides the frequencies."""
        if self.source.gguf_names and ROPE_FREQS in self.source.weights and "rope_scaling" in self.config:
            factors = torch.from_numpy(self.source.read(ROPE_FREQS).decode().reshape(-1).copy())
            for module in self.module.modules():
                if isinstance(frequencies := getattr(module, "inv_freq", None), torch.Tensor):
                    module.register_buffer("inv_freq", frequencies / factors.to(frequencies), persistent=False)

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
                    self.check_shape(name, w.shape, tuple(parameter.shape))
                    done[name] = nn.Parameter(self.tensor(w), requires_grad=False)
                owner._parameters[leaf] = done[name]
            for leaf, buffer in list(owner._buffers.items()):
                if buffer is not None and leaf not in owner._non_persistent_buffers_set and f"{stem}.{leaf}" in self.origins:
                    owner._buffers[leaf] = torch.from_numpy(self.decode(f"{stem}.{leaf}")).to(self.device, buffer.dtype)

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
            if not hasattr(owner, "has_gate"):  # no experts, or of a kind that are not taken one by one
                continue
            for key, parameter in list(owner._parameters.items()):
                if parameter is None or not parameter.is_meta or parameter.ndim != 3:
                    continue
                if (stacked := self._stacked(f"{stem}.{key}", tuple(parameter.shape))) is not None:
                    del owner._parameters[key]
                    owner._modules[key] = experts = QuantExperts(stacked, dtype=self.dtype).to(self.device)
                    experts.__dict__["_replaced"] = parameter
                    owner.config._experts_implementation = "eager"  # which takes experts one by one

    def _packed(self, child: nn.Module, name: str) -> nn.Module | None:
        if name in self.tied:
            embedding = self.module.get_submodule(self.tied[name].removesuffix(".weight"))
            if isinstance(embedding, QuantEmbedding):
                tied = QuantLinear.tied(embedding, activations=self.activations)
                tied.dtype = self.dtype
                return tied
            name = self.tied[name]
        e = self.encoded(name)
        if e is None or (isinstance(child, nn.Embedding) and not e.codec.sliceable):
            if name in self.origins and self.stored(name)[0].name not in FLOATS:
                logger.info("%s: %s is decoded: its rows have another order or cannot be had one by one", self.name, name)
            return None
        expected = tuple(child.weight.shape)  # type: ignore[arg-type]
        if e.shape != expected:
            raise ShapeError(f"{self.name}: {name}: shape {list(e.shape)}, config says {list(expected)}")
        linear = isinstance(child, nn.Linear)
        fresh = QuantLinear(e, activations=self.activations) if linear else QuantEmbedding(e, dtype=self.dtype)
        fresh.dtype = self.dtype
        self.release(name)
        return fresh

    def _stacked(self, name: str, shape: tuple[int, ...]) -> list[list[Encoded]] | None:
        """The stored matrices of each expert of a stacked parameter, or None if some must be decoded."""
        weight = self.weight(name)
        if weight is None or not weight.by_row or weight.order is not None or weight.shape != shape:
            return None
        stacked: list[list[Encoded]] = [[] for _ in range(shape[0])]
        begin = 0
        for piece in weight.pieces:
            end = begin + piece.count
            whole = Weight.of(piece.source, self.source.weights[piece.source].shape)
            for i in range(begin // shape[1], -(-end // shape[1])):
                a, b = max(begin, i * shape[1]), min(end, (i + 1) * shape[1])
                skip = 0 if piece.rows is None else numbers(piece.rows)[0]
                if a == begin and b == end and piece.rows is None and len(whole.shape) == 2:
                    e = read_encoded(self.source, whole)
                else:
                    some = read_rows(self.source, whole, int(skip) + a - begin, int(skip) + b - begin)
                    e = some if isinstance(some, Encoded) and some.codec.row_local and not some.codec.virtual else None
                if e is None or FLOATS.get(e.codec.name) == self.dtype:
                    return None
                stacked[i].append(e)
            begin = end
        return stacked

    def tensor(self, w: F32) -> torch.Tensor:
        """`w` on the model's device, in its dtype."""
        return torch.from_numpy(np.ascontiguousarray(w)).to(self.device, self.dtype)

    def check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Raise ShapeError unless a stored tensor has the shape that the config gives it."""
        if tuple(shape) != tuple(expected):
            raise ShapeError(f"{self.name}: {name}: shape {list(shape)}, config says {list(expected)}")

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
        self._inputs.clear()
        self.varying = False
        with self._around_blocks() as base:
            embedding = self.module.get_input_embeddings()
            vectors = self._embed(embedding, ids)
            states = vectors if vectors.shape[-1] == self.module.config.get_text_config().hidden_size else None
            first = 0
            for chunk, given in zip(torch.split(ids, batch), torch.split(vectors, batch), strict=True):
                with stand_in(embedding, const(given)):
                    hidden, seen = self._arguments(base, chunk)
                if hidden.ndim > 3 and hidden.shape[0] != len(chunk):  # several streams for each window
                    self._axis = 1
                hidden = hidden.movedim(self._axis, 0)
                if states is None or states.shape[1:] != hidden.shape[1:]:
                    states = hidden.new_empty(len(ids), *hidden.shape[1:])
                states[first : first + len(chunk)] = hidden
                known = self._inputs.get(len(chunk))
                if known is None or _same(known, seen):
                    self._inputs.setdefault(len(chunk), seen)
                    known = self._inputs[len(chunk)]
                else:
                    self.varying = True
                self._by_window[first] = known if _same(known, seen) else seen
                first += len(chunk)
        assert states is not None
        return states

    def _arguments(self, base: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[_Given]]:
        """The first block's hidden states, and what else each block is given."""
        for form in _FORMS if self._form is None else (self._form,):
            seen: list[_Given] = []
            chain: list[torch.Tensor] = []

            def note(
                i: int, hidden: torch.Tensor, *args: Any, seen: Any = seen, chain: Any = chain, form: Any = form, **kw: Any
            ) -> Any:
                seen.append((args, kw))
                chain.append(hidden)
                return form(hidden)

            try:
                with self._instead(note):
                    base(input_ids=ids, use_cache=False)
            except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as e:
                if form is _FORMS[-1] or self._form is not None:
                    raise self._not_by_blocks() from e
                continue
            if any(value is _MORE for args, kw in seen for value in (*args, *kw.values())):
                break
            if len(seen) == len(self.layers) and all(_same_memory(h, chain[0]) for h in chain):
                self._form = form
                return chain[0], seen
        raise self._not_by_blocks()

    def _not_by_blocks(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name}: {type(self.module).__name__} computes between its blocks; it cannot be run block by block"
        )

    @contextmanager
    def _around_blocks(self) -> Iterator[Any]:
        """transformers' decoder with the weights that belong neither to blocks nor to embeddings."""
        base = find_decoder(self.module)
        prefix = next(k for k, m in self.module.named_modules() if m is base)
        tables = [m for m in base.modules() if isinstance(m, nn.Embedding)]
        inside = {id(m) for m in self.layers.modules()}
        self.load(base, prefix, skip=[self.layers, *tables])
        try:
            with ExitStack() as stack:
                for table in tables:
                    if id(table) not in inside:
                        stack.enter_context(stand_in(table, partial(self._embed, table)))
                yield base
        finally:
            self.unload(base)

    def _embed(self, embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [windows, ctx, width] of tokens, from the rows of the embedding that occur, some at a time."""
        name = next(k for k, m in self.module.named_modules() if m is embedding) + ".weight"
        meta: Any = embedding.weight
        embedding.padding_idx = None  # it matters to gradients alone, and is no row of a slice
        self.check_shape(name, self.stored(name)[1], tuple(meta.shape))
        width = meta.shape[-1]
        vectors = torch.empty(*ids.shape, width, dtype=self.dtype, device=self.device)
        try:
            for used in torch.split(torch.unique(ids), rows_at_once(width)):
                w = self.tensor(self.decode(name, used.cpu().numpy()))
                embedding._parameters["weight"] = nn.Parameter(w, requires_grad=False)
                at = torch.searchsorted(used, ids).clamp_(max=len(used) - 1)
                here = used[at] == ids
                vectors[here] = type(embedding).forward(embedding, at[here])
        finally:
            embedding.weight = meta
        return vectors

    def run_block(self, i: int, layer: nn.Module, hidden: torch.Tensor, batch: int, first: int = 0) -> None:
        """Advance hidden states [windows, ctx, hidden] through one block, in place.

        first: the number of the first of these windows among those that entered; it has to be the first of a batch.
        """
        for chunk in torch.split(hidden, batch):
            known = self._by_window.get(first) if self.varying else self._inputs.get(len(chunk))
            if known is None:
                raise AssertionError(f"{self.name}: windows in other batches than they entered in")
            first += len(chunk)
            args, kwargs = known[i]
            out = layer(chunk.movedim(0, self._axis), *args, **kwargs)
            out = (out[0] if isinstance(out, tuple) else out).movedim(self._axis, 0)
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
        rows, n = hidden.view(-1, hidden.shape[-1])[:total], 0  # never ahead of what is still to be read
        if hidden.ndim > 3:
            rows = hidden.new_empty(total, hidden.shape[-1])
        with self._around_blocks() as base:
            embedding = self.module.get_input_embeddings()
            for chunk, keep in zip(torch.split(hidden, batch), torch.split(chosen, batch), strict=True):

                def final(i: int, _: torch.Tensor, *args: Any, chunk: torch.Tensor = chunk, **kwargs: Any) -> Any:
                    assert self._form is not None
                    return self._form(chunk.movedim(0, self._axis))

                any_ids = torch.zeros(keep.shape, dtype=torch.int64, device=self.device)
                with self._instead(final), stand_in(embedding, const(self._like_embeddings(chunk))):
                    out = base(input_ids=any_ids, use_cache=False)
                self._output = type(out)
                states = out.last_hidden_state[keep]
                if not bool(torch.isfinite(states).all()):
                    raise NonFiniteError(f"{self.name}: not a number after the final norm; activations overflow", ())
                if not n and states.shape[-1] != rows.shape[-1]:
                    rows = states.new_empty(total, states.shape[-1])
                rows[n : n + len(states)] = states
                n += len(states)
        self._inputs.clear()
        self._by_window.clear()
        return rows

    def _like_embeddings(self, chunk: torch.Tensor) -> torch.Tensor:
        """What may stand for the embeddings of windows where these do not matter any more."""
        return chunk if chunk.ndim == 3 else chunk[:, 0]

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The output layer, empty: `Head.take` decodes rows."""
        base, linear = find_decoder(self.module), self.module.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UnsupportedError(f"{self.name}: the output layer of {type(self.module).__name__} is not a linear map")
        self.load(self.module, "", skip=[base, linear, getattr(self.module, self.module.base_model_prefix, base)])
        try:
            yield Head(self, base, linear, self._output)
        finally:
            self.unload(self.module)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Is a tensor another one, or a view of all of it?"""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _same(a: Any, b: Any) -> bool:
    """Are arguments of blocks equal? An empty mapping is not: blocks write to it."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys() and a:
        return all(_same(a[k], b[k]) for k in a)
    return not isinstance(a, Mapping) and (a is b or bool(a == b))


def _blame(layer: nn.Module, hidden: torch.Tensor, args: Any, kwargs: Any) -> str:
    """Name of the first sub-module of a block whose output is not finite."""
    culprits: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor) and not bool(torch.isfinite(out).all()):
                culprits.append(name)

        return hook

    handles = [m.register_forward_hook(look(k)) for k, m in layer.named_modules() if k]
    try:
        layer(hidden, *args, **kwargs)
    finally:
        for h in handles:
            h.remove()
    return culprits[0] if culprits else "the residual sum"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
