"""Million weights per second and thread of every ggml type: quantforge against ggml, in turns in one process.

ggml is the one inside the xllamacpp wheel. Both sides are timed by the CPU time of the calling
thread, the best of several turns; ggml writes into a buffer made beforehand, quantforge through
`Codec.encode` and `Codec.decode`, allocation included.

    python benchmarks/encode.py [--types Q4_K,Q6_K] [--isa avx2] [--json] [--seconds 0.3]

With --device cuda: billion weights per second of the GPU's kernels on a bf16-rounded matrix that is there already,
the median of launches timed by events, and whether its bytes equal the CPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantforge import codecs, native
from quantforge.codecs.base import GgmlCodec
from tests import ggml_oracle

ROWS, IN = 1024, 4096
FLOATS = ("F32", "F16", "BF16")


def best(sides: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Least thread CPU time of one call of each side; sides take turns until each has used `seconds`."""
    least = dict.fromkeys(sides, float("inf"))
    used = dict.fromkeys(sides, 0.0)
    while min(used.values()) < seconds:
        for name, run in sides.items():
            begin = time.thread_time()
            run()
            took = time.thread_time() - begin
            least[name] = min(least[name], took)
            used[name] += took
    return least


def measure(name: str, w: np.ndarray, importance: np.ndarray, seconds: float) -> dict[str, Any]:
    """One row of the table: encode, encode with importance, decode."""
    codec = codecs.get(name)
    data = ggml_oracle.encode(name, w[:1], importance)
    out = np.empty((len(w), data.shape[-1]), np.uint8)
    row: dict[str, Any] = {"type": name}

    def encode(key: str, q: np.ndarray | None) -> None:
        # the slow searches need no million weights
        ggml_oracle.encode_into(name, w[:8], out[:8], q)
        begin = time.thread_time()
        ggml_oracle.encode_into(name, w[:8], out[:8], q)
        n = int(np.clip(8 * seconds / 2 / (time.thread_time() - begin + 1e-9), 16, len(w)))
        part, room = w[:n], out[:n]
        took = best(
            {
                "ours": lambda: codec.encode(part, q),
                "ggml": lambda: ggml_oracle.encode_into(name, part, room, q),
            },
            seconds,
        )
        ours = codec.encode(part, q)["data"]
        row[key] = {side: part.size / s / 1e6 for side, s in took.items()} | {"same": ours.tobytes() == room.tobytes()}

    if codec.encodes and not ggml_oracle.needs_importance(name):
        encode("encode", None)
    if codec.encodes and getattr(codec, "takes_importance", False):
        encode("importance", importance)

    ggml_oracle.encode_into(name, w[:32], out[:32], importance)
    out[:] = np.resize(out[:32], out.shape)
    parts = {k: np.ones(i.shape, i.dtype) for k, i in codec.layout(w.shape).items()}
    parts["data"] = out.view(parts["data"].dtype).reshape(parts["data"].shape)
    theirs = np.empty_like(w)
    took = best(
        {"ours": lambda: codec.decode(parts, w.shape), "ggml": lambda: ggml_oracle.decode_into(name, out, theirs)}, seconds
    )
    same = codec.decode(parts, w.shape).tobytes() == theirs.tobytes()
    row["decode"] = {side: w.size / s / 1e6 for side, s in took.items()} | {"same": same}
    return row


def measure_cuda(name: str, rows: int, seconds: float) -> dict[str, Any]:
    """One row of the GPU's table: encode, encode with importance, decode."""
    import torch

    from quantforge import device

    codec = codecs.get(name)
    assert isinstance(codec, GgmlCodec)
    torch.manual_seed(0)
    w = (torch.randn(rows, IN, device="cuda") * 0.02).bfloat16().float()
    importance = np.exp(np.random.default_rng(0).standard_normal(IN)).astype(np.float32)
    few = 32 if name.startswith("IQ") else 256
    host = w[:few].cpu().numpy()

    def median(run: Callable[[], Any]) -> float:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        took: list[float] = []
        while sum(took) < seconds * 1e3 or len(took) < 5:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            run()
            b.record()
            b.synchronize()
            took.append(a.elapsed_time(b))
        return float(np.median(took)) / 1e3

    row: dict[str, Any] = {"type": name}
    for key, q in {"encode": None, **({"importance": importance} if codec.takes_importance else {})}.items():
        took = median(lambda q=q: device.encode(codec, w, q))  # type: ignore[misc]
        data, bad = device.encode(codec, w, q)
        assert not bad.item()
        same = data[:few].cpu().numpy().tobytes() == codec.encode(host, q)["data"].tobytes()
        row[key] = {"cuda": w.numel() / took / 1e9, "same": same}
    took = median(lambda: device.decode(codec, data, tuple(w.shape)))
    decoded = device.decode(codec, data, tuple(w.shape))[:few].cpu().numpy()
    expected = codec.decode({"data": data[:few].cpu().numpy()}, host.shape)
    row["decode"] = {"cuda": w.numel() / took / 1e9, "same": decoded.tobytes() == expected.tobytes()}
    return row


def run_cuda(types: str | None, as_json: bool, seconds: float, rows: int) -> None:
    """The GPU's table."""
    if reason := native.cuda_missing():
        sys.exit(reason)
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    names = types.split(",") if types else [n for n in codecs.names() if native.cuda_has(n, "encode")]
    about = {"device": torch.cuda.get_device_name(), "shape": [rows, IN], "unit": "billion weights/s"}
    found = []
    if not as_json:
        print(f"{about['unit']}, {about['device']}, {rows} x {IN}; = bytes equal to the CPU's\n")
        print(f"{'type':8} {'encode':>10} {'importance':>12} {'decode':>10}")
    for name in names:
        row = measure_cuda(codecs.get(name).name, rows, seconds)
        found.append(row)
        if not as_json:
            cell = {k: f"{v['cuda']:8.2f} {'=' if v['same'] else '≠'}" for k, v in row.items() if k != "type"}
            print(f"{name:8} {cell['encode']:>10} {cell.get('importance', '–'):>12} {cell['decode']:>10}", flush=True)
    if as_json:
        print(json.dumps({**about, "types": found}, indent=1))


def cells(result: dict[str, Any] | None) -> str:
    if result is None:
        return f"{'–':>9} {'–':>9} {'–':>6} {'':>4}"
    ratio = result["ours"] / result["ggml"]
    return f"{result['ours']:9.1f} {result['ggml']:9.1f} {ratio:5.2f}x {'=' if result['same'] else '≠':>4}"


def main() -> None:
    names = [n for n in codecs.names() if native.has(n, "decode") and (isinstance(codecs.get(n), GgmlCodec) or n in FLOATS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help=f"comma-separated; default: {','.join(names)}")
    parser.add_argument("--isa", choices=native.isas(), help="instruction set of quantforge's kernels; default: the best")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time per side and operation")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=16384, help=f"of {IN} weights, with --device cuda")
    args = parser.parse_args()
    if args.device == "cuda":
        return run_cuda(args.types, args.json, args.seconds, args.rows)
    if not ggml_oracle.available:
        sys.exit(ggml_oracle.reason)
    if args.isa:
        os.environ["QUANTFORGE_ISA"] = args.isa
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((ROWS, IN)) * 0.02).astype(np.float32)
    importance = np.exp(rng.standard_normal(IN)).astype(np.float32)

    if not args.json:
        print(f"million weights/s of one thread, {native.isa()}; = bytes equal to ggml's\n")
        group = f"{'ours':>9} {'ggml':>9} {'ratio':>6} {'':>4}"
        print(f"{'':8} {'encode':^31} | {'encode with importance':^31} | {'decode':^31}\n{'type':8} {group} | {group} | {group}")
    rows = []
    for name in args.types.split(",") if args.types else names:
        row = measure(codecs.get(name).name, w, importance, args.seconds)
        rows.append(row)
        if not args.json:
            print(f"{row['type']:8} " + " | ".join(cells(row.get(k)) for k in ("encode", "importance", "decode")), flush=True)
    if args.json:
        print(json.dumps({"isa": native.isa(), "unit": "million weights/s, one thread", "types": rows}, indent=1))


if __name__ == "__main__":
    main()
