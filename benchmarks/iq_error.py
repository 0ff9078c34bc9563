"""Weighted error of the IQ types: Σ importance (w − decoded)² of quantforge's encoding over ggml's.

Tensors: Gaussian, Laplace and Student-t(4) weights with lognormal importance and without, and every
matrix of the shipped model whose rows are a multiple of 256, with the importance that llama.cpp's
imatrix measured, with a lognormal one and without. Without importance all weights count alike;
ggml refuses IQ1_S, IQ2_XXS and IQ2_XS then.

    python benchmarks/iq_error.py [--types IQ2_XXS,IQ4_XS] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantforge import codecs
from tests import ggml_oracle

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def synthetic(rows: int = 64, n: int = 1024, seed: int = 0) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(kind, w, importance or None)."""
    rng = np.random.default_rng(seed)
    shape = (rows, n)
    for name, w in {
        "gaussian": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "student-t4": rng.standard_t(4, size=shape),
    }.items():
        w = (0.02 * w).astype(np.float32)
        yield name, w, np.exp(rng.normal(size=n)).astype(np.float32)
        yield f"{name}, none", w, None


def shipped() -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """The same for each suitable matrix of the shipped model."""
    from safetensors import safe_open

    model = files("quantforge") / "data/demo-model"
    stats = {t.name: t.data for t in gguf.GGUFReader(str(model / "llama.cpp-imatrix.gguf")).tensors}
    rng = np.random.default_rng(1)
    with safe_open(str(model / "model.safetensors"), "pt") as f:
        for key, sums in stats.items():
            name, _, what = key.rpartition(".")
            parts = name.split(".")
            if what != "in_sum2" or parts[0] != "blk":
                continue
            w = f.get_tensor(f"model.layers.{parts[1]}.{MODULES[parts[2]]}.weight").float().numpy()
            if w.shape[1] % 256:
                continue
            mean2 = np.asarray(sums, np.float32).reshape(-1) / np.float32(stats[f"{name}.counts"].reshape(-1)[0])
            yield "shipped, imatrix", w, mean2
            yield "shipped, lognormal", w, np.exp(rng.normal(size=w.shape[1])).astype(np.float32)
            yield "shipped, none", w, None


def ratio(name: str, w: np.ndarray, importance: np.ndarray | None) -> float:
    """Our weighted error over ggml's."""
    codec = codecs.get(name)
    c = np.ones(w.shape[1]) if importance is None else importance.astype(np.float64)

    def error(data: np.ndarray) -> float:
        return float((np.square(codec.decode({"data": data}, w.shape).astype(np.float64) - w) * c).sum())

    return error(codec.encode(w, importance)["data"]) / error(ggml_oracle.encode(name, w, importance))


def measure(name: str) -> dict[str, list[float]]:
    """Ratios of all tensors by kind."""
    found: dict[str, list[float]] = {}
    for kind, w, q in (*synthetic(), *shipped()):
        if q is not None or not ggml_oracle.needs_importance(name):
            found.setdefault(kind, []).append(ratio(name, w, q))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not ggml_oracle.available:
        sys.exit(ggml_oracle.reason)
    rows = {name: measure(name) for name in args.types.split(",")}
    if args.json:
        print(json.dumps(rows))
        return
    kinds = list(dict.fromkeys(k for row in rows.values() for k in row))
    print("weighted error, ours / ggml: mean over tensors (shipped: and the worst)\n")
    print("| type | " + " | ".join(kinds) + " | all, mean | all, worst |")
    print("|---" * (len(kinds) + 3) + "|")
    for name, row in rows.items():
        cells = []
        for kind in kinds:
            v = row.get(kind)
            cells.append("–" if v is None else f"{np.mean(v):.3f}" + (f" ({max(v):.3f})" if len(v) > 1 else ""))
        every = [x for v in row.values() for x in v]
        print(f"| {name} | " + " | ".join(cells) + f" | {np.mean(every):.3f} | {max(every):.3f} |", flush=True)


if __name__ == "__main__":
    main()
