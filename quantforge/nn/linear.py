"""Linear layers and embeddings whose weights stay as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from typing_extensions import Self

from .. import codecs
from ..codecs import Codec, Encoded
from ..errors import ShapeError, UnsupportedError
from . import ops
from .base import tensor
from .planes import family, pack, restore, unpack
from .tiles import TILE

ACTIVATIONS = ("float", "int8")

ROWS_AT_ONCE = 1024
"""Rows of an embedding that CUDA looks up together: with each come those of its tile."""


class Numbers(torch.Tensor):
    """What a `Packed` layer gives as its `weight`, to code that asks its shape, dtype and device, or computes with it:
    the numbers are decoded whenever that is done."""

    _owner: Packed

    @staticmethod
    def __new__(cls, owner: Packed) -> Numbers:
        """owner: the layer, [out, in]."""
        made: Numbers = torch.Tensor._make_wrapper_subclass(
            cls, owner.shape, dtype=owner.dtype or torch.float32, device=owner.planes[0].device
        )
        made._owner = owner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def decoded(x: Any) -> Any:
            return x._owner.dequantize(x.dtype) if isinstance(x, Numbers) else x

        if func is torch.ops.aten.detach.default:
            return Numbers(args[0]._owner)
        if func._schema.is_mutable and isinstance(args[0], Numbers):
            raise cls._fixed()
        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs or {}))

    @property
    def data(self) -> torch.Tensor:
        """Itself: no copy that could be changed without effect."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise self._fixed()

    def __setitem__(self, at: Any, value: Any) -> None:
        raise self._fixed()

    @staticmethod
    def _fixed() -> UnsupportedError:
        return UnsupportedError("a stored weight cannot be changed, nor can adapters be merged into it")


class Packed(nn.Module):
    """A matrix [out, in] in its stored form: a buffer for each part, `weight_<part>`, with the file's bytes; on CUDA,
    the same bits as its kernels want them (`planes`).

    Moving to another device takes the parts along; a change of dtype leaves them as they are, and is that of `dtype`.
    """

    dtype: torch.dtype | None = None
    """Of the numbers that come out; of a linear layer, whose outputs are as its inputs, only of `weight`. None: float32."""

    def __init__(self, encoded: Encoded) -> None:
        nn.Module.__init__(self)  # nn.Linear's and nn.Embedding's would make a matrix of numbers
        self.codec_name = encoded.codec.name
        self.shape = tuple(int(n) for n in encoded.shape)
        self._parts: tuple[str, ...] = tuple(f"weight_{k}" for k in encoded.codec.layout(encoded.shape))
        for name, part in zip(self._parts, encoded.parts.values(), strict=True):
            self.register_buffer(name, tensor(part))

    @property
    def codec(self) -> Codec:
        """How the matrix is stored."""
        return codecs.get(self.codec_name)

    @property
    def planes(self) -> list[torch.Tensor]:
        """What the operators take: the parts in the codec's order."""
        return [getattr(self, k) for k in self._parts]

    @property
    def weight(self) -> torch.Tensor:
        """The matrix for others' code, in the layer's dtype, or float32; it takes no memory until it is computed with."""
        return Numbers(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return sum(p.nbytes for p in self.planes)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers that the matrix stands for: [out, in] of `dtype`, by default float32."""
        dtype = dtype or torch.float32
        weight: torch.Tensor = torch.ops.quantforge.dequantize(self.planes, self.codec_name, *self.shape, dtype)
        return weight

    def encoded(self) -> Encoded:
        """The stored matrix, on the CPU."""
        if self.planes[0].is_cuda:
            return unpack(restore(self.planes, self.codec_name, self.shape).to("cpu"))
        return Encoded(self.codec, self.shape, ops.parts_of(self.planes, self.codec, self.shape))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        kept = {k: self._buffers.pop(k) for k in self._parts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not kept:
            return self
        here = next(p.device for p in kept.values() if p is not None)
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if self.dtype is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=here)).dtype
        if {here.type, there.type} == {"cpu", "cuda"}:
            self._buffers.update(kept)
            e = self.encoded()
            for k in self._parts:
                del self._buffers[k]
            moved = pack(e).tensors if there.type == "cuda" else {k: tensor(p) for k, p in e.parts.items()}
            kept = {f"weight_{k}": p.to(there) for k, p in moved.items()}
            self._parts = tuple(kept)
        for k, part in kept.items():
            assert part is not None
            # as bytes, which .half() and .to(dtype) let pass
            self._buffers[k] = fn(part.reshape(-1).view(torch.uint8)).view(part.dtype).reshape(part.shape)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not {prefix + k for k in self._parts} <= state_dict.keys():
            self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state: dict[str, Any], prefix: str) -> None:
        """A state that was saved on the other kind of device, CPU or CUDA, into the form that the matrix has here."""
        stored = [f"weight_{k}" for k in self.codec.layout(self.shape)]
        on_cpu = set(self._parts) == set(stored)
        names = [f"weight_{k}" for k in pack(self.encoded()).tensors] if on_cpu else stored
        if not all(prefix + k in state for k in names):
            return
        given = [state.pop(prefix + k).cpu() for k in names]
        if on_cpu:
            e = unpack(restore(given, self.codec_name, self.shape))
            arrays = {k: tensor(p) for k, p in e.parts.items()}
        else:
            e = Encoded(self.codec, self.shape, ops.parts_of(given, self.codec, self.shape))
            arrays = dict(pack(e).tensors)
        state.update({f"{prefix}weight_{k}": p for k, p in arrays.items()})

    def extra_repr(self) -> str:
        """Sizes, codec and bits per weight."""
        out, n = self.shape
        bpw = 8 * self.nbytes / max(1, out * n)
        return f"in_features={n}, out_features={out}, codec={self.codec_name}, bpw={bpw:.4g}"


class QuantLinear(Packed, nn.Linear):  # type: ignore[override]  # weight is no parameter
    """y = x wᵀ + bias with w as it is stored, in any codec; see `Packed`. Activations get gradients, so that adapters
    (PEFT) and prompts can be trained; what is stored gets none.

    activations: "float": x enters in float (error below 2e-3 of the result's norm; on the CPU about 1e-6); "int8": x is
    rounded to 8 bits, where the codec has a kernel for that (error below 1.2e-2), which is faster.
    """

    def __init__(self, encoded: Encoded, bias: torch.Tensor | None = None, *, activations: str = "float") -> None:
        if len(encoded.shape) != 2:
            raise ShapeError(f"QuantLinear: weights {list(encoded.shape)} are not a matrix [out, in]")
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations {activations!r} are not one of {', '.join(ACTIVATIONS)}")
        super().__init__(encoded)
        self.out_features, self.in_features = self.shape
        self.activations = activations
        if bias is not None and tuple(bias.shape) != self.shape[:1]:
            raise ShapeError(f"QuantLinear: a bias of {list(bias.shape)} does not fit {self.out_features} outputs")
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def tied(cls, embedding: QuantEmbedding, *, activations: str = "float") -> QuantLinear:
        """A head that computes with an embedding's matrix, which stays the embedding's."""
        return TiedLinear(embedding, activations)

    @classmethod
    def from_encoded(cls, encoded: Encoded, bias: torch.Tensor | None = None, *, activations: str = "float") -> Self:
        """A layer of a stored matrix [out, in], whose parts are copied. Raises ShapeError."""
        return cls(encoded, bias, activations=activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] of any float dtype -> [..., out] of that dtype."""
        kind = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = x.to(torch.get_autocast_dtype(kind))  # as nn.Linear
        linear = ops.product if ops.undispatched(x) else torch.ops.quantforge.linear
        y: torch.Tensor = linear(
            x, self.planes, self.codec_name, self.out_features, self.in_features, activations=self.activations
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, codec, bits per weight, bias."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


class QuantEmbedding(Packed):
    """Rows of a stored matrix [vocabulary, hidden], decoded when they are looked up; see `Packed`.

    dtype: of what comes out.
    """

    def __init__(self, encoded: Encoded, *, dtype: torch.dtype = torch.float32) -> None:
        if len(encoded.shape) != 2 or not encoded.codec.sliceable:
            raise ShapeError(f"QuantEmbedding: rows of {encoded.codec.name}{list(encoded.shape)} cannot be decoded alone")
        super().__init__(encoded)
        self.num_embeddings, self.embedding_dim = self.shape
        self.dtype: torch.dtype = dtype
        # looked up once: torch.compile does not trace through the registry
        self._shared = {f"weight_{k}" for k in encoded.codec.shared}
        self._tile = TILE if family(self.codec_name) else 1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integers of any shape -> [..., hidden]."""
        tile = self._tile if self.planes[0].is_cuda else 1
        rows = ids.reshape(-1)
        at_once = ROWS_AT_ONCE if tile > 1 else max(1, len(rows))
        pieces = [self._rows(some, tile) for some in torch.split(rows, at_once)]
        return torch.cat(pieces).reshape(*ids.shape, self.embedding_dim)

    def _rows(self, rows: torch.Tensor, tile: int) -> torch.Tensor:
        whole = [k in self._shared or (tile > 1 and p.ndim == 1) for k, p in zip(self._parts, self.planes, strict=True)]
        planes = [p if all_ else p[rows // tile] for p, all_ in zip(self.planes, whole, strict=True)]
        n = rows.shape[0]
        decoded: torch.Tensor = torch.ops.quantforge.dequantize(planes, self.codec_name, n * tile, self.embedding_dim, self.dtype)
        if tile == 1:
            return decoded
        return decoded.reshape(n, tile, -1)[torch.arange(n, device=rows.device), rows % tile]


class TiedLinear(QuantLinear):
    """A head without a matrix of its own: see `QuantLinear.tied`."""

    def __init__(self, embedding: QuantEmbedding, activations: str) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple: no sub-module, whose parameters would be here twice
        self._parts: tuple[str, ...] = ()
        self.codec_name, self.shape = embedding.codec_name, embedding.shape
        self.out_features, self.in_features = self.shape
        self.activations = activations
        self.register_parameter("bias", None)

    @property
    def planes(self) -> list[torch.Tensor]:
        """The embedding's."""
        return self._embedding[0].planes


class QuantExperts(nn.Module):
    """Experts' matrices, stacked: `experts[i]` is the i-th, decoded, [out, in] of `dtype`.

    Takes the place of a parameter [experts, out, in]. stacked: what each expert's matrix is made of, on top of each other.
    """

    def __init__(self, stacked: Iterable[Iterable[Encoded]], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for i, matrices in enumerate(stacked):
            self.add_module(str(i), nn.ModuleList(Packed(e) for e in matrices))
        for m in self.modules():
            if isinstance(m, Packed):
                m.dtype = dtype

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i: int | torch.Tensor) -> torch.Tensor:
        matrices = self.get_submodule(str(int(i))).children()
        return torch.cat([m.dequantize(m.dtype) for m in matrices if isinstance(m, Packed)])
