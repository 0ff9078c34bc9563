"""What a codec is: numbers to stored bytes and back, knowing neither files nor models. And the
registry of codecs: modules of this package are discovered, third parties `register` or use the
entry-point group `quantforge.codecs`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import gguf
import numpy as np

from .. import native
from ..arrays import F32, Array, Parts, TensorInfo, empty, is_finite, to_numpy
from ..discovery import Registry
from ..errors import NonFiniteError, RangeError, ShapeError, UnsupportedError, nearest
from .grid import AffineGrid, Spacing
from .spoken import meant

if TYPE_CHECKING:
    import torch

_F16_MAX = 65504
_NO_SCALE_REACHES = 1e9  # Q6_K's 65504 · 127 · 32 is the most

DECODED_AT_ONCE = 1 << 20
"""Weights that exist as f32 together in a product with a codec that has no kernel for it."""

Params: TypeAlias = "dict[str, torch.Tensor]"
Codes: TypeAlias = "torch.Tensor"


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Numbers step · (code − zero), code in 0..hi."""

    hi: int
    zero: int | None
    """The same for all weights; None: stored per group."""
    group: int
    """Columns that share a step; 0: whole rows."""
    real: bool = False
    """True where what is stored is not `zero` but step · zero, as a real number."""
    step: str = "f16"
    """What steps are stored as: "f16", "bf16" or "f32"."""
    whole: bool = False
    """One step (and zero) for the whole tensor: others can take its integers over, it cannot take theirs."""


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix on an `IntegerGrid`: codes u8[out, in], step f32[out, groups], zero u8[out, groups]."""

    codes: Array
    step: F32
    zero: Array


class Codec(ABC):
    """A way to store a tensor of weights. Stateless: one shared instance per name.

    Subclasses set `name` and `block_size` and implement `layout`, `encode` and `decode`;
    that is all a custom quantizer needs.
    """

    name: str
    """ggml's spelling for ggml types ("Q4_K"), else like "int4-g128-sym"."""
    block_size: int = 1
    """Weights per parameter set, along the last axis."""
    short_blocks: bool = False
    """True where the last block of a row may have fewer weights."""
    ggml_type: int | None = None
    """Type id in GGUF files; None: no GGUF file can hold this codec."""
    needs_importance: bool = False
    """True where llama.cpp refuses to encode without importance."""
    encodes: bool = True
    """False where only decoding is possible."""
    ggml_bytes: bool = False
    """True if `encode` gives, byte for byte, what ggml's x86-64 default build writes."""
    row_local: bool = False
    """True if the parts of rows a:b depend on rows a:b alone and every part has the tensor's
    leading axes, so that tensors can be encoded in tiles of rows, in parallel."""
    shared: frozenset[str] = frozenset()
    """Of a codec that is not row-local: the parts that all rows need, if the others have the
    tensor's leading axes, so that rows can be decoded alone."""
    virtual: bool = False
    """True of numbers that are computed while they are read: neither files nor layers hold them so."""
    integers: IntegerGrid | None = None
    """The evenly spaced numbers that are stored, if that is what this codec stores."""

    @property
    def sliceable(self) -> bool:
        """True if `Encoded.rows` can take rows out without decoding."""
        return self.row_local or bool(self.shared)

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """The codes of a codec whose `integers` are not offset by a real number."""
        raise NotImplementedError(self.name)

    def from_integers(self, codes: Integers) -> Parts:
        """Inverse of `to_integers`, for any codes that `repacks` says fit."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """The exact dtype and shape of each part for a tensor of `shape`; needs no data.

        Raises ShapeError where the codec cannot hold that shape.
        """

    @abstractmethod
    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Quantize. w: f32[..., in]; importance: f32[in] or broadcastable to w (mean x²).

        Raises ShapeError, NonFiniteError (NaN or infinity in w).
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """The numbers that `parts` stand for: f32[shape]."""

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ for a matrix w of `shape` (out, in): f32[m, in] -> f32[m, out], however many `threads`.

        activations: "int8" rounds x to 8 bits, in the codecs that have a kernel for that. Here some rows at a time
        are decoded and multiplied.
        """
        out, n = shape
        y = empty((len(x), out), np.float32)
        whole = Encoded(self, shape, parts)
        step = max(1, DECODED_AT_ONCE // max(1, n)) if self.sliceable else max(1, out)
        for a in range(0, out, step):
            w = (whole.rows(slice(a, a + step)) if step < out else whole).decode(threads=threads)
            some = empty((len(x), len(w)), np.float32)
            native.matmul("F32", "matmul", x, [np.ascontiguousarray(w).view(np.uint8)], some, threads)
            y[:, a : a + step] = some
        return y

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """Views of the floats in `parts` that make weights infinite or NaN if they are: every part of floats, here."""
        return list(parts.values())

    def check_finite(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Raise NonFiniteError if a stored scale is NaN or infinity: for parts that are copied, or repacked, undecoded."""
        for scale in self.scales(parts, shape):
            if not (fine := is_finite(scale)).all():
                index = tuple(int(i) for i in np.unravel_index(int(np.argmin(fine)), scale.shape))
                value = scale[index].astype(np.float32)
                raise NonFiniteError(f"{self.name}: its scale {list(index)} is {value}; the file is damaged or overflowed", ())

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a tensor of `shape`."""
        return sum(info.nbytes for info in self.layout(shape).values())

    def __repr__(self) -> str:
        return f"<codec {self.name}>"


class GridCodec(Codec):
    """A codec whose codes can be chosen a few columns at a time, on torch tensors (CPU or CUDA).

    What error-feedback and learned methods need: fix the block parameters with `fit`, then
    `round` columns one vector at a time while later columns are still changing.
    Params (a dict) and Codes hold what is stored, as integers and f16; their leading axis is
    `out`, so that rows can be indexed: `{k: p[rows] for k, p in params.items()}`.
    `at` is a column of the matrix, a multiple of `vector`; blocks may be entered anywhere.
    """

    vector: int = 1
    """Columns that are rounded together: 1, or 4/8 for codebook types."""

    even: bool = False
    """Codes stand for evenly spaced numbers, and `spacing` says for which."""

    @abstractmethod
    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """Choose the parameters (scales, mins) of every block of w: f32[out, in].

        importance: f32[in] or f32[out, in].  Parameters are the *stored* ones: already rounded
        to what the file can hold. Raises ShapeError, NonFiniteError.
        """

    def search(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """`fit` without its checks, for loops on a device: what is evenly spaced does not wait for it. See `verify`."""
        return self.fit(w, importance)

    def verify(self, w: torch.Tensor, params: Params) -> None:
        """Raise RangeError if weights w: f32[out, in] are too large for what `search` has found for them."""
        return

    def spacing(self, params: Params, at: int, n: int) -> Spacing:
        """The numbers of columns at:at+n, where the codec is `even`."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def round(self, w: torch.Tensor, params: Params, at: int = 0) -> Codes:
        """Nearest codes of columns at:at+n under fixed params; w: f32[out, n] -> integers [out, n/vector]."""

    def round_weighted(self, w: torch.Tensor, params: Params, at: int, importance: torch.Tensor) -> Codes:
        """`round`, where columns that share a code count as their importance says: f32[n].

        Only codecs whose `vector` is not 1 can tell the difference.
        """
        return self.round(w, params, at)

    @abstractmethod
    def expand(self, codes: Codes, params: Params, at: int = 0) -> torch.Tensor:
        """f32[out, n]: exactly what `decode` gives for these codes at columns at:at+n."""

    @abstractmethod
    def pack(self, codes: Codes, params: Params) -> Parts:
        """Stored parts of a whole matrix, as NumPy arrays."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> tuple[Codes, Params]:
        """Inverse of `pack`: (codes, params) on the CPU; shape: (out, in)."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A stored tensor in any format: codec, shape and byte parts."""

    codec: Codec
    shape: tuple[int, ...]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(int(p.nbytes) for p in self.parts.values())

    @property
    def bpw(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / max(1, int(np.prod(self.shape, dtype=object)))

    def decode(self, *, threads: int = 1) -> F32:
        """The weights: f32[shape]."""
        return self.codec.decode(self.parts, self.shape, threads=threads)

    def tobytes(self) -> bytes:
        """All parts' bytes, in the codec's order; for ggml types, a GGUF tensor's bytes."""
        return b"".join(np.ascontiguousarray(self.parts[k]).tobytes() for k in self.codec.layout(self.shape))

    def rows(self, rows: slice | Any) -> Encoded:
        """Rows of a 2-D (or 1-D-per-row) tensor of a sliceable codec, without decoding.

        rows: a slice (parts stay views) or an index array over the first axis.
        """
        assert self.codec.sliceable
        shared = self.codec.shared
        parts = {k: p if k in shared else p[rows] for k, p in self.parts.items()}
        n = next(p.shape[0] for k, p in parts.items() if k not in shared)
        return Encoded(self.codec, (n, *self.shape[1:]), parts)

    def flat(self) -> Encoded:
        """The same tensor with all leading axes merged: shape [rows, in] (sliceable codecs)."""
        assert self.codec.sliceable
        n_in = self.shape[-1]
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        parts = {k: p if k in self.codec.shared else p.reshape(rows, -1) for k, p in self.parts.items()}
        return Encoded(self.codec, (rows, n_in), parts)


def repacks(source: Codec, target: Codec, shape: tuple[int, ...]) -> bool:
    """True if `repack` can take a tensor of `shape` from one codec to the other."""
    a, b = source.integers, target.integers
    n = shape[-1] if shape else 0
    if a is None or b is None or a.real or b.whole or not n or (n % target.block_size and not target.short_blocks):
        return False
    # one group takes any finer ones; of several, the last of which may be short, each has to end where a finer one does
    if 0 < a.group < n and (not b.group or a.group % b.group):
        return False
    if b.zero is None:
        return a.hi <= b.hi
    return a.zero is not None and a.zero <= b.zero and a.hi - a.zero <= b.hi - b.zero


def repack(e: Encoded, target: Codec) -> Encoded:
    """The same integers in another codec, never decoded: equal but for the rounding of steps to what it stores.

    e: a matrix for which `repacks` is true.
    """
    integers = e.codec.to_integers(e.parts, e.shape)
    grid = target.integers
    assert grid is not None
    codes, zero = integers.codes, integers.zero
    if grid.zero is not None:
        codes = codes + (grid.zero - zero.flat[0] if zero.size else 0)
        zero = np.full_like(zero, grid.zero)
    n, groups = e.shape[-1], integers.step.shape[-1]
    per = n if groups == 1 else e.codec.integers.group  # type: ignore[union-attr]
    size = min(grid.group or n, n)
    times, wanted = -(-per // size), -(-n // size)
    step, zero = (p.repeat(times, -1)[..., :wanted] for p in (integers.step, zero))
    moved = Integers(codes.astype(np.uint8, copy=False), step, zero)
    return Encoded(target, e.shape, target.from_integers(moved))


def check_weights(w: Any, codec: Codec) -> F32:
    """`w` as contiguous f32 of at least one axis whose length the codec's block divides."""
    w = to_numpy(w)
    if w.ndim == 0:
        raise ShapeError(f"{codec.name}: a scalar has no rows to quantize")
    codec.layout(w.shape) if codec.short_blocks else check_block(w.shape, codec)
    return np.ascontiguousarray(w, dtype=np.float32)


def check_block(shape: tuple[int, ...], codec: Codec) -> None:
    """Raise ShapeError unless the last axis is a multiple of the codec's block."""
    if not shape or shape[-1] % codec.block_size or (codec.block_size > 1 and not shape[-1]):
        n = shape[-1] if shape else 0
        raise ShapeError(
            f"{codec.name}: rows of {n} weights are not a multiple of the block size {codec.block_size}; "
            "choose a type with a smaller block (Q8_0, Q4_0: 32; F16: 1)"
        )


def raise_non_finite(w: F32, what: str) -> None:
    """Raise NonFiniteError naming the first NaN or infinity in w; return if there is none."""
    bad = ~np.isfinite(w)
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), w.shape))
        raise NonFiniteError(f"{what}: weight {list(index)} is {w[index]}; the checkpoint is damaged or overflowed", index)


def raise_out_of_range(w: F32, bad: Array, codec: Codec, reason: str) -> None:
    """Raise RangeError naming the largest weight of the `bad` blocks; return if there is none.

    bad: bool[..., blocks], or of any other shape for scales that whole tensors share.
    """
    if not bad.any():
        return
    rows = np.abs(w.reshape(-1, w.shape[-1]))
    blocks = -(-w.shape[-1] // codec.block_size) if codec.block_size > 1 else 1
    if bad.size == len(rows) * blocks:
        bad = bad.reshape(-1, blocks)
        rows = np.where(bad.repeat(codec.block_size, -1)[:, : w.shape[-1]] if blocks > 1 else bad, rows, -1)
    at = int(rows.argmax())
    index = tuple(int(i) for i in np.unravel_index(at, w.shape))
    raise RangeError(codec.name, reason, index, float(w[index]))


class GgmlCodec(Codec):
    """A ggml block type: one part, `data`: u8[..., row_bytes], the bytes of a GGUF tensor.

    The numbers live in compiled kernels; a type is a name. Ids, block and type sizes come from
    the `gguf` package, or from the arguments for types that it does not know yet.
    """

    row_local = True
    ggml_bytes = True

    def __init__(
        self,
        name: str,
        *,
        takes_importance: bool = False,
        needs_importance: bool = False,
        size: tuple[int, int, int] | None = None,
        halves: tuple[int, ...] = (),
    ) -> None:
        """size: id, weights and bytes of a block, where gguf's tables lack it. halves: bytes of a block where f16s stand."""
        if size is None:
            kind = gguf.GGMLQuantizationType[name]
            size = (int(kind), *gguf.GGML_QUANT_SIZES[kind])
        self.name = name
        self.ggml_type, self.block_size, self.type_size = size
        self.takes_importance = takes_importance
        self.needs_importance = needs_importance
        self.halves = halves

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """One part, `data`: u8[..., row_bytes]."""
        check_block(shape, self)
        return {"data": TensorInfo(np.dtype(np.uint8), (*shape[:-1], shape[-1] // self.block_size * self.type_size))}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Quantize w: f32[..., in] with the compiled kernel; see `Codec.encode`."""
        w = check_weights(w, self)
        info = self.layout(w.shape)["data"]
        data = empty(info.shape, info.dtype)
        rows, out = w.reshape(-1, w.shape[-1]), data.reshape(-1, info.shape[-1])
        large = False
        for span, by_row, shared in self._encode_inputs(importance, w.shape):
            try:
                native.call_rows(self.name, "encode", [rows[span], *by_row], shared, [out[span]], threads)
            except native.KernelError as e:
                if e.code not in (native.ENONFINITE, native.ELARGE):
                    raise
                raise_non_finite(w, self.name)
                large = True
        if large:
            self.check_range(w, data)
        return {"data": data}

    def scales(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        """The blocks' f16s: f16[..., blocks] each."""
        data = np.ascontiguousarray(parts["data"])
        halves = data.view("<f2").reshape(*data.shape[:-1], -1, self.type_size // 2)
        return [halves[..., at // 2] for at in self.halves]

    def check_range(self, w: F32, data: Array) -> None:
        """Raise RangeError if a scale of data: u8[..., row_bytes], encoded from w, has overflowed or been cut off."""
        for scale in self.scales({"data": data}, w.shape):
            if scale.dtype != np.float16:
                continue
            largest = np.abs(w).reshape(*scale.shape, -1).max(-1, initial=0)
            # weights that no f16 scale reaches: the squares of some overflow, and what is fitted to them is any number
            bad = ~(np.abs(scale.astype(np.float32)) < _F16_MAX) | (largest > _NO_SCALE_REACHES)
            reason = f"{self.name} stores its blocks' scales in f16, up to {_F16_MAX}"
            raise_out_of_range(w, bad & (largest >= _F16_MAX), self, reason)
            raise_out_of_range(w, bad, self, f"fitted with this importance, {self.name}'s scales leave f16 (up to {_F16_MAX})")

    def _encode_inputs(self, importance: F32 | None, shape: tuple[int, ...]) -> Iterator[tuple[slice, list[Array], list[Array]]]:
        """Rows, and what the kernel gets with them: arrays with a row for each, and arrays that all of them share."""
        if importance is None or not self.takes_importance:
            yield slice(None), [], []
        else:
            for span, q in importance_by_rows(importance, shape, self):
                yield span, [], [q]

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]; bit-equal to ggml's and gguf-py's dequantization."""
        (data,) = check_parts(parts, shape, self)
        data = data.reshape(-1, data.shape[-1])
        w = empty(shape, np.float32)
        native.call_rows(self.name, "decode", [data], [*self.tables], [w.reshape(-1, shape[-1])], threads)
        return w

    @property
    def tables(self) -> tuple[Array, ...]:
        """What the compiled kernels need besides the data."""
        return ()

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ with the compiled kernels; see `Codec.matmul`. int8: sixteen of x share a scale, absmax / 127."""
        arrays = check_parts(parts, shape, self)
        return native.product(self.name, x, [*arrays, *self.tables], shape[0], threads, activations == "int8")


class AffineCodec(GgmlCodec, GridCodec):
    """A ggml type whose codes stand for evenly spaced numbers: a name and the table of its fields.

    Params: d (and dmin, or m in the types without sub-blocks): f16[out, blocks]; sc, m:
    u8[out, sub-blocks]. Codes: u8[out, in]. Signed integers are in offset binary.
    """

    def __init__(self, name: str, grid: AffineGrid, *, takes_importance: bool = True) -> None:
        super().__init__(name, takes_importance=takes_importance, halves=tuple(grid.floats.values()))
        self.grid = grid
        if not grid.ints:
            real = "m" in grid.floats
            self.integers = IntegerGrid(grid.q.hi, None if real else grid.q.zero, self.block_size, real)

    even = True

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """Choose the stored scales and mins, minimising Σ importance (w − ŵ)²; see `GridCodec.fit`."""
        check_matrix(w, importance, self)
        params = self.search(w, importance)
        self.verify(w, params)
        return params

    def search(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """See `GridCodec.search`."""
        return self.grid.fit(w, importance)

    def verify(self, w: torch.Tensor, params: Params) -> None:
        """See `GridCodec.verify`: f16 has to hold the scales."""
        for k in self.grid.floats:
            if bool((bad := params[k].abs() >= _F16_MAX).any()):
                reason = f"{self.name} stores its blocks' scales in f16, up to {_F16_MAX}"
                raise_out_of_range(np.asarray(to_numpy(w.float()), np.float32), to_numpy(bad), self, reason)

    def spacing(self, params: Params, at: int, n: int) -> Spacing:
        """See `GridCodec.spacing`."""
        return self.grid.spacing(params, at, n)

    def round(self, w: torch.Tensor, params: Params, at: int = 0) -> Codes:
        """Nearest codes: u8[out, n] of columns at:at+n."""
        return self.grid.round(w, params, at)

    def expand(self, codes: Codes, params: Params, at: int = 0) -> torch.Tensor:
        """f32[out, n], bit-equal to `decode`."""
        return self.grid.expand(codes, params, at)

    def pack(self, codes: Codes, params: Params) -> Parts:
        """One part, `data`: u8[out, row_bytes]."""
        return {"data": to_numpy(self.grid.write(codes, params))}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> tuple[Codes, Params]:
        """(codes, params) of `data`: u8[out, row_bytes]. Raises ShapeError if it holds another tensor."""
        import torch

        (data,) = check_parts(parts, shape, self)
        # torch warns of read-only memory (a map of a file)
        return self.grid.read(torch.from_numpy(np.require(data.reshape(-1, data.shape[-1]), requirements=["W"])))

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """Codes and f16 steps of the types without sub-blocks and mins."""
        codes, params = self.unpack(parts, shape)
        step = to_numpy(params["d"]).astype(np.float32)
        return Integers(to_numpy(codes), step, np.full(step.shape, self.grid.q.zero, np.uint8))

    def from_integers(self, codes: Integers) -> Parts:
        """Steps (and mins −step · zero) are rounded to f16."""
        import torch

        floats = {"d": codes.step, "m": -codes.step * codes.zero}
        params = {k: torch.from_numpy(floats[k]).clamp(-65504, 65504).half() for k in self.grid.floats}
        return self.pack(torch.from_numpy(np.require(codes.codes, requirements=["C", "W"])), params)


def check_matrix(w: torch.Tensor, importance: torch.Tensor | None, codec: Codec) -> None:
    """Raise ShapeError or NonFiniteError unless w and importance are fit for `GridCodec.fit`."""
    shape = tuple(w.shape)
    check_block(shape, codec)
    if len(shape) != 2:
        raise ShapeError(f"{codec.name}: weights {list(shape)} are not a matrix [out, in]; reshape the leading axes to one")
    if importance is not None:
        if tuple(importance.shape) not in (shape, shape[1:]):
            raise ShapeError(
                f"{codec.name}: importance of shape {list(importance.shape)} does not fit weights {list(shape)}; "
                "give one value per column, or one per weight"
            )
        if not bool(importance.isfinite().all()) or bool((importance < 0).any()):
            raise NonFiniteError(f"{codec.name}: importance must be finite and not negative", ())
    if not bool(w.isfinite().all()):
        raise_non_finite(np.asarray(to_numpy(w), np.float32), codec.name)


def check_parts(parts: Parts, shape: tuple[int, ...], codec: Codec) -> list[Array]:
    """The parts in the layout's order, shapes and dtypes, contiguous. Raises ShapeError if they hold another tensor."""
    arrays = []
    for key, info in codec.layout(shape).items():
        part = parts.get(key)
        if part is None or part.dtype != info.dtype or part.size * part.itemsize != info.nbytes:
            has = "missing" if part is None else f"{part.dtype}{list(part.shape)}"
            raise ShapeError(f"{codec.name}: part {key} of weights {list(shape)} is {has}, needs {info.dtype}{list(info.shape)}")
        arrays.append(np.ascontiguousarray(part).reshape(info.shape))
    return arrays


def check_importance(importance: F32, shape: tuple[int, ...], codec: Codec) -> F32:
    """Importance as f32[n, in]: one row for the whole tensor, or one per leading index (experts)."""
    q = np.ascontiguousarray(to_numpy(importance), dtype=np.float32)
    n_in = shape[-1]
    leading = int(np.prod(shape[:-2], dtype=np.int64))
    if q.shape[-1:] != (n_in,) or q.size not in (n_in, leading * n_in):
        raise ShapeError(
            f"{codec.name}: importance of shape {list(q.shape)} does not fit weights {list(shape)}; give one value per column"
        )
    if not np.isfinite(q).all() or (q < 0).any():
        raise NonFiniteError(f"{codec.name}: importance must be finite and not negative", ())
    return q.reshape(-1, n_in)


def importance_by_rows(importance: F32, shape: tuple[int, ...], codec: Codec) -> Iterator[tuple[slice, F32]]:
    """Spans of rows (leading axes merged) and the importance f32[in] of each; see `check_importance`."""
    per = check_importance(importance, shape, codec)
    rows = int(np.prod(shape[:-1], dtype=np.int64)) // len(per)
    for i, q in enumerate(per):
        yield slice(i * rows, (i + 1) * rows), q


_C = TypeVar("_C", bound="type[Codec] | Codec")
_families: list[Callable[[str], Codec | None]] = []


def _check(given: Any) -> Codec:
    codec = given() if isinstance(given, type) else given
    if not isinstance(codec, Codec):
        raise UnsupportedError(f"{given!r} is no quantforge.Codec")
    return codec


_registry: Registry[Codec] = Registry(__package__, "codec", _check)


def register(codec: _C) -> _C:
    """Make a codec known by its name. Takes an instance or a class (usable as a decorator).

    Raises UnsupportedError if another codec has that name.
    """
    _registry.register(codec)
    return codec


def register_family(parse: Callable[[str], Codec | None]) -> None:
    """Make codecs known that are described by their names: parse("int4-g128-sym") is a codec, or None if the
    (lower-case) name is not of this family. The same codec has the same `name`, however it was spelled.
    """
    _families.append(parse)


_made: dict[str, Codec] = {}


def _of_family(name: str) -> Codec | None:
    for parse in _families:
        if (codec := parse(name.lower())) is not None:
            return _made.setdefault(codec.name, codec)  # one instance per name
    return None


def names() -> list[str]:
    """Names of all codecs, in registration order."""
    return list(_registry.all())


def get(name: str | Codec) -> Codec:
    """The codec of that name (any case). Raises UnsupportedError naming the nearest ones."""
    if isinstance(name, Codec):
        return name
    codec = _made.get(name) or _registry.find(name) or _of_family(name)
    if codec is None:
        raise UnsupportedError(f"unknown type {name}{meant(name) or nearest(name, names())}; `quantforge types` lists all")
    return codec


def by_ggml_type(ggml_type: int) -> Codec | None:
    """The codec with that GGUF type id, or None."""
    return next((c for c in _registry.all().values() if c.ggml_type == ggml_type), None)


def quantize(w: Any, codec: str | Codec, *, importance: Any = None, threads: int = 1) -> Encoded:
    """Quantize one tensor: w: [..., in], NumPy array or torch tensor; importance: f32[in] (mean x²).

    Raises UnsupportedError (unknown codec), ShapeError, NonFiniteError.
    """
    codec = get(codec)
    w = check_weights(w, codec)
    return Encoded(codec, w.shape, codec.encode(w, importance, threads=threads))
