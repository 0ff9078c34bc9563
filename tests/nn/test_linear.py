"""Layers that compute from stored tensors, against float64 of the decoded ones: every codec, every instruction set."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantforge import codecs, native
from quantforge.errors import ShapeError, UnsupportedError
from quantforge.nn import QuantEmbedding, QuantLinear, ops, planes

UNFIT = {"I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "F8_E8M0"}
"""Integers, and powers of two alone."""
FAMILIES = [
    "int4-g128-sym", "int4-g32-asym", "int3-g64-sym", "int5-g32-asym-bf16", "int8-g128-asym", "int8-channel-sym", "int2-g32-asym",
    "int8-tensor-sym", "int4-g128-asym-act", "fp8-tensor", "fp8-channel", "fp8-block128", "fp8-g32", "int7-channel-asym-f32",
    "int4-g20-asym", "int6-g48-sym-bf16", "int8-g32-sym-act", "int3-g8-asym-act", "fp8-block100-bf16", "fp8-channel-f16",
]  # fmt: skip
NAMES = [*(n for n in codecs.names() if n not in UNFIT), *FAMILIES]
TOLERANCE = 2e-6  # of the result's norm: sums in float32


def encoded(name: str, out: int, n: int, seed: int = 0) -> codecs.Encoded:
    """Random weights, some of them large, in that codec."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(0, 0.02, (out, n)) * rng.choice([1, 1, 1, 5], (out, n))).astype(np.float32)
    return codecs.quantize(w, name, importance=(w**2).mean(0) + 1e-6)


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    """With outliers, as in real models."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.normal(size=shape) * rng.choice([1, 1, 1, 1, 1, 1, 1, 12], shape)).astype(np.float32))


def error(y: torch.Tensor, x: torch.Tensor, e: codecs.Encoded) -> float:
    want = x.double() @ torch.from_numpy(e.decode().astype(np.float64)).T
    return float((y.double() - want).norm() / want.norm())


def least(name: str) -> int:
    return max(1, codecs.get(name).block_size)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("name", NAMES)
def test_linear_is_the_product(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTFORGE_ISA", isa)
    block = least(name)
    for out, n, m in ((1, block, 1), (37, 3 * block, 5), (19, block * (1300 // block + 1), 13)):
        e = encoded(name, out, n, seed=m)
        layer = QuantLinear.from_encoded(e)
        x = activations(m, n)
        assert error(layer(x), x, e) < TOLERANCE, (out, n, m)


INT8 = [n for n in codecs.names() if native.has(n, "matmul_int8")]
INT8_INTEGERS = [
    *("int4-g128-sym", "int4-g32-asym", "int3-g64-sym", "int5-g32-asym-bf16", "int8-g128-asym", "int8-channel-sym-f32"),
    *("int2-g16-asym", "int8-tensor-sym", "int4-channel-asym-bf16", "int8-g64-sym-bf16", "int6-g48-asym", "int4-g512-sym-f32"),
    *("int7-g64-asym", "int4-g16-asym-f32", "int8-row"),
]


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("name", [*INT8, *INT8_INTEGERS])
def test_activations_of_8_bits(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the exact product of the rounded activations, and within the bar of the true one."""
    monkeypatch.setenv("QUANTFORGE_ISA", isa)
    block = least(name) if least(name) > 1 else 77
    for out, n, m in (
        (96, block, 3),
        (37, 3 * block, 5),
        (33, block * (5000 // block + 1), 1),
        (9, block * (1300 // block + 1), 9),
    ):
        e = encoded(name, out, n, seed=m)
        x = activations(m, n)
        layer = QuantLinear.from_encoded(e, activations="int8")
        y = layer(x)
        groups = torch.nn.functional.pad(x, (0, -n % 16)).reshape(m, -1, 16)
        step = groups.abs().amax(-1, keepdim=True) / 127
        rounded = ((groups / step).round() * step).reshape(m, -1)[:, :n]
        assert error(y, rounded, e) < 3e-5, (out, n, m)  # ties of the rounding may fall to the other side
        want = x.double() @ torch.from_numpy(e.decode().astype(np.float64)).T
        size = x.double().norm() * np.linalg.norm(e.decode().astype(np.float64)) / n**0.5
        assert float((y - want).norm()) < 1.2e-2 * float(min(size, want.norm() * 1.3))
        assert torch.equal(layer(x[m // 2]), y[m // 2])
    bad = x.clone()
    bad[0, 3], bad[-1, 0] = float("nan"), float("inf")
    assert layer(bad)[[0, -1]].isnan().all()
    assert torch.equal(layer(torch.zeros(2, n)), torch.zeros(2, out))


def test_which_types_have_products_of_bytes() -> None:
    assert set(INT8) == {
        "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS",
        "IQ2_S", "IQ3_XXS", "IQ3_S", "MXFP4", "TQ2_0", "TQ1_0", "Q1_0", "Q2_0", "NVFP4", "IQ1_S", "IQ1_M",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ2_XXS", "BF16", "nf4", "int4-g128-sym"])
def test_every_shape_of_x(name: str) -> None:
    n = 2 * least(name) if least(name) > 1 else 70
    e = encoded(name, 33, n)
    bias = torch.randn(33)
    layer = QuantLinear.from_encoded(e, bias)
    x = activations(2, 3, n)
    whole = layer(x)
    assert whole.shape == (2, 3, 33) and error(whole - bias, x, e) < TOLERANCE
    wide = activations(n, 300).T  # not contiguous
    assert error(layer(wide) - bias, wide, e) < TOLERANCE
    assert layer(x[:, :0]).shape == (2, 0, 33)
    assert layer(x[0, 0]).shape == (33,)
    for dtype, tolerance in ((torch.bfloat16, 2e-3), (torch.float16, 4e-4), (torch.float64, TOLERANCE)):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert error(y.double() - bias.to(dtype).double(), x.to(dtype), e) < 3 * tolerance
    # one row of a batch is what it is alone, bit by bit
    assert torch.equal(layer(wide)[7], layer(wide[7]))


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    e = encoded(name, 41, 4 * least(name) if least(name) > 1 else 512)
    x = activations(3, e.shape[1]).numpy()
    for kind in ("float", "int8"):
        found = [e.codec.matmul(x, e.parts, e.shape, threads=t, activations=kind) for t in (1, 2, 7)]
        assert all(np.array_equal(found[0], f) for f in found)


def test_products_at_once_and_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    layers = [encoded("Q4_K", rows, 512, seed=rows) for rows in (1, 31, 64, 65, 1000)]
    x = activations(2, 512).numpy()
    alone = [e.codec.matmul(x, e.parts, e.shape) for e in layers]

    def right(_: int = 0) -> bool:
        made = [
            (a, e.codec.matmul(x, e.parts, e.shape, threads=t)) for t in (2, 3, 40) for a, e in zip(alone, layers, strict=True)
        ]
        return all(np.array_equal(a, y) for a, y in made)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(100)))
    if (child := os.fork()) == 0:
        os._exit(0 if right() else 1)
    assert os.waitpid(child, 0)[1] == 0
    short = np.zeros((3, 100), np.uint8)
    with pytest.raises(native.KernelError, match="Q4_K matmul"):
        native.matmul("Q4_K", "matmul", x, [short], np.empty((2, 1000), np.float32), threads=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_holds_the_files_bytes_and_nothing_changes_them(name: str) -> None:
    e = encoded(name, 24, 2 * least(name))
    layer = QuantLinear.from_encoded(e, torch.randn(24))
    assert layer.nbytes == e.nbytes
    x = activations(2, e.shape[1])
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to("cpu")):
        assert torch.equal(other(x), y)
    half = copy.deepcopy(layer).half()
    assert half.bias.dtype == torch.float16 and half.nbytes == e.nbytes
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(half.planes, layer.planes, strict=True))
    fresh = QuantLinear.from_encoded(encoded(name, 24, 2 * least(name), seed=9), torch.zeros(24))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), y)
    assert torch.equal(layer.dequantize(), torch.from_numpy(e.decode()))
    assert f"codec={e.codec.name}, bpw={e.bpw:.4g}" in repr(layer)
    assert [p.device.type for p in copy.deepcopy(layer).to("meta").planes] == ["meta"] * len(e.parts)


@pytest.mark.parametrize("name", ["Q4_K", "int4-g128-asym"])
def test_compiles_whole(name: str) -> None:
    layer = QuantLinear.from_encoded(encoded(name, 32, 256), torch.randn(32))
    x = activations(4, 256)
    compiled = torch.compile(lambda x: torch.relu(layer(x)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.relu(layer(x)) * 2)
    torch.library.opcheck(torch.ops.quantforge.linear, (x, layer.planes, layer.codec_name, *layer.shape))
    torch.library.opcheck(torch.ops.quantforge.dequantize, (layer.planes, layer.codec_name, *layer.shape, torch.bfloat16))


def test_an_embedding_compiles_whole() -> None:
    layer = QuantEmbedding(encoded("Q4_K", 10, 256), dtype=torch.bfloat16)
    ids = torch.tensor([[3, 0, 9]])
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


@pytest.mark.parametrize("name", ["Q4_K", "nf4-dq", "int4-g128-asym-act", "fp8-block128", "BF16", "thirds"])
def test_gradients_of_activations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a linear layer of the decoded weights; nothing else has any."""
    if name == "thirds":
        codecs.register(Thirds)
    monkeypatch.setattr(ops, "DECODED_AT_ONCE", 100 * 512)  # in parts, where rows can be had alone
    layer = QuantLinear.from_encoded(encoded(name, 300, 512), torch.randn(300))
    w = layer.dequantize()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float64, 1e-6)):
        x, upstream = activations(2, 5, 512).to(dtype).requires_grad_(), torch.randn(2, 5, 300).to(dtype)
        layer(x).backward(upstream)
        want = upstream.double() @ w.double()
        assert x.grad is not None and x.grad.dtype == dtype and (x.grad - want).norm() < tolerance * want.norm()
    assert layer.bias is not None and layer.bias.grad is None
    x = activations(3, 512).requires_grad_()
    whole = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True, backend="aot_eager")
    (ours,), (want,) = torch.autograd.grad(whole(x), x), torch.autograd.grad((x @ w.T + layer.bias).square().sum(), x)
    assert (ours - want).norm() < 1e-5 * want.norm()
    with torch.no_grad():
        assert not layer(x).requires_grad
    torch.library.opcheck(torch.ops.quantforge.linear, (x, layer.planes, layer.codec_name, *layer.shape))
    torch.library.opcheck(
        torch.ops.quantforge.linear_backward, (torch.randn(3, 300), layer.planes, layer.codec_name, *layer.shape)
    )


def test_an_adapter_learns() -> None:
    """LoRA on top of a stored layer: its loss falls, the stored bytes stay."""
    torch.manual_seed(0)
    layer = QuantLinear.from_encoded(encoded("Q4_K", 64, 256))
    before = [p.clone() for p in layer.planes]
    a, b = nn.Linear(256, 4, bias=False), nn.Linear(4, 256, bias=False)
    head = QuantLinear.from_encoded(encoded("Q8_0", 8, 64))
    optimizer = torch.optim.Adam([*a.parameters(), *b.parameters()], 1e-2)
    x, y, losses = torch.randn(32, 256), torch.randn(32, 8), []
    for _ in range(30):
        loss = (head(layer(x + b(a(x)))) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(layer.planes, before, strict=True))


def test_peft_attaches() -> None:
    layer = QuantLinear.from_encoded(encoded("Q4_K", 64, 256))
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (64, 256) and not list(layer.parameters())
    peft = pytest.importorskip("peft")
    layer = QuantLinear.from_encoded(encoded("Q4_K", 64, 256), torch.randn(64))
    model = peft.get_peft_model(nn.Sequential(layer, nn.ReLU()), peft.LoraConfig(r=4, target_modules=["0"]))
    x = activations(2, 256)
    assert torch.equal(model(x), layer(x).relu())
    model(x).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_autocast_and_inference_mode() -> None:
    layer, plain = QuantLinear.from_encoded(encoded("Q4_K", 32, 256), torch.randn(32)), nn.Linear(256, 32)
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
        x = activations(3, 256).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == (torch.float64 if dtype == torch.float64 else plain(x).dtype)
            assert torch.equal(y, layer(x.to(y.dtype)))
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
            assert torch.equal(compiled, y)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.clone()))


def test_exports() -> None:
    layer = QuantLinear.from_encoded(encoded("Q4_K", 32, 256), torch.randn(32))
    batch = torch.export.Dim("batch")
    made = torch.export.export(layer, (activations(4, 256),), dynamic_shapes=({0: batch},))
    x = activations(7, 256)
    assert torch.equal(made.module()(x), layer(x))


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "nf4-dq", "int4-g128-asym-act", "Q5_0", "fp8-channel"])
def test_a_state_from_a_gpu(name: str, tmp_path: Path) -> None:
    """Saved there, where the bits lie in planes, it loads here; a file of safetensors keeps it."""
    e = encoded(name, 40, 512)
    layer = QuantLinear.from_encoded(e, torch.randn(40))
    x, fresh = activations(2, 512), QuantLinear.from_encoded(encoded(name, 40, 512, seed=9), torch.zeros(40))
    for state in (layer.state_dict(), {"bias": layer.bias, **{f"weight_{k}": p for k, p in planes.pack(e).tensors.items()}}):
        save_file({k: v.detach() for k, v in state.items()}, tmp_path / "layer")
        fresh.load_state_dict(load_file(tmp_path / "layer"))
        assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_"):
        fresh.load_state_dict({"bias": layer.bias})


@pytest.mark.parametrize("name", ["Q6_K", "IQ4_XS", "F16", "int8-channel-sym", "fp8-tensor", "nf4"])
def test_embedding_decodes_rows(name: str) -> None:
    e = encoded(name, 50, 256)
    layer = QuantEmbedding(e, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 0, 49], [3, 7, 8]])
    assert torch.equal(layer(ids), torch.from_numpy(e.decode())[ids].bfloat16())
    assert layer.nbytes == e.nbytes and layer(ids[:, :0]).shape == (2, 0, 256)


class Thirds(codecs.Codec):
    """A codec of somebody else's, without a kernel."""

    name = "thirds"
    row_local = True

    def layout(self, shape: tuple[int, ...]) -> Any:
        from quantforge.arrays import TensorInfo

        return {"bias": TensorInfo(np.dtype(np.int8), shape)}

    def encode(self, w: Any, importance: Any = None, *, threads: int = 1) -> Any:
        return {"bias": np.rint(w * 300).astype(np.int8)}

    def decode(self, parts: Any, shape: tuple[int, ...], *, threads: int = 1) -> Any:
        return (parts["bias"] / np.float32(300)).astype(np.float32).reshape(shape)


def test_any_codec_works() -> None:
    codecs.register(Thirds)
    e = encoded("thirds", 2000, 700)  # more than is decoded at once
    layer = QuantLinear.from_encoded(e, torch.ones(2000))
    x = activations(3, 700)
    assert error(layer(x) - 1, x, e) < TOLERANCE


def test_errors() -> None:
    e = encoded("Q8_0", 8, 64)
    with pytest.raises(ShapeError, match=r"not a matrix"):
        QuantLinear.from_encoded(codecs.quantize(np.ones((2, 8, 64), np.float32), "Q8_0"))
    with pytest.raises(ValueError, match="activations 'int4'"):
        QuantLinear.from_encoded(e, activations="int4")
    with pytest.raises(ShapeError, match=r"bias of \[7\]"):
        QuantLinear.from_encoded(e, torch.ones(7))
    with pytest.raises(ShapeError, match=r"cannot be decoded alone"):
        QuantEmbedding(encoded("fp8-block128", 128, 128))
    layer = QuantLinear.from_encoded(e)
    for x in (torch.ones(2, 60), torch.ones(64, 2), torch.tensor(1.0)):
        for where in ("cpu", "meta"):
            with pytest.raises(ShapeError, match=r"activations of \[.*\] do not fit weights \[8, 64\]"):
                copy.deepcopy(layer).to(where)(x.to(where))
    for where in ("cpu", "meta"):
        with pytest.raises(UnsupportedError, match=r"activations of torch.int64 .*x.float\(\)"):
            copy.deepcopy(layer).to(where)(torch.ones(1, 64, dtype=torch.int64, device=where))
    with pytest.raises(UnsupportedError, match="move them to one device"), torch.no_grad():
        copy.deepcopy(layer).to("meta")(torch.ones(1, 64))
    with pytest.raises(UnsupportedError):
        torch.ops.quantforge.linear(torch.ones(1, 64), [torch.zeros(8, 68, dtype=torch.uint8)], "Q9_9", 8, 64)
    with pytest.raises(ShapeError):
        torch.ops.quantforge.linear(torch.ones(1, 64), [torch.zeros(8, 60, dtype=torch.uint8)], "Q8_0", 8, 64)


def test_a_weight_for_others_code() -> None:
    """It has a matrix's shape and dtype, computes as one, and cannot be changed without effect."""
    e = encoded("Q4_K", 8, 256)
    x, w = activations(3, 256), torch.from_numpy(e.decode())
    for layer in (QuantLinear(e), QuantEmbedding(e)):
        assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (w.shape, torch.float32, w.device)
        assert torch.equal(layer.weight @ x.T, w @ x.T) and torch.equal(nn.functional.linear(x, layer.weight), x @ w.T)
        assert layer.to(torch.bfloat16).weight.dtype == (torch.bfloat16 if isinstance(layer, QuantEmbedding) else torch.float32)

    def replace(weight: torch.Tensor) -> None:
        weight.data = w

    def assign(weight: torch.Tensor) -> None:
        weight[0] = 0

    for change in (replace, assign, lambda weight: weight.add_(1), lambda weight: weight.data.add_(1)):
        with pytest.raises(UnsupportedError, match="a stored weight cannot be changed"):
            change(QuantLinear(e).weight)
