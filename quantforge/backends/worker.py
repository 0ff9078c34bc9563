"""Run by another Python: `python worker.py JOB.json` quantizes a checkpoint directory with one library.

Imports nothing of quantforge and nothing beside the library's own dependencies, and works on Python 3.8; so do the modules
beside it that hold a `BACKEND`, of which it runs the one that the job names. And what these share.
The job: file (of the back end), model, out (directories), rows (windows of token ids), method, layout, scheme or bits,
group_size and symmetric, act_order, device, threads, result (where to say what happened, as JSON).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
import types
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping  # noqa: UP035 - Python 3.8

if __name__ == "__main__":  # what lies beside this file must not shadow anything
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]

BATCH = 4  # windows at once
Job = Dict[str, Any]  # noqa: UP006
"""What the file says that `main` gets."""


@dataclass(frozen=True)
class Backend:
    """One library: what it can do, and how it is told to."""

    name: str
    """As in --backend."""
    package: str
    """On PyPI."""
    module: str
    """What is imported."""
    works: str
    """The versions that are known to work, with what."""
    methods: Mapping[str, tuple[str, ...]]
    """--method -> layouts in which it writes; the first ones are the defaults."""
    quantize: Callable[[Job], None]
    """Run in the library's own Python: makes a checkpoint in job["out"] from the one in job["model"]."""
    schemes: Mapping[str, str] = field(default_factory=dict)
    """--type that is its own word for a type -> ours."""
    gptq_options: frozenset[str] = frozenset()
    """Of act_order, static_groups and damping, those that its gptq has."""
    cpu: bool = True
    """False: it needs CUDA."""


def examples(job: Job) -> list[dict[str, list[int]]]:
    """Rows as tokenizers give them."""
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]


def given(job: Job, **names: str) -> Job:
    """Options that were given, under the library's names."""
    return {theirs: job[ours] for ours, theirs in names.items() if job[ours] is not None}


def read(path: str) -> Any:
    """A JSON file."""
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write(path: str, value: Any) -> None:
    """A JSON file."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)


def versions(package: str) -> dict[str, str]:
    """Versions that explain most failures."""
    from importlib import metadata

    packages = {"python": sys.version.split()[0]}
    for name in (package, "transformers", "torch"):
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return packages


def old_names(path: str, transformers: str) -> None:
    """Give a configuration of transformers 5 the names that older ones know; they would take defaults, silently."""
    config = read(path)
    rope = config.get("rope_parameters")
    if int(transformers.split(".")[0]) >= 5:
        return
    if isinstance(rope, dict) and "rope_theta" not in config:
        config["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write(path, config)


def flatten(out: str) -> None:
    """Some libraries make a directory in the directory."""
    inside = [os.path.join(out, name) for name in os.listdir(out)]
    if len(inside) == 1 and os.path.isdir(inside[0]):
        for name in os.listdir(inside[0]):
            os.rename(os.path.join(inside[0], name), os.path.join(out, name))
        os.rmdir(inside[0])


def end_with_parent() -> None:
    """Whoever started this keeps stdin open; when it is gone, so is this process and what it started."""
    while sys.stdin.buffer.read(4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def last_line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load(path: str) -> Backend:
    """The `BACKEND` of a file. It imports `quantforge.backends.worker`, which here is this module, and nothing else of ours."""
    for name in ("quantforge", "quantforge.backends"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules["quantforge.backends.worker"] = sys.modules[__name__]
    spec = importlib.util.spec_from_file_location("quantforge.backends.chosen", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend: Backend = module.BACKEND
    return backend


def main(path: str) -> int:
    """Do the job. 0, or 1 with the error in the result file."""
    job = read(path)
    library = load(job["file"])
    told: dict[str, Any] = {"versions": versions(library.package), "stage": "import"}
    began = time.time()
    try:
        try:
            importlib.import_module(library.module)
        except ModuleNotFoundError as e:
            told["missing"] = e.name == library.module
            raise
        told["stage"] = "run"
        old_names(os.path.join(job["model"], "config.json"), told["versions"].get("transformers", "5"))
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(0)
        library.quantize(job)
        flatten(job["out"])
        told["stage"] = "done"
    except BaseException as e:  # libraries also exit
        traceback.print_exc()
        told["error"] = last_line(e)
    told["seconds"] = time.time() - began
    write(job["result"], told)
    return int("error" in told)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a library must not hold up a finished job
