"""Linear layers and embeddings whose weights stay as they are stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from typing_extensions import Self

from ..codecs import Encoded
from ..errors import ShapeError
from .base import Packed

ACTIVATIONS = ("float", "int8")


class QuantLinear(Packed):
    """y = x wᵀ + bias with w as it is stored, in any codec; see `Packed`.

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
        self.bias: nn.Parameter | None
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
        y: torch.Tensor = torch.ops.quantforge.linear(x, self.planes, self.codec_name, *self.shape, self.activations)
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
        self.dtype = dtype
        self._shared = tuple(f"weight_{k}" in {f"weight_{s}" for s in encoded.codec.shared} for k in encoded.parts)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integers of any shape -> [..., hidden]."""
        rows = ids.reshape(-1)
        planes = [p if shared else p[rows] for p, shared in zip(self.planes, self._shared, strict=True)]
        found: torch.Tensor = torch.ops.quantforge.dequantize(
            planes, self.codec_name, rows.shape[0], self.embedding_dim, self.dtype
        )
        return found.reshape(*ids.shape, self.embedding_dim)


class TiedLinear(QuantLinear):
    """A head without a matrix of its own: see `QuantLinear.tied`."""

    def __init__(self, embedding: QuantEmbedding, activations: str) -> None:
        nn.Module.__init__(self)
        self._embedding = (embedding,)  # in a tuple: no sub-module, whose parameters would be here twice
        self._parts = ()
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
        return torch.cat([m.dequantize() for m in matrices if isinstance(m, Packed)])
