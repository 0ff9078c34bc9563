"""Whole conversion of a synthetic 1 B-parameter Llama (bf16, 2 shards): quantforge against the two-program way.

    python benchmarks/convert.py [--types Q4_K_M,Q4_0] [--threads 2] [--work DIR]
           [--llama-cpp DIR --llama-quantize BIN]

DIR is a llama.cpp checkout (for convert_hf_to_gguf.py), BIN its built llama-quantize. Without them
only quantforge is measured. Each step is a process of its own; peak RSS is the kernel's figure
for it, with memory-mapped input pages counted apart (RssAnon is what the program itself holds).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from quantforge.demo import MODEL  # noqa: E402


def save_sparse(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """bf16 zeros that take no room on disk: for memory figures of models larger than the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def make_model(directory: Path, layers: int, hidden: int, feed_forward: int, seed: int = 0, sparse: bool = False) -> int:
    """A random Llama with the demo model's tokenizer; returns its number of parameters."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    heads, kv, vocab = hidden // 64, hidden // 256, 4096
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers, "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MODEL / name, directory)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {p + "self_attn.q_proj.weight": (hidden, hidden), p + "self_attn.o_proj.weight": (hidden, hidden)}
        shapes |= {p + f"self_attn.{x}_proj.weight": (kv * 64, hidden) for x in "kv"}
        shapes |= {p + f"mlp.{x}_proj.weight": (feed_forward, hidden) for x in ("gate", "up")}
        shapes |= {p + "mlp.down_proj.weight": (hidden, feed_forward)}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    names = list(shapes)
    index = {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{shard:05d}-of-00002.safetensors"
        index |= dict.fromkeys(part, file)
        if sparse:
            save_sparse({name: shapes[name] for name in part}, directory / file)
            continue
        tensors = {}
        for name in part:
            w = rng.standard_normal(shapes[name], np.float32) * 0.02 + (1.0 if "norm" in name else 0.0)
            tensors[name] = w.astype(ml_dtypes.bfloat16)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(int(np.prod(s)) for s in shapes.values())


def run(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """Wall and CPU seconds, peak RSS and peak anonymous memory (MB) of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        peaks = {"VmHWM": 0, "RssAnon": 0}

        def watch() -> None:
            while process.poll() is None:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                except OSError:
                    return
                for line in lines:
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]))
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        watcher.join()
        if code:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed ({code}):\n{log.read().decode(errors='replace')[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall": time.perf_counter() - began,
        "cpu": cpu,
        "rss": peaks["VmHWM"] / 1024,
        "anon": peaks["RssAnon"] / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="Q4_K_M,Q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where quantforge encodes: cpu or cuda")
    parser.add_argument("--layers", type=int, default=22, help="22 layers of 2048 × 5632 make 1.0 B parameters")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=5632)
    parser.add_argument("--sparse", action="store_true", help="weights are zeros in sparse files: memory only, no speed")
    parser.add_argument("--work", type=Path, help="where the model and the results go (default: a temporary directory)")
    parser.add_argument("--llama-cpp", type=Path, help="a llama.cpp checkout")
    parser.add_argument("--llama-quantize", type=Path, help="the built llama-quantize")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    work = a.work or Path(tempfile.mkdtemp(prefix="quantforge-bench-"))
    work.mkdir(exist_ok=True)
    try:
        model = work / "model"
        if not model.exists():
            print(
                f"{make_model(model, a.layers, a.hidden, a.feed_forward, sparse=a.sparse) / 1e9:.2f} B parameters",
                file=sys.stderr,
            )
        rows = []

        def step(name: str, out: Path, command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
            out.unlink(missing_ok=True)
            row = run(command, env)
            written = out.stat().st_size / 1e9
            rows.append({"step": name, **row, "written_gb": written})
            print(
                f"{name:<34} wall {row['wall']:6.1f} s  cpu {row['cpu']:6.1f} s  peak RSS {row['rss']:5.0f} MB "
                f"(anonymous {row['anon']:4.0f} MB)  written {written:.2f} GB",
                flush=True,
            )
            return row

        base = None
        f16 = work / "bf16.gguf"
        if a.llama_cpp and a.llama_quantize:
            # it knows pre-tokenizers by a hash of one vocabulary each; the demo model's is not among them
            patch = (
                f"import sys; sys.path.insert(0, {str(a.llama_cpp)!r}); import convert_hf_to_gguf as c; "
                "c.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'; c.main()"
            )
            script = [sys.executable, "-c", patch, str(model), "--outfile", str(f16), "--outtype", "bf16"]
            base = step("convert_hf_to_gguf.py bf16", f16, script, {"PYTHONPATH": str(a.llama_cpp / "gguf-py")})
        for kind in a.types.split(","):
            out = work / f"quantforge-{kind}.gguf"
            command = [sys.executable, "-m", "quantforge", "convert", str(model), str(out), "--type", kind, "--force"]
            ours = step(f"quantforge convert {kind}", out, [*command, "--threads", str(a.threads), "--device", a.device])
            if base:
                out = work / f"llama-{kind}.gguf"
                theirs = step(f"llama-quantize {kind}", out, [str(a.llama_quantize), str(f16), str(out), kind, str(a.threads)])
                wall = (base["wall"] + theirs["wall"]) / ours["wall"]
                cpu = (base["cpu"] + theirs["cpu"]) / ours["cpu"]
                print(f"{kind}: {wall:.1f} × faster than the two programs by wall clock, {cpu:.1f} × by CPU time", flush=True)
                rows.append({"step": f"ratio {kind}", "wall_ratio": wall, "cpu_ratio": cpu})
        if a.json:
            print(json.dumps(rows))
    finally:
        if a.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
