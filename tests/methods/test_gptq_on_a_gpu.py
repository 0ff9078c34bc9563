"""GPTQ's loop over columns as a GPU runs it: the kernel that takes a segment, and that nobody waits for the device."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantforge import codecs, native
from quantforge.codecs import GridCodec
from quantforge.errors import RangeError
from quantforge.methods import gptq
from quantforge.methods.numerics import gptq as numerics
from tests.codecs.test_gpu_encode import emulated
from tests.methods.test_gptq import grid, inputs, stats, weights

EVEN = [n for n in codecs.names() if isinstance(c := codecs.get(n), GridCodec) and c.even]


class Waits(TorchDispatchMode):
    """Operations for which the host waits for a device, or copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        masked = "index" in name and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in (args[1:2] or [()])[0])
        if masked or re.search("local_scalar|nonzero|masked_select|unique|lift_fresh|is_nonzero|equal.default", name):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel stands in for the loop on the CPU; returns how many columns it took each time."""
    kernels, taken = emulated("feedback"), []

    def call(codec, op, given, made, stream):
        taken.append(len(made[0]))
        code = kernels[codec, op](native._describe_tensors(given), len(given), native._describe_tensors(made), len(made), None)
        assert code == native.OK

    monkeypatch.setattr(native, "cuda_call", call)
    monkeypatch.setattr(numerics, "fuses", lambda codec, device: codec.even)
    return taken


def both(name: str, w: torch.Tensor, h: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    codec = grid(name)
    fused = codec.expand(*gptq(w, codec, h, **options))
    with monkeypatch.context() as m:
        m.setattr(numerics, "fuses", lambda codec, device: False)
        plain = codec.expand(*gptq(w, codec, h, **options))
    # sums in another order: a code on the edge may fall to the other side, and what follows makes up for it
    assert (fused == plain).float().mean() > 0.9
    errors = [float(((x - w) @ h * (x - w)).sum()) for x in (fused, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("name", EVEN)
def test_the_kernel_does_what_the_loop_does(name: str, emulation: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    n = max(256, grid(name).block_size)
    both(name, weights(19, n), stats(inputs(n, 4 * n)).hessian, monkeypatch)
    assert sum(emulation) == n and max(emulation) <= numerics.FUSED


@pytest.mark.parametrize(("name", "n"), [("Q4_0", 96), ("Q4_K", 512), ("int4-g128-asym", 256), ("int3-channel-sym", 100)])
@pytest.mark.parametrize("static", [False, True])
def test_in_any_order_of_columns(name: str, n: int, static: bool, emulation, monkeypatch) -> None:
    both(name, weights(5, n), stats(inputs(n, 4 * n)).hessian, monkeypatch, act_order=True, static_groups=static)
    assert sum(emulation) == n


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "int4-g128-asym"])
def test_nobody_waits_in_the_loop(name: str, emulation: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    codec, n = grid(name), 512
    w, h = weights(8, n), stats(inputs(n, 2 * n)).hessian
    watch = Waits()
    run = numerics.Loop.run

    def watched(self, *given):
        with watch:
            return run(self, *given)

    monkeypatch.setattr(numerics.Loop, "run", watched)
    gptq(w, codec, h)
    launches = len(emulation)
    # what the kernel is told of the levels is the host's own
    assert watch.seen == ["aten.lift_fresh.default"] * launches
    with watch:
        bool(w.sum() > 0)
    assert len(watch.seen) == launches + 1  # it would notice


def test_scales_that_overflow_are_an_error_in_the_end(emulation: list[int]) -> None:
    w = weights(4, 64) * 1e8
    with pytest.raises(RangeError, match="Q4_0"):
        gptq(w, grid("Q4_0"), stats(inputs(64, 300)).hessian)


def test_what_does_not_fit_is_refused() -> None:
    kernel = emulated("feedback")["", "feedback"]

    def call(columns: int, rows: int, **other: np.ndarray) -> int:
        w, u = np.zeros((columns, rows), np.float32), np.eye(columns, dtype=np.float32)
        given = {"w": w, "u": u, "step": w + 1, "offset": np.empty(0, np.float32), "levels": np.array([8, 0, 15], np.int32)}
        given |= other
        made = [np.zeros((columns, rows), np.uint8), np.zeros((columns, rows), np.float32)]
        return int(kernel(native._describe(list(given.values())), 5, native._describe(made), 2, None))

    assert call(128, 3) == call(1, 1) == call(0, 3) == call(5, 0) == native.OK
    assert call(129, 3) == native.ESHAPE
    assert call(8, 3, u=np.zeros((8, 7), np.float32)) == native.ESHAPE
    assert call(8, 3, offset=np.zeros((8, 2), np.float32)) == native.ESHAPE
    assert call(8, 3, levels=np.zeros(2, np.int32)) == native.ESHAPE
    assert call(8, 3, step=np.zeros((8, 3), np.float64)) == native.EDTYPE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or bool(native.cuda_missing()), reason="no GPU or no CUDA kernels")
@pytest.mark.parametrize("name", EVEN)
def test_feedback_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 4 * max(128, grid(name).block_size)
    w, h = weights(300, n).cuda(), stats(inputs(n, 2 * n)).hessian.cuda()
    assert numerics.fuses(grid(name), w.device)
    for options in ({}, {"act_order": True}):
        both(name, w, h, monkeypatch, **options)
    run = numerics.Loop.run

    def watched(self, *given):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(numerics.Loop, "run", watched)
    gptq(w, grid(name), h)
