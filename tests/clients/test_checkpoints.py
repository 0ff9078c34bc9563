"""Checkpoints that we write in the libraries they are for: every layer's weight is our own decode of the
same file, and generation works. GPTQ and AWQ need an environment of their own: `make test-clients`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.arrays import BF16 as BFLOAT16
from quantforge.demo import MODEL
from tests import checkpoints

LIBRARIES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
# half a unit in the last place of bf16, once for the scale and once for the weight
TOLERANCE = 2 * 2.0**-8


def needs(format: str) -> None:
    for module in LIBRARIES[format]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed here: make test-clients")


def dense(module: Any) -> np.ndarray:
    """The weight [out, in] that a client's layer computes with."""
    import torch

    if (
        isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.is_floating_point()
        and module.weight.ndim == 2
    ):
        return module.weight.detach().float().numpy()
    if hasattr(module.weight if hasattr(module, "weight") else None, "quant_state"):  # bitsandbytes
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()
    with torch.no_grad():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        return module(torch.eye(module.in_features, dtype=torch.bfloat16)).float().T.numpy()


def compare(path: Path, model: Any, near_zero: float = 2.0**-8) -> tuple[int, float]:
    """Layers that are quantized, and the largest relative error of the client's weights beside ours."""
    worst, n = 0.0, 0
    modules = dict(model.named_modules())
    with qf.open(path) as source:
        for name, stored in source.weights.items():
            if stored.codec.name in ("BF16", "F16", "F32"):
                continue
            ours = source.read(name).decode()
            theirs = dense(modules[name.removesuffix(".weight")])
            assert theirs.shape == ours.shape
            error = np.abs(theirs - ours) / (np.abs(ours) + np.abs(ours).max() * near_zero)
            worst, n = max(worst, float(error.max())), n + 1
    return n, worst


def speak(model: Any) -> None:
    import torch

    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
        made = model.generate(torch.tensor([[5, 7, 9, 11]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.isfinite(logits.float()).all()
    assert made.shape == (1, 9)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases of attention, and tied embeddings."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    directory = checkpoints.model(tmp_path_factory.mktemp("qwen"), "Qwen2", **sizes)
    tensors = {k: v.astype(BFLOAT16) for k, v in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    checkpoints.save(directory, "config.json", config | {"dtype": "bfloat16"})
    return directory


GPTQ = [
    *({"bits": b, "group_size": 64} for b in (2, 3, 4, 8)),
    {"bits": 8, "group_size": -1},
    {"bits": 4, "group_size": 32, "version": "gptq_v2"},
    {"bits": 4, "group_size": 128, "symmetric": False},
    {"bits": 3, "group_size": 128, "symmetric": False},
    {"bits": 8, "group_size": 128, "symmetric": False},
]
AWQ = [{"group_size": g} for g in (32, 64, 128)] + [{"group_size": 64, "symmetric": False}]
COMPRESSED = [
    *({"recipe": r} for r in ("W4A16", "W8A16", "W8A8", "FP8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")),
    *({"recipe": r} for r in ("fp8-tensor", "int8-tensor", "int4-channel")),
    {"bits": 8, "group_size": 128},
    {"bits": 4, "group_size": 32, "max_shard_size": 400_000},
]
BITSANDBYTES = [{"recipe": r} for r in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")]
CASES = [
    *(("gptq", o) for o in GPTQ),
    *(("awq", o) for o in AWQ),
    *(("compressed-tensors", o) for o in COMPRESSED),
    *(("bitsandbytes", o) for o in BITSANDBYTES),
]


@pytest.mark.parametrize("which", ["demo", "qwen"])
@pytest.mark.parametrize(("format", "options"), CASES, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x)
def test_transformers_computes_with_our_weights(format: str, options: dict, which: str, tmp_path: Path, qwen: Path) -> None:
    needs(format)
    import transformers

    path = tmp_path / "model"
    qf.convert(MODEL if which == "demo" else qwen, path, format=format, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    if format == "compressed-tensors":
        speak(model)  # it decompresses at the first forward pass
        n, worst = compare(path, model)
    else:
        # the kernel that transformers takes for 4 bits with zeros adds zero · scale in bf16: its error is the largest weight's
        zeros = format == "awq" or (options.get("symmetric") is False and options["bits"] == 4)
        n, worst = compare(path, model, 1.0 if zeros else 2.0**-8)
        speak(transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu"))
    print(f"{format} {options} {which}: {n} layers, {worst:.2e}")
    assert n == 7 * (6 if which == "demo" else 2)
    assert worst <= TOLERANCE


GPTQMODEL = [
    *(("gptq", o) for o in (GPTQ[1], GPTQ[2], {"bits": 4, "group_size": -1}, {"bits": 4, "group_size": 128, "symmetric": False})),
    *(("awq", o) for o in AWQ),
]


@pytest.mark.parametrize(("format", "options"), GPTQMODEL, ids=str)
def test_gptqmodel_computes_with_our_weights(format: str, options: dict, tmp_path: Path) -> None:
    needs(format)
    from gptqmodel import BACKEND, GPTQModel

    path = tmp_path / "model"
    qf.convert(MODEL, path, format=format, **options)
    model = GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH).model
    speak(model)
    n, worst = compare(path, model)
    print(f"gptqmodel {format} {options}: {n} layers, {worst:.2e}")
    assert n == 42
    assert worst <= TOLERANCE
