"""What follows from second moments of a matrix's inputs: the inverse Hessian's factor, weights that undo earlier errors."""

from __future__ import annotations

import torch

from ...errors import CalibrationError, NonFiniteError

_TRIES = 6
_DOUBLE = 4096


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


def aim(w: torch.Tensor, shift: torch.Tensor, upper: torch.Tensor, order: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """The weights that give the unquantized model's outputs for the inputs at hand: w′ = w(1 + S H⁻¹), H⁻¹ = UᵀU in `order`."""
    if len(w) > len(upper):  # n³ costs less than out · n²
        moved = w.to(upper.dtype) @ (shift[:, order].to(upper.dtype) @ upper.T @ upper)
    else:
        moved = (w @ shift)[:, order].to(upper.dtype) @ upper.T @ upper
    w = w.clone()
    w[:, order] += moved.float()
    return w
