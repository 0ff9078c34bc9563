"""The shipped model's weights under every quant type: the bytes that llama-quantize wrote, with and without importance."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

import quantforge
from quantforge import native
from quantforge.arrays import F32
from quantforge.codecs import get

MODEL = Path(quantforge.__file__).parent / "data/demo-model"
HEADS = {"attn_q": 8, "attn_k": 4}
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cases() -> dict[str, dict[str, set[tuple[str, str]]]]:
    """type -> "plain" or "imatrix" -> (tensor, sha256 of its bytes), over all presets."""
    found: dict[str, dict[str, set[tuple[str, str]]]] = {}
    for preset in json.loads((MODEL / "llama.cpp.json").read_text())["presets"].values():
        for mode in ("plain", "imatrix"):
            for tensor, (kind, sha) in (preset[mode] or {}).items():
                if sha is not None:  # for the IQ presets the file has the types only
                    found.setdefault(kind, {}).setdefault(mode, set()).add((tensor, sha))
    return found


CASES = cases()


@cache
def weights(tensor: str) -> F32:
    """A tensor of the model as GGUF files have it: rows of attn_q and attn_k in RoPE pairs."""
    if tensor == "token_embd.weight":
        name, role = "model.embed_tokens.weight", ""
    else:
        _, layer, role, _ = tensor.split(".")
        name = f"model.layers.{layer}.{HF_NAMES[role]}.weight"
    with safe_open(MODEL / "model.safetensors", "pt") as f:
        w = f.get_tensor(name).float().numpy()
    if role in HEADS:
        n = HEADS[role]
        w = w.reshape(n, 2, w.shape[0] // n // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    return np.ascontiguousarray(w)


@cache
def importances() -> dict[str, F32]:
    arrays = {t.name: t.data for t in gguf.GGUFReader(MODEL / "llama.cpp-imatrix.gguf").tensors}
    ending = ".in_sum2"
    return {k.removesuffix(ending): arrays[k] / arrays[k.replace(ending, ".counts")] for k in arrays if k.endswith(ending)}


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k in CASES for m in CASES[k]])
def test_bytes_equal_llama_quantize(kind: str, mode: str) -> None:
    if kind not in ("F32", "F16", "BF16") and not native.has(kind, "encode"):
        pytest.skip(f"no compiled encoder for {kind}")
    codec = get(kind)
    for tensor, sha in sorted(CASES[kind][mode]):
        # a tensor that llama.cpp's file has no statistics of (the embedding) is encoded without
        importance = importances().get(tensor) if mode == "imatrix" else None
        data = codec.encode(weights(tensor), importance)["data"]
        assert hashlib.sha256(data.tobytes()).hexdigest() == sha, f"{tensor} as {kind}, {mode}"
