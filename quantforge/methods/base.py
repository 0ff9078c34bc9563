"""What a method is: choose a codec's codes for a matrix, knowing what calibration saw. And the registry of
methods: modules of this package are discovered, third parties `register` or use the entry points `quantforge.methods`.

Nothing here, nor in the modules that register methods, imports torch before a method works: see `numerics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..arrays import Parts
from ..codecs import Codec
from ..discovery import Registry
from ..errors import CalibrationError, RecipeError, UnsupportedError

if TYPE_CHECKING:
    import torch

NEEDS = frozenset({"importance", "hessian", "inputs"})
"""What calibration can gather for a method."""


class Stats:
    """What calibration saw of the inputs x of a matrix: as much of it as was asked for, see `Method.needs`."""

    def __init__(
        self,
        hessian: torch.Tensor | None,
        tokens: int,
        shift: torch.Tensor | None = None,
        drift: torch.Tensor | None = None,
        *,
        importance: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
    ) -> None:
        """importance may be left out where it follows from the Hessian or the inputs."""
        self.tokens = tokens
        self.shift = shift
        """2·mean (x₀ − x) xᵀ: f32[in, in], x₀ the input in the unquantized model; None: x = x₀, or no Hessian."""
        self.drift = drift
        """2·mean (x₀ − x)(x₀ − x)ᵀ: f32[in, in], where errors are measured."""
        self._hessian, self._importance, self._inputs = hessian, importance, inputs

    @property
    def hessian(self) -> torch.Tensor:
        """2·mean x xᵀ: f32[in, in]. Raises CalibrationError where it was not gathered, as the next two do."""
        return _gathered("hessian", self._hessian)

    @property
    def importance(self) -> torch.Tensor:
        """Mean x²: f32[in]."""
        if self._hessian is not None:
            return self._hessian.diagonal() / 2
        if self._importance is None and self._inputs is not None:
            return self._inputs.square().mean(0)
        return _gathered("importance", self._importance)

    @property
    def inputs(self) -> torch.Tensor:
        """x: f32[tokens, in]."""
        return _gathered("inputs", self._inputs)

    def reordered(self, order: torch.Tensor) -> Stats:
        """The same of inputs whose columns are taken in an order: int[in]."""
        hessian, shift, drift = (None if h is None else h[order][:, order] for h in (self._hessian, self.shift, self.drift))
        importance = None if self._importance is None else self._importance[order]
        inputs = None if self._inputs is None else self._inputs[:, order]
        return Stats(hessian, self.tokens, shift, drift, importance=importance, inputs=inputs)


def _gathered(what: str, gathered: torch.Tensor | None) -> torch.Tensor:
    if gathered is None:
        raise CalibrationError(f'calibration gathered no {what}: a method that uses it names it, needs = {{"{what}"}}')
    return gathered


def output_error(w: torch.Tensor, quantized: torch.Tensor, stats: Stats) -> float:
    """How far outputs are from the unquantized model's, relative: mean ‖ŵx − wx₀‖² / mean ‖wx₀‖².

    Without shift: ‖(ŵ − w)x‖² / ‖wx‖². w, quantized: f32[out, in]; of stats, the Hessian.
    """
    return output_errors(w, [quantized], stats)[0]


def output_errors(w: torch.Tensor, quantized: Iterable[torch.Tensor], stats: Stats) -> list[float]:
    """`output_error` of several, with the work that they share done once."""
    from torch import float64

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum(dtype=float64))

    h, moved, drift = stats.hessian, None, 0.0
    if stats.shift is not None and stats.drift is not None:  # of x₀x₀ᵀ = (x + (x₀ − x))(x + (x₀ − x))ᵀ
        moved, drift = w @ stats.shift, dot(w @ stats.drift, w)
    norm = dot(w @ h, w) + drift + (0.0 if moved is None else 2 * dot(moved, w))
    errors = []
    for q in quantized:
        d = q - w
        error = dot(d @ h, d) + drift - (0.0 if moved is None else 2 * dot(moved, d))
        errors.append(max(error, 0.0) / norm if norm > 0 else 0.0)
    return errors


class Group(Protocol):
    """Matrices of a block that share an input whose columns can be scaled, because what makes the input can undo it."""

    matrices: Sequence[torch.Tensor]
    """Copies as they are now: f32[out, in] each."""
    codecs: Sequence[Codec]
    """What each of them will be rounded to."""

    @property
    def importance(self) -> torch.Tensor:
        """Mean x² on the windows that choose: f32[in]."""
        ...

    @property
    def loss(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """Mean squared error of the block's output if other matrices stood there, on the windows that choose."""
        ...

    @property
    def judge(self) -> Callable[[Sequence[torch.Tensor]], float]:
        """The same on windows that did not choose."""
        ...

    def share(self, s: torch.Tensor) -> torch.Tensor:
        """f32[in] made equal where it has to be (one value head feeds several query heads), by the largest."""
        ...

    def scale(self, s: torch.Tensor) -> None:
        """Multiply the columns of the matrices by s: f32[in], of `share`, and divide what feeds them."""
        ...


class Block(Protocol):
    """A decoder block before its matrices are quantized, as `Method.prepare` may change it."""

    def groups(self) -> Iterator[Group]:
        """What can be scaled, one after the other: each as the ones before have left it."""
        ...


class Method(ABC):
    """A way to choose codes. Stateless; options are fields of a frozen dataclass.

    Subclasses set `name` and implement `quantize`: that is all a method needs.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """As in --method, and in reports."""

    @property
    def needs(self) -> AbstractSet[str]:
        """What is gathered for it, of `NEEDS`: mean x², 2·mean x xᵀ, x itself. Nothing: it gets no `Stats`, is judged by
        nothing and always used; else of each matrix the better of its result and rtn's on held-out windows is kept."""
        return frozenset({"importance"})

    @property
    def one_pass(self) -> bool:
        """Whether all inputs of a block are gathered before any of its matrices is quantized; else each matrix is
        calibrated on what those that run before it have become."""
        return False

    @property
    def rewrite(self) -> str:
        """What reports call a matrix that `prepare` changed and that was then rounded as usual."""
        return self.name

    def settings(self) -> Mapping[str, Any]:
        """What a checkpoint's config should say of it, in AutoGPTQ's words: "desc_act", "damp_percent", ..."""
        return {}

    def takes(self, codec: Codec) -> bool:
        """True if it can choose this codec's codes; matrices of other types are rounded as usual."""
        return codec.encodes

    def prepare(self, block: Block) -> None:
        """Change a block so that it computes the same and quantizes better, before any of its matrices is quantized."""
        return

    @abstractmethod
    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """Stored parts of w: f32[out, in]. Raises ShapeError, NonFiniteError, CalibrationError."""


_M = TypeVar("_M", bound="Method | type[Method]")


def _check(given: Any) -> Method:
    try:
        method = given() if isinstance(given, type) else given
    except TypeError as e:  # abstract, or with options that have no default
        raise UnsupportedError(f"{given.__qualname__} is no method: {e}") from None
    if not isinstance(method, Method):
        raise UnsupportedError(f"{given!r} is no method: derive it from quantforge.methods.Method")
    if unknown := set(method.needs) - NEEDS:
        raise UnsupportedError(f"method {method.name} needs {', '.join(sorted(unknown))}; there are {', '.join(sorted(NEEDS))}")
    return method


_registry: Registry[Method] = Registry(__package__, "method", _check)


def register(method: _M) -> _M:
    """Make a method known by its name. Takes an instance or a class. Raises UnsupportedError if another one has that name."""
    _registry.register(method)
    return method


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_registry.all())


def get(name: str | Method, **options: Any) -> Method:
    """The method of that name (any case), with fields of it, or of its `inner` method, set to options that are not None.

    Raises RecipeError naming the known ones, or the methods that have an option.
    """
    try:
        method = _registry.get(name) if isinstance(name, str) else _check(name)
    except UnsupportedError as e:
        raise RecipeError(str(e)) from None
    for option, value in options.items():
        if value is None:
            continue
        chosen = _with(method, option, value)
        if chosen is None:
            have = [m for m in names() if _with(_registry.get(m), option, value) is not None]
            raise RecipeError(f"--{option.replace('_', '-')} goes with --method {' or '.join(have)}, not {method.name}")
        method = chosen
    return method


def _with(method: Method, option: str, value: Any) -> Method | None:
    """The method with an option set; None if it has no such option."""
    inner = getattr(method, "inner", None)
    if not is_dataclass(method):
        return None
    if any(f.name == option for f in fields(method)):
        return replace(method, **{option: value})
    changed = None if inner is None else _with(get(inner), option, value)
    return None if changed is None else replace(method, inner=changed)
