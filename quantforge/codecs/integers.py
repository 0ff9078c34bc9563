"""Integers under a scale: absmax (symmetric) and zero-point (asymmetric) at 2 to 8 bits, per tensor,
per channel or per group of columns; LLM.int8().

A family of codecs, described by their names: int4-g128-sym, int3-g64-asym, int8-channel-sym,
int8-tensor-sym (or absmax8-tensor, zeropoint3-g64); scales are f16, or -bf16, -f32; -act is a group per column in any order, as
GPTQ's act-order leaves it. Codes are stored as one little-endian stream of bits a row.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import native
from ..arrays import BF16, F32, Array, Parts, TensorInfo, to_numpy
from ..errors import ShapeError
from .base import (
    Codec,
    Codes,
    Encoded,
    GridCodec,
    IntegerGrid,
    Integers,
    Params,
    check_block,
    check_importance,
    check_matrix,
    check_parts,
    check_weights,
    get,
    raise_non_finite,
    raise_out_of_range,
    register,
    register_family,
)
from .grid import FITTED_AT_ONCE, Spacing

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"int([2-8])-(tensor|channel|g([1-9]\d{0,8}))(?:-(a?sym))?(?:-(f16|bf16|f32))?(-act)?")
_DTYPES = {"f16": np.dtype(np.float16), "bf16": BF16, "f32": np.dtype(np.float32)}
_LARGEST = {"f16": 65504.0, "bf16": 3.38e38, "f32": 3.4e38}
_SEARCHED = 1e18  # the largest magnitude whose squares, weighted and summed, are finite
_NONE = np.empty(0, np.uint8)  # zero points that are all in the middle
_BELOW_HALF = np.float32(0.49999997)  # added before truncation: rounds halves away from zero, and nothing else up


def pack_bits(codes: Array, bits: int) -> Array:
    """u8[..., n] of values below 2**bits -> u8[..., ceil(n·bits/8)]: a little-endian stream of bits along the last axis."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    n = codes.shape[-1]
    if bits in (2, 4):
        per = 8 // bits
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -n % per)]) if n % per else codes
        packed = codes[..., ::per].copy()
        for i in range(1, per):
            packed |= codes[..., i::per] << np.uint8(i * bits)
        return packed
    # eight times the codes' memory: some rows at a time
    rows = codes.reshape(-1, n)
    packed = np.empty((len(rows), -(-n * bits // 8)), np.uint8)
    step = max(1, (1 << 20) // max(1, n))
    for i in range(0, len(rows), step):
        single = np.unpackbits(rows[i : i + step, :, None], axis=-1, count=bits, bitorder="little")
        packed[i : i + step] = np.packbits(single.reshape(len(single), n * bits), axis=-1, bitorder="little")
    return packed.reshape(*codes.shape[:-1], packed.shape[-1])


def unpack_bits(packed: Array, bits: int, n: int) -> Array:
    """Inverse of `pack_bits`: u8[..., n]."""
    if bits == 8:
        return packed
    if bits in (2, 4):
        per = 8 // bits
        codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per), np.uint8)
        for i in range(per):
            codes[..., i::per] = (packed >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
        return codes[..., :n]
    rows = packed.reshape(-1, packed.shape[-1])
    unpacked = np.empty((len(rows), n), np.uint8)
    step = max(1, (1 << 20) // max(1, n))
    for i in range(0, len(rows), step):
        single = np.unpackbits(rows[i : i + step], axis=-1, count=n * bits, bitorder="little")
        unpacked[i : i + step] = np.packbits(single.reshape(-1, n, bits), axis=-1, bitorder="little")[..., 0]
    return unpacked.reshape(*packed.shape[:-1], n)


class IntegerCodec(GridCodec):
    """w = scale · (code − zero), code in 0 .. 2**bits − 1.

    Parts: codes: u8[..., in·bits/8]; scale: f16[..., groups] (for the whole tensor: [1]); where
    asymmetric, zero: u8 of scale's shape, else zero is 2**(bits − 1). A row's last group may be
    short: 192 columns in groups of 128 are 128 + 64. Without importance `encode`
    is plain rounding: to the largest magnitude (absmax), or from the smallest to the largest
    weight (zero-point). `fit`, and `encode` with importance, search for the best parameters.
    """

    short_blocks = True
    even = True

    def __init__(self, bits: int, per: str, *, symmetric: bool = True, scale: str = "f16") -> None:
        self.bits, self.per, self.symmetric, self.scale_dtype = bits, per, symmetric, _DTYPES[scale]
        self.group = int(per[1:]) if per[0] == "g" else 0
        self.block_size = self.group or 1
        self.name = f"int{bits}-{per}-{'sym' if symmetric else 'asym'}" + ("" if scale == "f16" else f"-{scale}")
        self.row_local = per != "tensor"
        self.shared = frozenset() if self.row_local else frozenset({"scale", "zero"})
        self.top = (1 << bits) - 1
        self.middle = 1 << (bits - 1)
        self.integers = IntegerGrid(
            self.top, self.middle if symmetric else None, self.group, step=scale, whole=not self.row_local
        )
        self._largest = _LARGEST[scale]
        self._reason = f"{self.name} stores its scales in {scale}, up to {self._largest:g}"
        # Half a level beyond the last one costs the largest weight no more than rounding costs others,
        # and is what GPTQ's and compressed-tensors' ranges are; 8 bits have Q8_0's and LLM.int8()'s range.
        self._reach = 127.0 if bits == 8 else self.top / 2

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Parts codes, scale and, where asymmetric, zero."""
        if not shape or (self.group and not shape[-1]):
            raise ShapeError(f"{self.name}: weights {list(shape)} have no rows to quantize")
        n = shape[-1]
        parts = {"codes": TensorInfo(np.dtype(np.uint8), (*shape[:-1], -(-n * self.bits // 8)))}
        groups = (*shape[:-1], -(-n // self.group) if self.group else 1) if self.row_local else (1,)
        parts["scale"] = TensorInfo(self.scale_dtype, groups)
        if not self.symmetric:
            parts["zero"] = TensorInfo(np.dtype(np.uint8), groups)
        return parts

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Quantize w: f32[..., in]; see the class and `Codec.encode`."""
        w = check_weights(w, self)
        layout = self.layout(w.shape)
        if importance is not None:
            parts = self._encode_weighted(w, importance)
        else:
            step, zero = self._range(w)
            raise_out_of_range(w, step > self._largest, self, self._reason)
            scale = np.minimum(step, self._largest).astype(self.scale_dtype)
            with np.errstate(over="ignore"):
                inverse = np.where(step > 1.2e-38, 1 / np.maximum(step, 1.2e-38), 0).astype(np.float32)
            x = self._groups(w) * inverse[..., None]
            x = np.trunc(x + np.copysign(_BELOW_HALF, x)) + zero[..., None]
            codes = self._columns_of(np.clip(x, 0, self.top).astype(np.uint8), w.shape)
            parts = {"codes": pack_bits(codes, self.bits), "scale": scale, "zero": zero.astype(np.uint8)}
        return {k: parts[k].reshape(info.shape) for k, info in layout.items()}

    def _groups(self, w: Array) -> Array:
        """[..., group, column]; a short last group is filled with zeros, which cost a range or a fit nothing."""
        if not self.row_local:
            return w.reshape(1, -1)
        group = self.group or w.shape[-1]
        short = -w.shape[-1] % max(1, group)
        w = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, short)]) if short else w
        return w.reshape(*w.shape[:-1], w.shape[-1] // max(1, group), group)

    def _columns_of(self, groups: Array, shape: tuple[int, ...]) -> Array:
        """Inverse of `_groups`."""
        if not self.row_local:
            return groups.reshape(shape)
        rows = groups.reshape(*shape[:-1], groups.shape[-2] * groups.shape[-1])
        return rows if rows.shape[-1] == shape[-1] else np.ascontiguousarray(rows[..., : shape[-1]])

    def _range(self, w: F32) -> tuple[Any, Any]:
        """Real-valued steps f64[..., groups] and zeros of plain rounding."""
        x = self._groups(w)
        low, high = (f(x, -1, initial=0, keepdims=False).astype(np.float64) for f in (np.min, np.max))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise_non_finite(w, self.name)
        if self.symmetric:
            step = np.maximum(-low, high) / np.float32(self._reach)
            return step.astype(np.float32).astype(np.float64), np.full(step.shape, self.middle)
        step = (high - low) / self.top
        with np.errstate(invalid="ignore", divide="ignore"):
            zero = np.where(step > 0, np.rint(-low / step), 0)
        return step, np.clip(zero, 0, self.top)

    def _encode_weighted(self, w: F32, importance: F32) -> Parts:
        import torch

        per = check_importance(importance, w.shape, self)
        matrices = w.reshape(-1, w.shape[-1]) if len(per) == 1 else w.reshape(len(per), -1, w.shape[-1])
        encoded = []
        for i, rows in enumerate([matrices] if len(per) == 1 else matrices):
            x = torch.from_numpy(np.require(rows, requirements=["W"]))
            params = self.fit(x, torch.from_numpy(np.require(per[i], requirements=["W"])))
            encoded.append(self.pack(self.round(x, params), params))
            if not self.row_local and len(per) > 1:
                raise ShapeError(f"{self.name}: one scale cannot serve {len(per)} experts; choose a scale per channel")
        return {k: np.concatenate([p[k] for p in encoded]) for k in encoded[0]}

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        codes, scale, *zeros = check_parts(parts, shape, self)
        x = self._groups(unpack_bits(codes, self.bits, shape[-1]).astype(np.float32))
        x -= zeros[0].astype(np.float32)[..., None] if zeros else np.float32(self.middle)
        x *= scale.astype(np.float32)[..., None]
        return self._columns_of(x, shape)

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`. "int8" needs groups of a multiple of 16 columns, and is "float" for others."""
        codes, scale, *zero = check_parts(parts, shape, self)
        cut = np.array([shape[1], int(self.row_local), self.group], np.int64)
        sources = [codes, scale, zero[0] if zero else _NONE, cut]
        return native.product(f"int{self.bits}", x, sources, shape[0], threads, activations == "int8" and self.group % 16 == 0)

    # ---- the grid, on torch tensors

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """scale f16[out, groups] and, where asymmetric, zero u8[out, groups], minimising Σ importance (w − ŵ)²."""
        padded = self._whole_groups(w, importance)
        check_matrix(*padded, self)
        params = self.search(*padded)
        self.verify(w, params)
        return params

    def _whole_groups(self, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both with zeros for what a row's last group lacks, which cost a fit nothing."""
        import torch

        short = -w.shape[-1] % self.group if self.group else 0
        if not short:
            return w, importance
        pad = torch.nn.functional.pad
        return pad(w, (0, short)), None if importance is None else pad(importance, (0, short))

    def search(self, w: torch.Tensor, importance: torch.Tensor | None = None) -> Params:
        """See `GridCodec.search`. Every shrinking of the plain range is tried; the best is improved by least squares."""
        import torch

        w, importance = self._whole_groups(w, importance)
        rows = w.shape[0]
        x = w.detach().float()
        c = torch.ones_like(x) if importance is None else importance.detach().to(x.device, torch.float32).expand(x.shape)
        c = c / c.amax().clamp_min(1e-30) + 1e-12
        if not self.row_local:
            fitted = self._fit(x.reshape(1, 1, -1), c.reshape(1, 1, -1))
            return {k: p.expand(rows, 1) for k, p in fitted.items()}
        step = max(1, FITTED_AT_ONCE.get(x.device.type, 1 << 18) // max(1, x.shape[1]))
        width = self.group or x.shape[1]
        groups = x.shape[1] // width
        chunks = [
            self._fit(x[i : i + step].reshape(-1, groups, width), c[i : i + step].reshape(-1, groups, width))
            for i in range(0, rows, step)
        ]
        return {k: torch.cat([p[k] for p in chunks]) for k in chunks[0]}

    def verify(self, w: torch.Tensor, params: Params) -> None:
        """See `GridCodec.verify`: where the search was cut off."""
        bad = params["scale"].float().abs() >= self._largest
        bad = bad if bool(bad.any()) else w.abs() > _SEARCHED
        if bool(bad.any()):
            raise_out_of_range(np.asarray(to_numpy(w.float()), np.float32), to_numpy(bad), self, self._reason)

    def _fit(self, x: torch.Tensor, c: torch.Tensor) -> Params:
        import torch

        kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(self.scale_dtype.name, torch.float32)
        x = x.clamp(-_SEARCHED, _SEARCHED)
        low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
        best = torch.full_like(low, float("inf"))
        scale, zero = torch.zeros_like(low), torch.full_like(low, float(self.middle))

        def consider(step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            nonlocal best, scale, zero
            s = step.clamp(-self._largest, self._largest).to(kind).float()
            q = self._nearest(x, s.unsqueeze(-1), shift.unsqueeze(-1)) - shift.unsqueeze(-1)
            e = ((q * s.unsqueeze(-1) - x).square_() * c).sum(-1)
            better = e < best
            best, scale, zero = e.minimum(best), s.where(better, scale), shift.where(better, zero)
            return q

        narrowest = {2: 0.3, 3: 0.45, 4: 0.6}.get(self.bits, 0.8)
        trials = 32 if self.bits < 5 else 12
        for i in range(trials + 1):
            part = 1.0 - (1.0 - narrowest) * i / trials
            if self.symmetric:
                consider(torch.maximum(-low, high) * (part / self._reach), zero.new_full(low.shape, float(self.middle)))
                continue
            step = (high - low) * (part / self.top)
            at = (-low * part / step.where(step > 0, torch.ones_like(step))).round_().clamp_(0, self.top)
            for shift in (at, (at + 1).clamp_max_(self.top), (at - 1).clamp_min_(0)) if self.bits < 5 else (at,):
                consider(step, shift)
        for _ in range(2):
            q = consider(scale, zero)
            cq = c * q
            power = (cq * q).sum(-1)
            consider(((cq * x).sum(-1) / power.where(power > 0, torch.ones_like(power))).where(power > 0, scale), zero)
        params = {"scale": scale.to(kind)}
        return params if self.symmetric else params | {"zero": zero.to(torch.uint8)}

    def spacing(self, params: Params, at: int, n: int) -> Spacing:
        """See `GridCodec.spacing`."""
        step, zero = self._columns(params, at, n)
        if self.symmetric:
            return Spacing(step, None, self.middle, 0, self.top)
        return Spacing(step, step * zero, 0, 0, self.top)

    def _nearest(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float) -> torch.Tensor:
        return ((w / scale.masked_fill(scale == 0, float("inf"))).round_() + zero).clamp_(0, self.top)

    def _columns(self, params: Params, at: int, n: int) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scale and zero of columns at:at+n, as floats [out, n] or [out, 1]."""
        import torch

        if not self.group:
            groups: Any = slice(0, 1)
        elif at // self.group == (at + n - 1) // self.group:
            groups = slice(at // self.group, at // self.group + 1)
        else:
            groups = torch.arange(at, at + n, device=params["scale"].device) // self.group
        zero = float(self.middle) if self.symmetric else params["zero"][:, groups].float()
        return params["scale"][:, groups].float(), zero

    def round(self, w: torch.Tensor, params: Params, at: int = 0) -> Codes:
        """Nearest codes: u8[out, n] of columns at:at+n."""
        import torch

        return self._nearest(w.float(), *self._columns(params, at, w.shape[1])).to(torch.uint8)

    def expand(self, codes: Codes, params: Params, at: int = 0) -> torch.Tensor:
        """f32[out, n], bit-equal to `decode`."""
        scale, zero = self._columns(params, at, codes.shape[1])
        return (codes.float() - zero) * scale

    def pack(self, codes: Codes, params: Params) -> Parts:
        """Parts of a matrix [out, in]."""
        parts = {"codes": pack_bits(to_numpy(codes.contiguous()), self.bits)}
        return parts | {k: to_numpy(p.contiguous())[slice(None) if self.row_local else 0].copy() for k, p in params.items()}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> tuple[Codes, Params]:
        """(codes, params) on the CPU."""
        import torch

        arrays = dict(zip(self.layout(shape), check_parts(parts, shape, self), strict=True))
        codes = unpack_bits(arrays.pop("codes"), self.bits, shape[-1])
        params = {}
        for k, p in arrays.items():
            p = p if self.row_local else np.broadcast_to(p, (shape[0], 1))
            if p.dtype == BF16:
                params[k] = torch.from_numpy(p.view(np.int16).copy()).view(torch.bfloat16)
            else:
                params[k] = torch.from_numpy(p.copy())
        return torch.from_numpy(codes.copy()), params

    # ---- repacking

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """Codes, steps and zeros of a matrix."""
        codes, scale, *zeros = check_parts(parts, shape, self)
        zero = zeros[0] if zeros else np.full(scale.shape, self.middle, np.uint8)
        if not self.row_local:
            scale, zero = (np.broadcast_to(p, (*shape[:-1], 1)) for p in (scale, zero))
        return Integers(unpack_bits(codes, self.bits, shape[-1]), scale.astype(np.float32), zero)

    def from_integers(self, codes: Integers) -> Parts:
        """Steps are rounded to the scale's dtype."""
        scale = np.clip(codes.step, -self._largest, self._largest).astype(self.scale_dtype)
        parts = {"codes": pack_bits(codes.codes, self.bits), "scale": scale}
        return parts if self.symmetric else parts | {"zero": codes.zero}


class ActOrderCodec(Codec):
    """An IntegerCodec whose columns belong to groups in any order: a further part, group: i32[in]."""

    short_blocks = True
    shared = frozenset({"group"})

    def __init__(self, plain: IntegerCodec) -> None:
        self.plain = plain
        self.name = plain.name + "-act"
        self.block_size = plain.block_size

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """The plain codec's parts, and group."""
        return self.plain.layout(shape) | {"group": TensorInfo(np.dtype(np.int32), shape[-1:])}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """As the plain codec does, with groups of neighbours."""
        parts = self.plain.encode(w, importance, threads=threads)
        return parts | {"group": np.arange(w.shape[-1], dtype=np.int32) // np.int32(self.plain.group)}

    def _parts(self, parts: Parts, shape: tuple[int, ...]) -> list[Array]:
        arrays = check_parts(parts, shape, self)
        scale, group = arrays[1], arrays[-1]
        if group.size and not 0 <= int(group.min()) <= int(group.max()) < scale.shape[-1]:
            raise ShapeError(
                f"{self.name}: a column belongs to group {int(group.max())} or {int(group.min())} of {scale.shape[-1]}"
            )
        return arrays

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`. Activations stay floats: columns that share a scale are not neighbours."""
        codes, scale, *zero, group = self._parts(parts, shape)
        cut = np.array([shape[1], 1, self.plain.group], np.int64)
        sources = [codes, scale, zero[0] if zero else _NONE, cut, group]
        return native.product(f"int{self.plain.bits}-act", x, sources, shape[0], threads)

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        codes, scale, *zeros, group = self._parts(parts, shape)
        x = unpack_bits(codes, self.plain.bits, shape[-1]).astype(np.float32)
        x -= zeros[0].astype(np.float32)[..., group] if zeros else np.float32(self.plain.middle)
        x *= scale.astype(np.float32)[..., group]
        return x


class MinCodec(Codec):
    """w = scale · code + min, both stored per group as they are (MLX): int4-g64-min, scales and mins f16, or -bf16, -f32.

    Parts: codes: u8[..., in·bits/8]; scale, min: [..., in/group]. Encoding is plain rounding from the smallest to the
    largest weight.
    """

    row_local = True

    def __init__(self, bits: int, group: int, scale: str = "f16") -> None:
        self.bits, self.block_size, self.scale_dtype = bits, group, _DTYPES[scale]
        self.name = f"int{bits}-g{group}-min" + ("" if scale == "f16" else f"-{scale}")
        self._largest = _LARGEST[scale]

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Parts codes, scale and min."""
        check_block(shape, self)
        group = TensorInfo(self.scale_dtype, (*shape[:-1], shape[-1] // self.block_size))
        return {
            "codes": TensorInfo(np.dtype(np.uint8), (*shape[:-1], -(-shape[-1] * self.bits // 8))),
            "scale": group,
            "min": group,
        }

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Round to the nearest; see `Codec.encode`. Importance does not matter here."""
        w = check_weights(w, self)
        x = w.reshape(*w.shape[:-1], -1, self.block_size).astype(np.float64)
        low, high = x.min(-1, initial=np.inf), x.max(-1, initial=-np.inf)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise_non_finite(w, self.name)
        step = (high - low) / ((1 << self.bits) - 1)
        bad = np.maximum(step, np.abs(low)) > self._largest
        raise_out_of_range(w, bad, self, f"{self.name} stores its scales and mins up to {self._largest:g}")
        codes = np.rint((x - low[..., None]) / np.where(step > 0, step, 1)[..., None]).astype(np.uint8)
        return {
            "codes": pack_bits(codes.reshape(w.shape), self.bits),
            "scale": step.astype(self.scale_dtype),
            "min": low.astype(self.scale_dtype),
        }

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        codes, scale, least = check_parts(parts, shape, self)
        x = unpack_bits(codes, self.bits, shape[-1]).astype(np.float32).reshape(*scale.shape, self.block_size)
        x *= scale.astype(np.float32)[..., None]
        x += least.astype(np.float32)[..., None]
        return x.reshape(shape)


def reorder(e: Encoded, permutation: Array) -> Encoded:
    """Undo a permutation of columns: e holds w[:, permutation] in an IntegerCodec by groups; what comes back holds w.

    permutation: int[in]. The result's codec is the `-act` one of the same name.
    """
    assert isinstance(e.codec, IntegerCodec) and e.codec.group
    codes = unpack_bits(e.parts["codes"], e.codec.bits, e.shape[-1])
    inverse = np.argsort(permutation)
    group = (inverse // e.codec.group).astype(np.int32)
    parts = e.parts | {"codes": pack_bits(np.ascontiguousarray(codes[..., inverse]), e.codec.bits), "group": group}
    return Encoded(get(e.codec.name + "-act"), e.shape, parts)


class RowInt8(Codec):
    """LLM.int8()'s weights (arXiv 2208.07339): codes i8[..., in] and absmax f32[..., 1]; w = code · absmax / 127.

    Outlier columns are found in the activations at run time; nothing about them is stored.
    """

    name = "int8-row"
    row_local = True
    integers = IntegerGrid(255, 128, 0, step="f32")

    def layout(self, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
        """Parts codes and absmax."""
        if not shape:
            raise ShapeError(f"{self.name}: a scalar has no rows to quantize")
        absmax = TensorInfo(np.dtype(np.float32), (*shape[:-1], 1))
        return {"codes": TensorInfo(np.dtype(np.int8), shape), "absmax": absmax}

    def encode(self, w: F32, importance: F32 | None = None, *, threads: int = 1) -> Parts:
        """Round to the nearest; see `Codec.encode`. Importance does not matter here."""
        w = check_weights(w, self)
        absmax = np.maximum(w.max(-1, initial=0, keepdims=True), -w.min(-1, initial=0, keepdims=True))
        if not np.isfinite(absmax).all():
            raise_non_finite(w, self.name)
        x = w / np.where(absmax > 0, absmax, 1)
        return {"codes": np.rint(x * np.float32(127)).astype(np.int8), "absmax": absmax}

    def decode(self, parts: Parts, shape: tuple[int, ...], *, threads: int = 1) -> F32:
        """f32[shape]."""
        codes, absmax = check_parts(parts, shape, self)
        return np.asarray(codes.astype(np.float32) * (absmax / np.float32(127)), np.float32)

    def matmul(self, x: F32, parts: Parts, shape: tuple[int, ...], *, threads: int = 1, activations: str = "float") -> F32:
        """x wᵀ; see `Codec.matmul`, and `mixed_product` for what bitsandbytes does."""
        codes, absmax = check_parts(parts, shape, self)
        sources = [codes, np.asarray(absmax / np.float32(127), np.float32), _NONE, np.array([shape[1], 1, 0], np.int64)]
        return native.product("int8", x, sources, shape[0], threads, activations == "int8")

    def mixed_product(self, x: F32, parts: Parts, shape: tuple[int, ...], threshold: float = 6.0) -> F32:
        """LLM.int8()'s product x·wᵀ: f32[tokens, out] of x: f32[tokens, in].

        Columns of x with a magnitude of `threshold` or more (0: none) are multiplied in floats with the decoded weights; the
        others are rounded to int8 by the largest magnitude of each token, and the products of integers are exact.
        """
        codes, absmax = check_parts(parts, shape, self)
        outliers = (np.abs(x) >= threshold).any(0) if threshold > 0 else np.zeros(x.shape[1], bool)
        rest = np.where(outliers, np.float32(0), x)
        largest = np.abs(rest).max(-1, initial=0, keepdims=True)
        q = np.rint(rest * (np.float32(127) / np.where(largest > 0, largest, 1))).astype(np.float64)  # exact: below 2**53
        y = (q @ codes.T.astype(np.float64)) * (largest.astype(np.float64) * absmax.T / (127 * 127))
        y += x[:, outliers].astype(np.float64) @ self.decode(parts, shape)[:, outliers].T
        return np.asarray(y, np.float32)

    def to_integers(self, parts: Parts, shape: tuple[int, ...]) -> Integers:
        """Codes from −128 on, and steps."""
        codes, absmax = check_parts(parts, shape, self)
        step = np.asarray(absmax / np.float32(127), np.float32)
        return Integers(codes.view(np.uint8) ^ np.uint8(0x80), step, np.full(absmax.shape, 128, np.uint8))

    def from_integers(self, codes: Integers) -> Parts:
        """Inverse of `to_integers`."""
        return {"codes": (codes.codes ^ np.uint8(0x80)).view(np.int8), "absmax": codes.step * np.float32(127)}


def _of_name(name: str) -> Codec | None:
    if naive := re.fullmatch(r"(absmax|zeropoint)-?(?:int)?([2-8])-([^-]+)", name):  # other words for the same
        name = f"int{naive[2]}-{naive[3]}-{'sym' if naive[1] == 'absmax' else 'asym'}"
    if least := re.fullmatch(r"int([2-8])-g([1-9]\d{0,8})-min(?:-(f16|bf16|f32))?", name):
        return MinCodec(int(least[1]), int(least[2]), least[3] or "f16")
    match = _NAME.fullmatch(name)
    if match is None or (match[6] and not match[3]):
        return None
    plain = IntegerCodec(int(match[1]), match[2], symmetric=match[4] != "asym", scale=match[5] or "f16")
    if not match[6]:
        return plain
    known = get(plain.name)
    assert isinstance(known, IntegerCodec)
    return ActOrderCodec(known)


register_family(_of_name)
register(RowInt8)
