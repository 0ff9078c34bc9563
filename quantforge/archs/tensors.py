"""The words that an architecture is written in: where a tensor is from, its shape, its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .weight import Value

Config: TypeAlias = Mapping[str, Any]

Sizes: TypeAlias = Mapping[str, int]

Dims: TypeAlias = tuple[str, ...]
"""Names of `Arch.sizes`, outermost first, or sums and products of them: ("q+kv+kv", "embd"), ("2*ff", "embd")."""


@dataclass(frozen=True, slots=True)
class From:
    """A tensor of the checkpoint that a role is made of, where that is not simply the same tensor."""

    name: str
    """With {bid} for the layer, {nextn} for its number among the prediction layers, or a size of its own where layers are
    numbered otherwise. With {eid}: one tensor for each of the first of the role's dimensions, stacked.
    Without a suffix it is a weight (".weight", and ".bias" where the role has one)."""
    dims: Dims = ()
    """Its shape; empty: the role's, or one expert's part of it."""
    rows: Callable[[Sizes], NDArray[np.int64]] | None = None
    """Which of its rows (all axes before the last merged) the role has, in the role's order; see `part`, `paired`."""
    groups: str = ""
    """The number of groups, where what is left are groups of rows of which each is transposed."""
    picked: Callable[[Sizes], NDArray[np.int64]] | None = None
    """Which rows, after that."""
    columns: Callable[[Sizes], NDArray[np.int64]] | None = None
    """The order of the last axis, where it is another one."""
    suffix: str = ".weight"
    """Empty for a parameter that is not called weight."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What an architecture says about one role."""

    dims: Dims
    """Its shape in GGUF."""
    checkpoint: str | From | tuple[str | From, ...]
    """Where it is from: a name, or several whose rows follow one another. With {bid}, the role is one of the blocks."""
    bias: bool | str = False
    """Is there a bias of size dims[0]: yes, no, or the config key that says so."""
    tied: str = ""
    """The config key that says that this tensor is another one's copy and is not stored."""
    where: str = ""
    """The kind of layer that has it, of `Arch.layers`; "!kind": all others; empty: all. A role with kinds is in the blocks."""
    value: Value | None = None
    """How its numbers differ from the checkpoint's."""
    optional: bool = False
    """May be left out."""
    when: str = ""
    """The config key that says whether the model has it."""
    suffix: str = ".weight"
    """GGUF's; empty for the few that have none (ssm_a, ssm_d)."""
    also: tuple[str | From, ...] = ()
    """Other spellings of `checkpoint` that releases use: read, not written."""

    @property
    def origins(self) -> tuple[From, ...]:
        """`checkpoint` in one form."""
        given = self.checkpoint if isinstance(self.checkpoint, tuple) else (self.checkpoint,)
        return tuple(From(g) if isinstance(g, str) else g for g in given)


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears that share an input, and the op whose output channels can take a scale out of it."""

    source: str
    targets: tuple[str, ...]


def size(expression: str, sizes: Sizes) -> int:
    """What a sum of products of sizes comes to: "2*ff", "q+kv+kv"."""
    total = 0
    for term in expression.split("+"):
        n = 1
        for factor in term.split("*"):
            n *= int(factor) if factor.isdigit() else sizes[factor]
        total += n
    return total


def part(which: int, *widths: str, per: str = "1") -> Callable[[Sizes], NDArray[np.int64]]:
    """Rows of one of several matrices that a checkpoint keeps together, one after another in each of `per` groups.

    part(1, "q", "kv", "kv"): the keys of a fused qkv_proj. part(0, "expert_ff", "expert_ff", per="experts"): the gates of
    stacked gate_up_proj. widths: rows of each in one group.
    """

    def rows(s: Sizes) -> NDArray[np.int64]:
        given, groups = [size(w, s) for w in widths], size(per, s)
        at = np.arange(given[which], dtype=np.int64) + sum(given[:which])
        return (np.arange(groups, dtype=np.int64)[:, None] * sum(given) + at).reshape(-1)

    return rows


def one_of(key: str, *values: Any) -> Callable[[Config], Any]:
    """For `Arch.implied`: any of these values of a config key is what the graph has; the first is stated on the way back."""
    return lambda h: h[key] if h.get(key) in values else values[0]


def interleaved(which: int, of: int, rows: str) -> Callable[[Sizes], NDArray[np.int64]]:
    """Rows of one of `of` matrices whose rows alternate; rows: of all of them together."""
    return lambda s: np.arange(which, size(rows, s), of, dtype=np.int64)


def paired(heads: str, head: str = "head", rotated: str = "") -> Callable[[Sizes], NDArray[np.int64]]:
    """Rows from transformers' rotary layout (halves) to Meta's (pairs), which llama.cpp's llama graph rotates.

    heads: their number, head: rows of each, rotated: how many of these, the first ones, are rotated (default: all).
    """

    def rows(s: Sizes) -> NDArray[np.int64]:
        n, dim = size(heads, s), size(head, s)
        turned = size(rotated, s) if rotated else dim
        of_head = np.arange(dim, dtype=np.int64)
        of_head[:turned] = of_head[:turned].reshape(2, turned // 2).T.reshape(-1)
        return (np.arange(n, dtype=np.int64)[:, None] * dim + of_head).reshape(-1)

    return rows
