"""What a path is that people give for a model: found where it really lies, or named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import FormatError

_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_PICKLED_ADVICE = (
    "pickled PyTorch checkpoints are not loaded, because unpickling runs code from the file; convert with transformers "
    "from a source you trust: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
)
_REPOSITORY = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@[\w.-]+|/[\w./-]+)?")
_URL = re.compile(r"(?:https?|hf|s3|gs):/")
_TAGGED = re.compile(r"[\w.-]+:[\w.-]+")
_OTHER_WEIGHTS = {
    ".h5": "TensorFlow's",
    ".msgpack": "Flax's",
    ".onnx": "ONNX's",
    ".distcp": "of a distributed checkpoint of PyTorch",
    ".npz": "NumPy's",
    ".mar": "TorchServe's",
    ".gguf.part": "of a download that has not ended",
    ".incomplete": "of a download that has not ended",
}
_SAVE = "load it where it was trained and save it with save_pretrained, which writes *.safetensors"
_CACHED = re.compile(r"models--[^/]+")
_ADAPTED = re.compile(
    r"\.(lora_[AB]|lora_(embedding|magnitude)_\w+|base_layer|modules_to_save|original_module)\.|\.lora_(up|down)\."
)
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""How PEFT calls an adapter's files."""


def located(path: Path) -> Path:
    """Where a model lies: ~ is the home directory; a folder of the Hugging Face cache stands for its snapshot.

    Raises FormatError for a cache folder without one snapshot that could be meant.
    """
    path = path.expanduser()
    if path.name == "snapshots" and _CACHED.fullmatch(path.parent.name):
        path = path.parent
    if not (_CACHED.fullmatch(path.name) and path.is_dir()):
        return path
    snapshots = sorted(p for p in (path / "snapshots").glob("*") if p.is_dir())
    main = path / "refs" / "main"
    named = path / "snapshots" / main.read_text(errors="replace").strip()[:200] if main.is_file() else None
    if named in snapshots:
        return named
    if len(snapshots) != 1:
        raise FormatError(
            path, f"a folder of the Hugging Face cache with {len(snapshots)} snapshots; give one: {path}/snapshots/..."
        )
    return snapshots[0]


def refuse_adapter(path: Path) -> None:
    """Raise FormatError for an adapter (LoRA, PEFT) that stands in a model's place; return for everything else."""
    directory = path if path.is_dir() else path.parent
    only = {p.name for p in path.glob("*.safetensors")} <= {ADAPTER} if path.is_dir() else path.name == ADAPTER
    config = directory / ADAPTER_CONFIG
    if not only or not config.is_file() or (path.is_dir() and any(path.glob("*.safetensors.index.json"))):
        return
    try:
        base = json.loads(config.read_bytes()[: 1 << 20].decode("utf-8-sig")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError):
        base = None
    raise FormatError(
        path,
        f"an adapter (PEFT) of {base or 'another model'}, not a model; give that model, and the adapter as --lora {directory}",
    )


def refuse_unmerged(path: Path, names: Iterable[str]) -> None:
    """Raise FormatError for tensors of PEFT's layers, which would be taken apart from what they belong to."""
    adapted = [n for n in names if _ADAPTED.search(n)]
    if not adapted:
        return
    if any(".base_layer." in n or ".original_module." in n for n in adapted):
        raise FormatError(
            path,
            f"has layers with an adapter that is not merged (PEFT: {adapted[0]}); merge it (merge_and_unload) and save it, "
            "or give the model before it and the adapter as --lora DIRECTORY",
        )
    raise FormatError(path, f"has an adapter's tensors ({adapted[0]}); give the model, and the adapter as --lora DIRECTORY")


def name_missing(path: Path) -> FormatError | None:
    """What a path that does not exist looks like, or None."""
    text = str(path)
    if _URL.match(text):
        return FormatError(path, "an address, not a file; download the model first and give the file or directory")
    if match := _REPOSITORY.fullmatch(text):
        name = match["id"]
        return FormatError(
            path,
            "no such file; if it is a repository of the Hugging Face Hub, download it first "
            f"(hf download {name} --local-dir {name.rpartition('/')[2]}) and give the directory",
        )
    if _TAGGED.fullmatch(text):
        return FormatError(
            path, f"no such file; if it is a model of Ollama, `ollama show --modelfile {text}` names its GGUF file"
        )
    return None


def name_unknown(path: Path) -> FormatError:
    """What a path is that no format recognises. Raises OSError."""
    if path.is_file() and path.suffix in _PICKLED:
        return FormatError(path, _PICKLED_ADVICE)
    if path.suffix == ".json":
        return FormatError(path, f"a file beside a model; give the directory: {path.parent}")
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir())
        if cached := [n for n in inside if _CACHED.fullmatch(n)]:
            return FormatError(path, f"a Hugging Face cache; give one of its models: {', '.join(cached[:5])}")
        if ggufs := [n for n in inside if n.endswith(".gguf")]:
            return FormatError(path, f"a directory of GGUF files; give one of them: {', '.join(ggufs[:5])}")
        if any(Path(n).suffix in _PICKLED for n in inside):
            return FormatError(path, _PICKLED_ADVICE)
        for suffix, whose in _OTHER_WEIGHTS.items():
            if named := [n for n in inside if n.endswith(suffix)]:
                return FormatError(path, f"its weights are {whose} ({named[0]}), which are not read; {_SAVE}")
        if "zero_to_fp32.py" in inside:
            return FormatError(path, "a checkpoint of DeepSpeed; run its zero_to_fp32.py with --safe_serialization")
        if nested := [n for n in inside if any((path / n).glob("*.safetensors"))]:
            return FormatError(path, f"a directory of models; give one of them: {', '.join(nested[:5])}")
        if "config.json" in inside:
            return FormatError(path, "has a config.json but no *.safetensors; fetch the weights too")
    return FormatError(
        path,
        "not a model that quantforge knows: give a directory with config.json and *.safetensors, a .safetensors or a .gguf file",
    )
