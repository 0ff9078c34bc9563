"""AWQ's trials: weights as they are after scaling and rounding, and the range of each group that errs least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...arrays import Parts
from ...codecs import Codec
from ...codecs.base import Encoded
from ..base import Stats

_CLIPS = tuple(1 - i / 20 for i in range(13))


def clipped(w: torch.Tensor, codec: Codec, stats: Stats) -> tuple[torch.Tensor, Parts]:
    """w with the largest weights of every group of columns cut to a part of their magnitude, and its codes.

    Of every group of every row the part, 1 to 0.4, and the codec's encoding, without or with importance, that make the
    output error d H dᵀ smallest: d the errors of the groups before, already chosen, and its own. w: f32[out, in].
    Groups are the codec's blocks, or rows; of codecs whose rows share something (NVFP4's scale) nothing is cut off.
    """
    if not codec.row_local:
        return w, codec.encode(w.cpu().numpy(), stats.importance.cpu().numpy())
    n = w.shape[1]
    size = codec.block_size if 1 < codec.block_size < n else n
    importance = stats.importance.cpu().numpy()
    best, errors, chunks = w.clone(), torch.zeros_like(w), []
    for first in range(0, n, size):
        span = slice(first, first + size)
        x, h = w[:, span], stats.hessian[:, span]
        before, largest = 2 * (errors[:, :first] @ h[:first]), x.abs().amax(1, keepdim=True)
        least = torch.full_like(largest, float("inf"))
        chosen: Parts = {}
        for part, weighted in _trials(codec):
            trial = x.clamp(-largest * part, largest * part)
            parts = codec.encode(trial.contiguous().cpu().numpy(), importance[span] if weighted else None)
            d = torch.from_numpy(codec.decode(parts, tuple(x.shape))).to(w) - x
            error = ((d @ h[span] + before) * d).sum(1, keepdim=True)
            better = error < least
            least = error.minimum(least)
            best[:, span] = torch.where(better, trial, best[:, span])
            errors[:, span] = torch.where(better, d, errors[:, span])
            rows = better.cpu().numpy()
            chosen = {k: np.where(rows.reshape(-1, *[1] * (p.ndim - 1)), p, chosen.get(k, p)) for k, p in parts.items()}
        chunks.append(chosen)
    return best, {k: np.concatenate([c[k] for c in chunks], -1) for k in chunks[0]}


def _trials(codec: Codec) -> list[tuple[float, bool]]:
    """(part that is left of the largest weight, with importance): encoders that know importance search ranges themselves."""
    if codec.needs_importance:
        return [(part, True) for part in _CLIPS]
    return [(part, False) for part in _CLIPS] + [(part, True) for part in _CLIPS[:7:2]]


def magnitudes(ws: Sequence[torch.Tensor], codecs: Sequence[Codec]) -> torch.Tensor:
    """Mean over all rows of |w| relative to the largest in its group, f32[in]; at least a hundredth."""
    means = []
    for w, codec in zip(ws, codecs, strict=True):
        size = codec.block_size if codec.block_size > 1 else w.shape[1]
        groups = w.abs().reshape(len(w), -1, size)
        means.append((groups / groups.amax(-1, keepdim=True).clamp_min(1e-30)).reshape(w.shape))
    return torch.cat(means).mean(0).clamp_min(0.01)


def rounded(w: torch.Tensor, codec: Codec, importance: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """w as it is after scaling by s, rounding and scaling back."""
    parts = codec.encode((w * s).cpu().numpy(), (importance / s**2).cpu().numpy() if codec.needs_importance else None)
    return torch.from_numpy(Encoded(codec, tuple(w.shape), parts).decode()).to(w) / s
