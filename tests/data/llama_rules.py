"""Makes llama_rules.json: the types that llama-quantize chooses for every registered architecture and preset.

    python -m tests.data.llama_rules path/to/libllama.so

Every sample of the registry is made as a random model, its tensors are widened to rows that every type divides (no
fallbacks: llama_quantize.json has those), and llama.cpp's own `llama_model_quantize` plans it, dry, for every preset,
without and with importance.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import quantforge as qf
from quantforge import archs, codecs, formats
from quantforge.archs.weight import Weight
from quantforge.formats import Header, Stored
from quantforge.recipes.presets import FLOATS, PRESETS, kept

TABLE = Path(__file__).with_suffix(".json")
QUANTIZED = [p for p in PRESETS if PRESETS[p].base not in (*FLOATS, "NVFP4")]  # llama-quantize writes no NVFP4


class _Imatrix(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    _fields_ = (
        *((k, ctypes.c_int32) for k in ("threads", "file_type", "output_type", "embedding_type")),
        *((k, ctypes.c_bool) for k in ("requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(_Imatrix)),
        *((k, ctypes.c_void_p) for k in ("kv_overrides", "tensor_types", "prune_layers")),
        ("buffer", ctypes.c_size_t),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Quantizer:
    """llama.cpp's library."""

    def __init__(self, path: str) -> None:
        self.lib, self.text = ctypes.CDLL(path), ""

        def note(level: int, text: bytes, _: object) -> None:
            self.text += text.decode("utf-8", "replace")

        self._note = _Log(note)
        self.lib.llama_log_set(self._note, None)
        self.lib.llama_model_quantize_default_params.restype = _Params
        self.lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params)]

    def plan(self, path: Path, file_type: int, importance: bool) -> dict[str, str]:
        """Type by tensor."""
        params = self.lib.llama_model_quantize_default_params()
        assert (params.output_type, params.quantize_output, params.dry_run) == (params.embedding_type, True, False)
        params.file_type, params.dry_run = file_type, True
        ones = np.ones(256, np.float32)
        entries = (_Imatrix * 2)(_Imatrix(b"blk.0.attn_q.weight", ones.ctypes.data, ones.size), _Imatrix(None, None, 0))
        if importance:
            params.imatrix = entries
        self.text = ""
        status = self.lib.llama_model_quantize(str(path).encode(), b"unused", ctypes.byref(params))
        found = {}
        for m in re.finditer(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), (.*)$", self.text, re.MULTILINE):
            to = re.search(r"\((\w+)\)$", m[3])
            found[m[1]] = (to[1] if to else m[2]).upper()
        assert status == 0 and found, self.text
        return found


def samples() -> Iterator[tuple[str, list[Weight], dict[str, Any]]]:
    """Title, tensors with wide rows and metadata of every sample in the registry."""
    from tests.archs import models

    for name, sample in models.names():
        with tempfile.TemporaryDirectory() as directory:
            models.make(Path(directory), name, sample)
            with qf.open(directory) as source:
                config, shapes = source.checkpoint_config(), {n: s.shape for n, s in source.weights.items()}
                arch = archs.find(config)
                weights = arch.weights(config, shapes, source.optional)
                yield f"{name} {sample}".strip(), [widened(w) for w in weights], arch.metadata(config, {}, shapes)


def widened(w: Weight) -> Weight:
    """The same tensor with rows that every type divides, and few of them."""
    *rows, n = w.shape
    wide = n if not rows or re.search(r"conv(1d)?(_[qkv])?\.weight", w.name) else 256
    return Weight(w.name, (*(min(r, 3) for r in rows), wide), ())


def stored(w: Weight) -> str:
    """What convert_hf_to_gguf --outtype bf16 makes of it."""
    return kept(w, codecs.get("BF16"), "F32" if len(w.shape) < 2 else "BF16").name


def write(path: Path, weights: list[Weight], metadata: dict[str, Any]) -> None:
    """A GGUF file of zeros."""
    header = Header(metadata, {w.name: Stored(codecs.get(stored(w)), w.shape) for w in weights})
    sink = formats.get("gguf").create(path, header)
    with sink:
        for w in weights:
            codec = codecs.get(stored(w))
            sink.write(w.name, codec.encode(np.zeros(w.shape, np.float32)), 0)
        sink.commit()


def compress(tensors: dict[str, list[int]]) -> dict[str, Any]:
    """Tensor -> [row, *shape], those of the blocks together: role -> {"row, *shape": layers}; vectors are left out."""
    found: dict[str, Any] = {}
    for name, entry in tensors.items():
        if len(entry) < 3:
            continue
        if match := re.match(r"blk\.(\d+)\.(.*)", name):
            found.setdefault(match[2], {}).setdefault(",".join(map(str, entry)), []).append(int(match[1]))
        else:
            found[name] = entry
    return found


def expand(tensors: dict[str, Any]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Inverse of `compress`: name, row, shape."""
    for role, entry in tensors.items():
        if isinstance(entry, list):
            yield role, entry[0], tuple(entry[1:])
            continue
        for key, layers in entry.items():
            row, *shape = map(int, key.split(","))
            yield from ((f"blk.{i}.{role}", row, tuple(shape)) for i in layers)


NEEDED = re.compile(r"general\.architecture|.*\.(block_count|attention\.head_count(_kv)?|expert_count)")


def main(library: str) -> None:
    """Plan everything and write the table."""
    quantizer = Quantizer(library)
    columns = [(p, importance) for p in QUANTIZED for importance in (False, True)]
    rows: dict[str, int] = {}
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for title, weights, metadata in samples():
            path = Path(tmp) / "model.gguf"
            write(path, weights, metadata)
            plans = [quantizer.plan(path, PRESETS[p].file_type, importance) for p, importance in columns]
            chosen = {w.name: " ".join(plan[w.name] for plan in plans) for w in weights}
            table = {w.name: [rows.setdefault(chosen[w.name], len(rows)), *w.shape] for w in weights}
            path.unlink()
            known = {k: np.asarray(v).tolist() for k, v in metadata.items() if NEEDED.fullmatch(k)}
            models[title] = {"metadata": known, "tensors": compress(table)}
            print(title, len(rows), file=sys.stderr)
    save({"columns": [f"{p} imatrix" if i else p for p, i in columns], "rows": list(rows), "models": models})


def save(table: dict[str, Any]) -> None:
    """Write the table, a model on each line."""
    text = json.dumps(table, separators=(",", ":"))
    TABLE.write_text(re.sub(r'("(?:columns|rows|models)":[\[{]|\},(?="[A-Z][A-Za-z0-9]+[ "]))', r"\1\n", text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
