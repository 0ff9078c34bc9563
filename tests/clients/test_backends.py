"""The real libraries behind --backend, each in the interpreter that an environment variable names: `make test-backends`.

Every checkpoint comes back through our reader: 4 bits near the original, and, where weights are not folded, GGUF too.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantforge as qf
from quantforge.demo import MODEL
from quantforge.errors import BackendError
from tests.clients.interpreters import python_of

LITTLE = {"calibration_chunks": 16, "calibration_ctx": 64}
CASES = [
    ("gptqmodel", {"method": "gptq", "group_size": 32}, "int4-g32-sym", "gptq"),
    ("gptqmodel", {"method": "gptq", "bits": 3, "symmetric": False}, "int3-g128-asym", "gptq"),
    ("gptqmodel", {"method": "gptq", "act_order": True, "damping": 0.02}, "int4-g128-sym-act", "gptq"),
    ("gptqmodel", {"method": "awq", "group_size": 64}, "int4-g64-asym-bf16", "awq"),
    ("autoawq", {}, "int4-g128-asym", "awq"),
    ("llm-compressor", {"method": "gptq", "group_size": 64}, "int4-g64-sym-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "gptq", "recipe": "W4A16_ASYM"}, "int4-g128-asym-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "awq", "symmetric": False}, "int4-g128-asym-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "rtn", "recipe": "W8A8"}, "int8-channel-sym-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "rtn", "recipe": "FP8_DYNAMIC"}, "fp8-channel-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "rtn", "recipe": "FP8"}, "fp8-tensor-bf16", "compressed-tensors"),
    ("llm-compressor", {"method": "rtn", "recipe": "NVFP4"}, "NVFP4", "compressed-tensors"),
    ("auto-round", {}, "int4-g128-sym", "gptq"),
    ("auto-round", {"method": "rtn", "symmetric": False, "group_size": 64}, "int4-g64-asym", "awq"),
    ("auto-round", {"method": "rtn", "format": "compressed-tensors"}, "int4-g128-sym", "compressed-tensors"),
]


def kld(path: Path) -> float:
    found = qf.evaluate(path, reference=MODEL, chunks=4, metrics=("ppl", "kld"), noise_floor=False).models[0]
    print(f"    PPL {found.ppl:.3f}, mean KLD {found.kld_mean:.4f}")
    assert found.kld_mean is not None
    return found.kld_mean


@pytest.mark.parametrize(
    ("backend", "options", "codec", "method"), CASES, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x
)
def test_a_checkpoint_of_the_library(backend: str, options: dict, codec: str, method: str, tmp_path: Path) -> None:
    python = python_of(backend)
    report = qf.convert(MODEL, tmp_path / "m", backend=backend, backend_python=python, measure=True, **options, **LITTLE)
    quantized = [t for t in report.tensors if t.type not in ("BF16", "F16", "F32")]
    errors = [t.rel_rmse for t in quantized if t.rel_rmse is not None]
    print(f"{backend} {options}: {report.seconds:.0f} s, {report.total_bytes:,} bytes, {max(errors, default=0):.3f}")
    assert len(quantized) == 42
    assert {t.type.removesuffix("-bf16") for t in quantized} == {codec.removesuffix("-bf16")}
    assert all(0 < e < (0.4 if "int3" in codec else 0.25) for e in errors)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert config["quantforge.method"].partition(" ")[0] == quantized[0].method.partition(" ")[0]
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert kld(tmp_path / "m") < (1.0 if "int3" in codec else 0.2)


@pytest.mark.parametrize(
    ("backend", "options", "type"),
    [
        ("gptqmodel", {"method": "gptq", "recipe": "Q4_0"}, "Q4_0"),
        ("gptqmodel", {"method": "awq", "bits": 4, "group_size": 32}, "Q4_1"),
        ("llm-compressor", {"method": "rtn", "recipe": "W8A8"}, "Q8_0"),
    ],
    ids=str,
)
def test_gguf(backend: str, options: dict, type: str, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    qf.convert(MODEL, out, backend=backend, backend_python=python_of(backend), **options, **LITTLE)
    with qf.open(out) as source:
        assert source.weights["blk.3.ffn_gate.weight"].codec.name == type
    assert kld(out) < 0.2


def test_autogptq_wants_a_gpu(tmp_path: Path) -> None:
    """Its own word for it, as one line; on a machine with CUDA it works."""
    import torch

    options = {"backend": "auto-gptq", "backend_python": python_of("auto-gptq"), "device": "cuda", **LITTLE}
    if torch.cuda.is_available():
        qf.convert(MODEL, tmp_path / "m", **options)
        return
    with pytest.raises(BackendError, match=r"auto-gptq 0\.7\.1.*requires CUDA available.*built-in --method gptq"):
        qf.convert(MODEL, tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_library_in_the_wrong_environment(tmp_path: Path) -> None:
    python = python_of("autoawq")
    with pytest.raises(BackendError, match=r"no llmcompressor in .*; llmcompressor 0\.14\.0\.1 with compressed-tensors 0\.19\.0"):
        qf.convert(MODEL, tmp_path / "m", backend="llm-compressor", backend_python=python, **LITTLE)
