"""What transformers makes the parameters of a module of: its own renamings and conversions, read as rows of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch

from ..archs.names import canonical
from ..archs.weight import Shape, Weight, gathered, rows_of, width
from ..arrays import F32
from ..errors import ShapeError

_MOVES_ROWS = {
    "Chunk", "Concatenate", "ErnieFuseAndSplitTextVisionExperts", "Interleave", "MergeModulelist", "PermuteForRope", "Split",
    "SplitModulelist", "Transpose",
}  # fmt: skip
"""Operations that change no number, and move numbers within a row only if they transpose; others are run on numbers."""


@dataclass(frozen=True, eq=False)
class Conversion:
    """Parameters that transformers computes from tensors of a checkpoint, in another way than by moving rows."""

    module: Any
    converter: Any
    """A WeightConverter of transformers."""
    first: str
    """The parameter that its names are expanded from."""
    inputs: Mapping[str, list[str]]
    """Pattern of the converter -> the checkpoint's tensors."""
    target: str
    shape: Shape

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors."""
        return tuple(n for names in self.inputs.values() for n in names)

    def apply(self, read: Callable[[str], F32]) -> F32:
        """The parameter; read: a checkpoint tensor by its name."""
        given = {k: [torch.from_numpy(np.ascontiguousarray(read(n))) for n in names] for k, names in self.inputs.items()}
        made = _convert(self.module, self.converter, self.first, given)
        return np.ascontiguousarray(made[self.target].numpy(), np.float32)


Origin: TypeAlias = Weight | Conversion


def saved_shapes(module: Any) -> dict[str, Shape]:
    """Names and shapes of a module's tensors as transformers saves them: as releases have them, tied copies left out."""
    from transformers.core_model_loading import revert_weight_conversion

    seen: set[int] = set()
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = torch.empty(value.shape, device="meta")
    return {k: tuple(v.shape) for k, v in revert_weight_conversion(module, state).items()}


def origins(module: Any, shapes: Mapping[str, Shape]) -> dict[str, Origin]:
    """Parameter or buffer of the module -> what it is made of, for all that the tensors of a checkpoint have.

    shapes: of the checkpoint's tensors. Its names may be any that transformers loads, and those of a model around
    this one. Raises ShapeError where tensors that belong together do not fit.
    """
    by_name: dict[str, Origin] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name, target, converter, pattern in _resolved(module, shapes):
        if converter is None:
            by_name.setdefault(target, Weight.of(target, shapes[name], name))
        else:
            groups.setdefault(target, (converter, {}))[1].setdefault(pattern, []).append(name)
    for first, (converter, inputs) in groups.items():
        by_name.update(_traced(module, converter, first, inputs, shapes))
    return by_name


def _resolved(module: Any, names: Iterable[str]) -> Iterable[tuple[str, str, Any, str]]:
    """(tensor of the checkpoint, parameter, converter or None, its pattern), in the order in which transformers loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(module)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = module.state_dict(keep_vars=True)

    def look(name: str) -> tuple[str, Any, str] | None:
        for some in ((renamings, converters), ([], [])):
            target, pattern = rename_source_key(name, *some, module.base_model_prefix, state)
            if target in state:
                return target, by_pattern.get(str(pattern)), str(pattern)
        return None

    ordered = sorted(names, key=dot_natural_key)
    looked_up = {n: look(n) for n in ordered}
    if not all(looked_up.values()):  # perhaps a part of a larger model
        spelled = canonical(ordered, {*state, *saved_shapes(module)})
        looked_up |= {n: look(spelled[n]) for n in ordered if looked_up[n] is None and n in spelled}
    for name in ordered:
        if (hit := looked_up[name]) is not None:
            yield name, *hit


def _convert(module: Any, converter: Any, first: str, given: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    again = deepcopy(converter)
    again.collected_tensors = dict(given)
    made = again.convert(first, model=module, config=module.config)
    return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}


def _traced(
    module: Any, converter: Any, first: str, inputs: Mapping[str, list[str]], shapes: Mapping[str, Shape]
) -> dict[str, Origin]:
    """Where the rows of each parameter come from: transformers' own operations on numbers of rows in the place of rows."""
    names = [n for some in inputs.values() for n in some]
    try:
        like = {k: [torch.empty(shapes[n], device="meta") for n in some] for k, some in inputs.items()}
        made = {k: tuple(v.shape) for k, v in _convert(module, converter, first, like).items()}
    except (RuntimeError, ValueError, IndexError) as e:
        kinds = ", ".join(str(list(s)) for s in dict.fromkeys(shapes[n] for n in names))
        raise ShapeError(f"{first}: tensors of shapes {kinds} cannot be joined ({str(e).splitlines()[0]})") from None
    result: dict[str, Origin] = {k: Conversion(module, converter, first, inputs, k, s) for k, s in made.items()}
    simple = all(type(op).__name__ in _MOVES_ROWS and not getattr(op, "check_dims", False) for op in converter.operations)
    vectors = all(len(s) == 1 for s in (*(shapes[n] for n in names), *made.values()))
    if not simple or (len({s[-1] for s in (shapes[n] for n in names)}) > 1 and not vectors):
        return result
    begin, probes = 0, {}
    for name in names:
        outer = shapes[name] if vectors else (*shapes[name][:-1], 1)
        probes[name] = torch.arange(begin, begin + prod(outer)).reshape(outer)
        begin += prod(outer)
    try:
        traced = _convert(module, converter, first, {k: [probes[n] for n in some] for k, some in inputs.items()})
    except (RuntimeError, ValueError, IndexError):
        return result
    counts = {n: p.numel() for n, p in probes.items()}
    for target, rows in traced.items():
        shape, at = made[target], tuple(rows.shape)
        high = shapes[names[0]][-1]
        order = rows.reshape(-1).numpy()
        if vectors or (at == (*shape[:-1], 1) and high == width(shape)):
            result[target] = gathered(target, shape, counts, order)
        elif len(shape) > 1 and at == (*shape[:-2], 1, shape[-1]) and high == shape[-2]:
            result[target] = gathered(target, shape, counts, order, groups=rows_of(shape) // shape[-2])
    return result
