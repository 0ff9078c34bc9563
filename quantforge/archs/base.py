"""What an architecture is: what each tensor is called, which role it plays, which metadata go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Transform:
    """A change between the checkpoint's numbers and GGUF's that works row by row, with its inverse.

    `gguf[i] = value(checkpoint[rows[i]])`; None: unchanged. Rows are those of the tensor with
    all axes before the last merged (for 1-D tensors, its elements).
    """

    rows: NDArray[np.int64] | None = None
    value: Callable[[F32], F32] | None = None
    inverse_value: Callable[[F32], F32] | None = None


IDENTITY = Transform()


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model, as GGUF sees it."""

    name: str
    """GGUF name, "blk.0.attn_q.weight"."""
    shape: tuple[int, ...]
    """[out, in], or [experts, out, in], or [n]."""
    sources: tuple[str, ...]
    """Tensors of the checkpoint that it is made of: one, or several stacked on a new first axis."""
    transform: Transform = field(default=IDENTITY)

    @property
    def role(self) -> str:
        """GGUF stem without layer and suffix: "attn_q", "token_embd"."""
        stem = self.name.rsplit(".", 1)[0]
        return stem.split(".", 2)[2] if stem.startswith("blk.") else stem

    @property
    def layer(self) -> int | None:
        """Layer number, or None outside the blocks."""
        return int(self.name.split(".", 2)[1]) if self.name.startswith("blk.") else None
