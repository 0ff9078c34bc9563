"""Devices by name, and encoding and decoding on a CUDA device: `convert --device cuda`, `quantize` of CUDA tensors.

The kernels are the CPU's algorithms (kernels/cuda/encode.cuh): the bytes are the same. In a
conversion, weights go up as they are stored (bf16 is half of f32's bytes), become f32 there, and
their codes come back. Threads share a few slots, each a stream and pinned memory of its own, so
that copies in both directions and kernels overlap.
"""

from __future__ import annotations

import logging
import queue
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import codecs, native
from .arrays import BF16, F32, Array, Parts, to_numpy
from .codecs import Codec, Encoded, GridCodec
from .codecs.base import GgmlCodec, check_block, check_importance
from .codecs.iquants import KSIGNS, IQCodec
from .codecs.lattice import LatticeCodec
from .codecs.plain import PlainCodec
from .errors import NativeError, RecipeError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

TILE = 1 << 23
"""Weights encoded at once: 32 MiB of f32, a few waves of blocks on the largest GPUs."""

SLOTS = 8
"""Tiles that may be on the device at a time."""

_FLOATS: dict[np.dtype[Any], str] = {BF16: "bfloat16", np.dtype(np.float16): "float16", np.dtype(np.float32): "float32"}


def available(name: str | torch.device) -> torch.device:
    """The device "cpu", "cuda" or "cuda:N"; the CPU, with a line in the log, where there is no CUDA device.

    Raises RecipeError for another name, or a number that there is not.
    """
    import torch

    name = str(name)
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and number.isdecimal())):
        raise RecipeError(f"--device {name}: cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _on_the_cpu(name, f"torch {torch.__version__} finds no CUDA device here")
        return torch.device("cpu")
    if int(number or 0) >= (devices := torch.cuda.device_count()):
        raise RecipeError(f"--device {name}: CUDA devices here are cuda:0 to cuda:{devices - 1}")
    return torch.device(name)


@cache
def _on_the_cpu(name: str, reason: str) -> None:
    log.warning("--device %s: %s; the CPU does the work", name, reason)


def encoder(name: str, threads: int) -> Encoder | None:
    """What encodes on a device; None where the CPU does, to the same bytes: see `available`, or for lack of kernels."""
    if name == "cpu" or (where := available(name)).type == "cpu":  # without torch, which is slow to import
        return None
    if reason := native.cuda_missing():
        _on_the_cpu(name, reason)
        return None
    return Encoder(where, threads)


def quantize(w: Any, codec: str | Codec, *, importance: Any = None, threads: int = 1) -> Encoded:
    """Quantize one tensor: w: [..., in], NumPy array or torch tensor; importance: f32[in] (mean x²).

    A CUDA tensor is quantized on its device where there is a kernel for the type; the bytes are the same.
    Raises UnsupportedError (unknown codec), ShapeError, NonFiniteError.
    """
    codec = codecs.get(codec)
    if getattr(w, "is_cuda", False) and has_kernel(codec, "encode") and isinstance(codec, GgmlCodec):
        data, bad = encode(codec, w, None if importance is None else to_numpy(importance))
        if not bad.item() and _in_range(codec, parts := {"data": to_numpy(data)}, tuple(w.shape)):
            return Encoded(codec, tuple(w.shape), parts)
    return codecs.quantize(w, codec, importance=importance, threads=threads)


def _in_range(codec: GgmlCodec, parts: Parts, shape: tuple[int, ...]) -> bool:
    """False where an f16 scale has overflowed or been cut off: the CPU's `encode` says where."""
    return all(s.dtype != np.float16 or not ((s.view("<u2") & 0x7FFF) >= 0x7BFF).any() for s in codec.scales(parts, shape))


def has_kernel(codec: Codec, op: str) -> bool:
    """True if a CUDA kernel encodes or decodes ("encode", "decode") that type."""
    lattice = isinstance(codec, LatticeCodec) and op == "encode"  # the CPU's alone
    return isinstance(codec, GgmlCodec) and not lattice and native.cuda_has(codec.name, op)


def encode(codec: GgmlCodec, w: torch.Tensor, importance: F32 | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`codec.encode` of w: [..., in] on its device and current stream, waiting for nothing.

    importance: as there. Returns data: u8[..., row_bytes], and i32[1], not 0 where w is not finite.
    Raises ShapeError, NonFiniteError (importance), NativeError.
    """
    import torch

    check_block(tuple(w.shape), codec)
    w = w.detach().float().contiguous()
    w = w.clone() if w.data_ptr() % 16 else w  # the kernels load vectors
    info = codec.layout(tuple(w.shape))["data"]
    data = torch.empty(info.shape, dtype=torch.uint8, device=w.device)
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    rows, out = w.reshape(-1, w.shape[-1]), data.reshape(-1, info.shape[-1])
    tables = [torch.from_numpy(codec.entries)] if isinstance(codec, IQCodec) else []
    parts = _importance(codec, importance, tuple(w.shape))
    step = rows.shape[0] // len(parts) if parts else 0
    for i, q in enumerate(parts):
        span = slice(i * step, (i + 1) * step)
        inputs = [rows[span], *([] if q is None else [torch.from_numpy(q).to(w.device)]), *tables]
        launch(codec.name, "encode", inputs, [out[span], bad], w.device)
    return data, bad


def _importance(codec: GgmlCodec, importance: F32 | None, shape: tuple[int, ...]) -> list[Array | None]:
    """What the kernel gets beside each of as many equal parts of the rows: f32[in], or for IQ types f32[rows, in]."""
    none = np.empty(0, np.float32) if isinstance(codec, IQCodec) else None
    if importance is None or not codec.takes_importance:
        return [none]
    q = np.asarray(importance, np.float32)
    if isinstance(codec, IQCodec) and q.shape == shape:
        return [np.array(check_importance(q.reshape(1, -1), (1, q.size), codec)).reshape(-1, shape[-1])]
    return [np.array(one) for one in check_importance(q, shape, codec)]


def decode(codec: GgmlCodec, data: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`codec.decode` of data: u8[..., row_bytes], on its device and current stream: f32[shape]."""
    import torch

    w = torch.empty(shape, dtype=torch.float32, device=data.device)
    rows = w.reshape(-1, shape[-1])
    tables = [torch.from_numpy(np.array(t)) for t in (codec.entries, KSIGNS)] if isinstance(codec, IQCodec) else []
    launch(codec.name, "decode", [data.reshape(len(rows), -1), *tables], [rows], data.device)
    return w


def decode_on(e: Encoded, device: torch.device) -> torch.Tensor:
    """`e.decode()` on a device: f32[shape]. On CUDA by a kernel or the codec's grid, where there is one; the same bits."""
    import torch

    if device.type == "cuda" and isinstance(e.codec, GgmlCodec) and has_kernel(e.codec, "decode"):
        return decode(e.codec, torch.from_numpy(e.parts["data"]).to(device), e.shape)
    if device.type == "cuda" and isinstance(e.codec, GridCodec) and len(e.shape) == 2:
        codes, params = e.codec.unpack(e.parts, (e.shape[0], e.shape[1]))
        return e.codec.expand(codes.to(device), {k: p.to(device) for k, p in params.items()})
    return torch.from_numpy(e.decode()).to(device)


def launch(codec: str, op: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor], device: torch.device) -> None:
    """Run a kernel of the CUDA library on a device's current stream; see `native.cuda_call`."""
    import torch

    if device.type != "cuda":  # kernels that are emulated, in the tests
        return native.cuda_call(codec, op, inputs, outputs, 0)
    with torch.cuda.device(device):
        native.cuda_call(codec, op, inputs, outputs, torch.cuda.current_stream().cuda_stream)


class Encoder:
    """Encodes tiles on a device, for any number of threads."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(max(2, min(threads, SLOTS))):
            self._slots.put(_Slot(self._device))

    def encode(self, codec: GgmlCodec, w: Encoded | F32, importance: F32 | None) -> Parts | None:
        """Parts of w: [..., in], f32 or stored; None where w is not finite or too large (the CPU's `encode` says where).

        Raises NativeError for an error of the device.
        """
        slot = self._slots.get()
        try:
            return slot.encode(codec, w, importance)
        except RuntimeError as e:  # torch's, out of memory among them
            reason = str(e).partition("\n")[0]
            raise NativeError(f"{self._device}: encoding {codec.name} failed: {reason}; --device cpu does without") from None
        finally:
            self._slots.put(slot)


class _Slot:
    """A stream and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.up = self.down = torch.empty(0, dtype=torch.uint8)

    def encode(self, codec: GgmlCodec, w: Encoded | F32, importance: F32 | None) -> Parts | None:
        import torch

        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            data, bad = encode(codec, self._weights(w), importance)
            self.down = self._room(self.down, data.numel())
            back = self.down[: data.numel()]
            back.copy_(data.reshape(-1), non_blocking=True)
            if bad.item():  # waits for the stream
                return None
        parts = {"data": back.numpy().reshape(data.shape).copy()}
        return parts if _in_range(codec, parts, tuple(w.shape)) else None

    def _weights(self, w: Encoded | F32) -> torch.Tensor:
        """w on the device: f32[..., in]."""
        import torch

        if not isinstance(w, Encoded):
            return self._send(w).view(torch.float32).reshape(w.shape)
        codec, shape = w.codec, w.shape
        if isinstance(codec, PlainCodec) and codec.dtype in _FLOATS:
            return self._send(w.parts["data"]).view(getattr(torch, _FLOATS[codec.dtype])).float().reshape(shape)
        if isinstance(codec, GgmlCodec) and has_kernel(codec, "decode"):
            return decode(codec, self._send(w.parts["data"]), shape)
        return self._weights(w.decode())

    def _send(self, a: Array) -> torch.Tensor:
        """The bytes of an array, on the device."""
        import torch

        raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        self.up = self._room(self.up, raw.size)
        np.copyto(self.up.numpy()[: raw.size], raw)
        sent = torch.empty(raw.size, dtype=torch.uint8, device=self.device)
        return sent.copy_(self.up[: raw.size], non_blocking=True)

    def _room(self, have: torch.Tensor, n: int) -> torch.Tensor:
        import torch

        return have if have.numel() >= n else torch.empty(n, dtype=torch.uint8, pin_memory=self.stream is not None)
