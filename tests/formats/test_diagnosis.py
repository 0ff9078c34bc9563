"""What people give for a model: read right, or one line that names the thing and says what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantforge import formats
from quantforge.errors import FormatError

W = np.arange(8, dtype=np.float32)


def write(path: Path, config: Any = None, name: str = "model.safetensors", **tensors: np.ndarray) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"w": W}, path / name)
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def adapter(path: Path, base: Any = "org/base", **files: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({"base_model.model.x.lora_A.weight": W}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    return path


def cached(path: Path, *revisions: str, main: str | None = None) -> Path:
    folder = path / "models--org--name"
    for i, revision in enumerate(revisions):
        write(folder / "snapshots" / revision, w=W + i)
    if main is not None:
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(main)
    folder.mkdir(exist_ok=True)
    return folder


def shard(path: Path, *numbers: int) -> Path:
    for i in numbers:
        write(path, name=f"model-{i:05}-of-00003.safetensors", **{f"w{i}": W})
    return path


def pickled(path: Path) -> Path:
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return path


def beside(path: Path, name: str) -> Path:
    path.mkdir()
    (path / name).write_bytes(b"x")
    (path / "config.json").write_text("{}")
    return path


def with_bom(path: Path) -> Path:
    write(path)
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    return path


def full_model_and_adapter(path: Path) -> Path:
    return adapter(write(path))


def copies(path: Path, second: np.ndarray) -> Path:
    save_file({"w": W, "a": W}, write(path) / "model-00001-of-00002.safetensors")
    save_file({"w": second, "b": W}, path / "model-00002-of-00002.safetensors")
    (path / "model.safetensors").unlink()
    return path


def tensors(path: Path, *names: str) -> Path:
    return write(path, None, "model.safetensors", **dict.fromkeys(names, W))


Q = "model.layers.0.self_attn.q_proj"


READ: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "a directory": (lambda p: write(p / "m"), {"w"}),
    "a cache folder with one snapshot": (lambda p: cached(p, "abc"), {"w"}),
    "a cache folder with refs/main": (lambda p: cached(p, "abc", "def", main="abc"), {"w"}),
    "the snapshots of a cache folder": (lambda p: cached(p, "abc") / "snapshots", {"w"}),
    "a first shard, the others beside it": (lambda p: shard(p, 1, 2, 3) / "model-00001-of-00003.safetensors", {"w1", "w2", "w3"}),
    "config.json with a byte order mark": (lambda p: with_bom(p / "m"), {"w"}),
    "a full model with a leftover adapter": (lambda p: full_model_and_adapter(p / "m"), {"w"}),
    "a shard and an adapter": (lambda p: adapter(shard(p / "m", 1, 2, 3)), {"w1", "w2", "w3"}),
    "two copies of a tensor": (lambda p: copies(p / "m", W), {"w", "a", "b"}),
}

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an adapter": (lambda p: adapter(p / "a"), r"adapter \(PEFT\) of org/base.*--lora"),
    "an adapter's file": (lambda p: adapter(p / "a") / "adapter_model.safetensors", r"adapter \(PEFT\) of org/base"),
    "an adapter of who knows what": (lambda p: adapter(p / "a", base=None), r"adapter \(PEFT\) of another model"),
    "a first shard alone": (lambda p: shard(p / "m", 1) / "model-00001-of-00003.safetensors", "missing: file 2 of 3"),
    "a directory of a first shard": (lambda p: shard(p / "m", 1), "missing: file 2 of 3"),
    "an adapter without its config": (lambda p: tensors(p / "m", f"{Q}.lora_A.weight"), f"an adapter's tensors.*{Q}.*--lora"),
    "an adapter of another tool": (lambda p: tensors(p / "m", "unet.lora_up.weight"), "an adapter's tensors"),
    "layers with an unmerged adapter": (
        lambda p: tensors(p / "m", f"{Q}.base_layer.weight", f"{Q}.lora_A.default.weight", "w"),
        "adapter that is not merged.*merge_and_unload.*--lora",
    ),
    "a head with its copy": (
        lambda p: tensors(p / "m", "lm_head.original_module.weight", "lm_head.modules_to_save.default.weight"),
        "adapter that is not merged",
    ),
    "a whole cache": (lambda p: cached(p, "abc").parent, "a Hugging Face cache; give one of its models: models--org--name"),
    "a cache folder without a snapshot": (lambda p: cached(p), "cache with 0 snapshots"),
    "a cache folder with several": (lambda p: cached(p, "abc", "def"), "cache with 2 snapshots; give one"),
    "a repository id": (lambda p: Path("meta-llama/Llama-3.2-1B"), "hf download meta-llama/Llama-3.2-1B"),
    "a repository id with a revision": (lambda p: Path("org/name@main"), "hf download org/name "),
    "a file of a repository": (lambda p: Path("org/name/model.gguf"), "hf download org/name "),
    "an address": (lambda p: Path("https://example.org/m.gguf"), "an address, not a file; download"),
    "a model of Ollama": (lambda p: Path("llama3.2:1b"), "ollama show --modelfile llama3.2:1b"),
    "weights of TensorFlow": (lambda p: beside(p / "m", "tf_model.h5"), "its weights are TensorFlow's.*save_pretrained"),
    "a distributed checkpoint": (lambda p: beside(p / "m", "__0_0.distcp"), "distributed checkpoint of PyTorch"),
    "DeepSpeed's": (lambda p: beside(p / "m", "zero_to_fp32.py"), "DeepSpeed; run its zero_to_fp32.py"),
    "half a download": (lambda p: beside(p / "m", "model.safetensors.incomplete"), "a download that has not ended"),
    "a directory of checkpoints": (
        lambda p: write(p / "m" / "checkpoint-5").parent,
        "directory of models; give one.*checkpoint-5",
    ),
    "config.json itself": (lambda p: write(p / "m") / "config.json", "a file beside a model; give the directory"),
    "a home of nobody": (lambda p: Path("~nobody-has-this-name/m"), "~nobody-has-this-name/m"),
    "pickles": (lambda p: pickled(p / "m"), "not loaded, because unpickling runs code"),
    "a pickle": (lambda p: pickled(p / "m") / "pytorch_model.bin", "not loaded, because unpickling runs code"),
    "two tensors of one name": (lambda p: copies(p / "m", W + 1), "w is also in model-00001-of-00002.*other bytes"),
}


@pytest.mark.parametrize("kind", READ)
def test_read_right(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, names = READ[kind]
    with caplog.at_level(logging.WARNING), formats.open_path(make(tmp_path)) as source:
        assert set(source.weights) == names
        for name in names:
            np.testing.assert_array_equal(source.read(name).decode(), W)
    assert ("adapter" in caplog.text) == ("adapter" in kind)


@pytest.mark.parametrize("kind", REFUSED)
def test_or_named(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(FormatError, match=message) as refused:
        formats.open_path(make(tmp_path))
    assert "\n" not in str(refused.value)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "m")
    with formats.open_path("~/m") as source:
        assert source.path == tmp_path / "m"
