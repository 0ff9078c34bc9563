"""Million weights per second and thread of every ggml type: quantforge against ggml, in turns in one process.

ggml is the one inside the xllamacpp wheel. Both sides are timed by the CPU time of the calling
thread, the best of several turns; ggml writes into a buffer made beforehand, quantforge through
`Codec.encode` and `Codec.decode`, allocation included.

    python benchmarks/encode.py [--types Q4_K,Q6_K] [--isa avx2] [--json] [--seconds 0.3]
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
    args = parser.parse_args()
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
