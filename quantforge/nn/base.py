"""Arrays as torch tensors."""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np
import torch

from ..arrays import BF16, Array

_ROOM = 64 << 20
_open: tuple[weakref.ref[mmap.mmap] | None, int] = (None, 0)  # the room in use, and how much of it is taken
_taking = threading.Lock()


def _huge(nbytes: int) -> Array:
    """u8[nbytes] in huge pages, where the system has them: a product reads all of a matrix once, and small pages cost it
    a third of its speed. Matrices share rooms of memory, which are freed with the last one in them.
    """
    global _open
    with _taking:
        room, at = _open[0]() if _open[0] else None, _open[1]
        if room is None or at + nbytes > len(room):
            room, at = mmap.mmap(-1, max(_ROOM, nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
            if hasattr(mmap, "MADV_HUGEPAGE"):
                room.madvise(mmap.MADV_HUGEPAGE)
        _open = weakref.ref(room), at + -(-nbytes // 64) * 64
    return np.frombuffer(room, np.uint8, nbytes, at)


def tensor(part: Array) -> torch.Tensor:
    """A copy of an array as a torch tensor: of the same dtype, or of bytes where not all of torch knows it (fp8, U16)."""
    fresh = _huge(part.nbytes).view(part.dtype).reshape(part.shape) if part.nbytes else np.empty(part.shape, part.dtype)
    fresh[...] = part
    if fresh.dtype == BF16:
        return torch.from_numpy(fresh.view(np.int16)).view(torch.bfloat16)
    known = fresh.dtype.isbuiltin == 1 and (fresh.dtype.kind in "fi" or fresh.dtype == np.uint8)
    return torch.from_numpy(fresh if known else fresh.view(np.uint8))
