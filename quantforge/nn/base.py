"""Arrays as torch tensors."""

from __future__ import annotations

import numpy as np
import torch

from ..arrays import BF16, Array


def tensor(part: Array) -> torch.Tensor:
    """A copy of an array as a torch tensor: of the same dtype, or of bytes where not all of torch knows it (fp8, U16)."""
    fresh = np.array(part, order="C")
    if fresh.dtype == BF16:
        return torch.from_numpy(fresh.view(np.int16)).view(torch.bfloat16)
    known = fresh.dtype.isbuiltin == 1 and (fresh.dtype.kind in "fi" or fresh.dtype == np.uint8)
    return torch.from_numpy(fresh if known else fresh.view(np.uint8))
