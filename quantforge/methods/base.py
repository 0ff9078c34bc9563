"""What a method is: choose a codec's codes for a matrix, knowing what calibration saw. And the registry of
methods: modules of this package are discovered, third parties `register` or use the entry points `quantforge.methods`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from ..arrays import Parts
from ..codecs import Codec
from ..discovery import Registry
from ..errors import CalibrationError, NonFiniteError, RecipeError, UnsupportedError

_TRIES = 6
_DOUBLE = 4096


@dataclass(frozen=True, slots=True)
class Stats:
    """Second moments of the inputs x of a matrix over calibration tokens."""

    hessian: torch.Tensor
    """2·mean x xᵀ: f32[in, in]."""
    tokens: int
    shift: torch.Tensor | None = None
    """2·mean (x₀ − x) xᵀ: f32[in, in], x₀ the input in the unquantized model; None: x = x₀."""
    drift: torch.Tensor | None = None
    """2·mean (x₀ − x)(x₀ − x)ᵀ: f32[in, in], where errors are measured."""

    @property
    def importance(self) -> torch.Tensor:
        """Mean x²: f32[in]."""
        return self.hessian.diagonal() / 2


def output_error(w: torch.Tensor, quantized: torch.Tensor, stats: Stats) -> float:
    """How far outputs are from the unquantized model's, relative: mean ‖ŵx − wx₀‖² / mean ‖wx₀‖².

    Without shift: ‖(ŵ − w)x‖² / ‖wx‖². w, quantized: f32[out, in].
    """
    return output_errors(w, [quantized], stats)[0]


def output_errors(w: torch.Tensor, quantized: Iterable[torch.Tensor], stats: Stats) -> list[float]:
    """`output_error` of several, with the work that they share done once."""

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum(dtype=torch.float64))

    h, moved, drift = stats.hessian, None, 0.0
    if stats.shift is not None and stats.drift is not None:  # of x₀x₀ᵀ = (x + (x₀ − x))(x + (x₀ − x))ᵀ
        moved, drift = w @ stats.shift, dot(w @ stats.drift, w)
    norm = dot(w @ h, w) + drift + (0.0 if moved is None else 2 * dot(moved, w))
    found = []
    for q in quantized:
        d = q - w
        error = dot(d @ h, d) + drift - (0.0 if moved is None else 2 * dot(moved, d))
        found.append(max(error, 0.0) / norm if norm > 0 else 0.0)
    return found


def factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """U upper with (H + damping·mean(diag H))⁻¹ = UᵀU, and the columns that no input reaches.

    In f64, or f32 above 4096 columns. Damping grows tenfold, up to 6 times, until there is a factor.
    Raises CalibrationError, NonFiniteError.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()) or not bool(torch.isfinite(hessian.sum())):
        raise NonFiniteError("the calibration inputs are not finite", ())
    dead = diagonal <= 0
    if bool(dead.all()):
        raise CalibrationError("every calibration input is 0")
    mean = float(diagonal[~dead].mean())
    for _ in range(_TRIES):
        h = hessian.to(torch.float64 if len(hessian) <= _DOUBLE else torch.float32, copy=True)
        h[dead, dead] = mean
        h.diagonal().add_(damping * mean)
        lower, bad = torch.linalg.cholesky_ex(h)
        del h
        if not int(bad):
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(bad) and bool(torch.isfinite(upper.sum())):
                return upper, dead
        damping = max(damping, 1e-4) * 10
    raise CalibrationError(f"the Hessian has no Cholesky factor even with damping {damping / 10:g}; calibrate with more text")


def aim(w: torch.Tensor, shift: torch.Tensor, upper: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The weights that give the unquantized model's outputs for the inputs at hand: w′ = w(1 + S H⁻¹), H⁻¹ = UᵀU in `order`."""
    if len(w) > len(upper):  # n³ costs less than out · n²
        moved = w.to(upper.dtype) @ (shift[:, order].to(upper.dtype) @ upper.T @ upper)
    else:
        moved = (w @ shift)[:, order].to(upper.dtype) @ upper.T @ upper
    w = w.clone()
    w[:, order] += moved.float()
    return w


@runtime_checkable
class Method(Protocol):
    """A way to choose codes. Stateless; options are constructor arguments."""

    @property
    def name(self) -> str:
        """As in --method."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """What it uses of calibration, of {"importance", "hessian", "inputs"}."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """What a checkpoint's config should say of it, in AutoGPTQ's words: "desc_act", "damp_percent", ..."""
        ...

    def takes(self, codec: Codec) -> bool:
        """True if it can choose this codec's codes."""
        ...

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """Stored parts of w: f32[out, in]. Raises ShapeError, NonFiniteError, CalibrationError."""
        ...


_M = TypeVar("_M", bound="Method")


def _check(given: Any) -> Method:
    method = given() if isinstance(given, type) else given
    if not isinstance(method, Method):
        lacks = [n for n in ("name", "needs", "settings", "takes", "quantize") if not hasattr(method, n)]
        raise UnsupportedError(f"{given!r} is no method: it lacks {', '.join(lacks)}")
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
    method = name
    if isinstance(name, str):
        try:
            method = _registry.get(name)
        except UnsupportedError as e:
            raise RecipeError(str(e)) from None
    assert not isinstance(method, str)
    for option, value in options.items():
        if value is None:
            continue
        found = _with(method, option, value)
        if found is None:
            have = [m for m in names() if _with(_registry.get(m), option, value) is not None]
            raise RecipeError(f"--{option.replace('_', '-')} goes with --method {' or '.join(have)}, not {method.name}")
        method = found
    return method


def _with(method: Method, option: str, value: Any) -> Method | None:
    """The method with an option set; None if it has no such option."""
    inner = getattr(method, "inner", None)
    if any(f.name == option for f in fields(method)):  # type: ignore[arg-type]
        return replace(method, **{option: value})  # type: ignore[type-var]
    changed = None if inner is None else _with(get(inner), option, value)
    return None if changed is None else replace(method, inner=changed)  # type: ignore[type-var]
