"""What the libraries can do, and how one is run: `worker.py` in another process gets a copy of the model directory
(links) and windows of calibration tokens, and leaves a checkpoint that our reader opens."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arrays import Parts
from ..codecs import Codec
from ..errors import BackendError, RecipeError, nearest
from ..methods import Method, Stats

if TYPE_CHECKING:
    import torch

    from ..calibration.corpus import Ints

log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between looks at what a library says."""
_PATIENCE = 10
"""Seconds that a library has to end when it is told to."""


@dataclass(frozen=True, slots=True)
class Known:
    """One library."""

    package: str
    """On PyPI."""
    works: str
    """The versions that are known to work, with what."""
    methods: Mapping[str, tuple[str, ...]]
    """--method -> layouts in which it writes; the first ones are the defaults."""
    schemes: Mapping[str, str] = field(default_factory=dict)
    """--type that is its own word for a type -> ours."""
    gptq_options: frozenset[str] = frozenset()
    cpu: bool = True


LIBRARIES = {
    "auto-gptq": Known(
        "auto-gptq",
        "auto-gptq 0.7.1 with transformers 4.47 to 4.57",
        {"gptq": ("gptq",)},
        gptq_options=frozenset({"act_order", "static_groups", "damping"}),
        cpu=False,
    ),
    "autoawq": Known("autoawq", "autoawq 0.2.9 with transformers 4.51.3 to 4.56.2", {"awq": ("awq",)}),
    "gptqmodel": Known(
        "gptqmodel",
        "gptqmodel 7.6.0 with transformers 5.22.2 and numpy 2.2.6",
        {"gptq": ("gptq",), "awq": ("awq",)},
        gptq_options=frozenset({"act_order", "static_groups", "damping"}),
    ),
    "llm-compressor": Known(
        "llmcompressor",
        "llmcompressor 0.14.0.1 with compressed-tensors 0.19.0 and transformers up to 5.17",
        {"gptq": ("compressed-tensors",), "awq": ("compressed-tensors",), "rtn": ("compressed-tensors",)},
        {
            "W4A16": "W4A16",
            "W4A16_ASYM": "W4A16_ASYM",
            "W8A16": "W8A16",
            "W8A8": "W8A8",
            "FP8": "fp8-tensor",
            "FP8_DYNAMIC": "FP8_DYNAMIC",
            "FP8_BLOCK": "FP8_BLOCK",
            "NVFP4A16": "NVFP4A16",
            "NVFP4": "NVFP4A16",
            "MXFP4A16": "MXFP4A16",
            "MXFP4": "MXFP4A16",
        },
        gptq_options=frozenset({"act_order", "damping"}),
    ),
    "auto-round": Known(
        "auto-round",
        "auto-round 0.16.1 with transformers 5.22.2 and gptqmodel 7.6.0",
        {"auto-round": ("gptq", "awq", "compressed-tensors"), "rtn": ("gptq", "awq", "compressed-tensors")},
    ),
}


@dataclass(frozen=True, slots=True)
class Made:
    """What a library left."""

    path: Path
    """A checkpoint directory, with the model's own tokenizer files."""
    version: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Library(Method):
    """A library as a `Method`, for whole models only."""

    backend: str
    method: str
    python: str
    layout: str = ""
    """In which it writes."""
    scheme: str | None = None
    """Its own word for the type; None: bits, group_size and symmetric."""
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool | None = None
    static_groups: bool | None = None
    damping: float | None = None

    def __post_init__(self) -> None:
        given = {k for k in ("act_order", "static_groups", "damping") if getattr(self, k) is not None}
        if self.method != "gptq" or not given <= self.known.gptq_options:
            for k in sorted(given if self.method != "gptq" else given - self.known.gptq_options):
                raise RecipeError(f"--{k.replace('_', '-')}: {self.backend}'s {self.method} has no such option")

    @property
    def known(self) -> Known:
        """What it can do."""
        return LIBRARIES[self.backend]

    @property
    def name(self) -> str:
        """As reports and files call it."""
        return f"{self.method} ({self.backend})"

    @property
    def needs(self) -> frozenset[str]:
        """See `Method.needs`."""
        return frozenset({"inputs"})

    def settings(self) -> Mapping[str, Any]:
        """See `Method.settings`."""
        return {"desc_act": bool(self.act_order), "static_groups": bool(self.static_groups)} if self.method == "gptq" else {}

    def takes(self, codec: Codec) -> bool:
        """Anything: the library has been asked for what it can do."""
        return True

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        """A library quantizes models, not matrices: see `run`."""
        raise RecipeError(f"{self.name} quantizes whole models; for a matrix use quantforge's own methods")

    @property
    def advice(self) -> str:
        """Which versions work, and that ours needs none."""
        own = f"--method {self.method}" if self.method in ("gptq", "awq", "rtn") else "methods"
        need = "needs" if own != "methods" else "need"
        return f"{self.known.works} works, in an environment that --backend-python names; the built-in {own} {need} no --backend"

    def run(self, model: Path, work: Path, ids: Ints, *, device: str = "cpu", threads: int = 1) -> Made:
        """Quantize a checkpoint directory.

        ids: calibration windows int[windows, ctx]. work: an empty directory, for anything. The library's output goes
        to the log.  Raises BackendError: not there, not compatible, failed; one line, whole output in the file it names.
        """
        copy, out, result = work / "model", work / "out", work / "result.json"
        copy.mkdir()
        for file in model.iterdir():
            if file.is_file() and file.suffix != ".py" and file.name != "config.json":
                (copy / file.name).symlink_to(file.absolute())
        shutil.copyfile(model / "config.json", copy / "config.json")
        settings = ("method", "layout", "scheme", "bits", "group_size", "symmetric", "act_order", "static_groups", "damping")
        job = {k: getattr(self, k) for k in settings} | {"library": self.backend, "device": device, "rows": ids.tolist()}
        job |= {"model": str(copy), "out": str(out), "result": str(result)}
        (work / "job.json").write_text(json.dumps(job))
        log.info("%s in %s: %d windows of %d tokens", self.name, self.python, *ids.shape)
        said = work / "log"
        code = self._process(work, said, threads)
        told: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {"versions": {}, "stage": "run"}
        if told["stage"] != "done":
            raise BackendError(self._what_happened(code, told, said.read_text("utf-8", "replace")))
        version = told["versions"].get(self.known.package, "")
        for file in copy.iterdir():  # the model's own tokenizer, whatever the library made of it
            if file.is_symlink() and not file.name.endswith((".safetensors", ".index.json", ".bin", ".gguf")):
                shutil.copyfile(file, out / file.name)
        return Made(out, version, told["seconds"])

    def _process(self, work: Path, said: Path, threads: int) -> int:
        """Run the worker in a session of its own, and end all of it if we are interrupted. Returns the exit status.

        said: the file for its output, which goes to the log as it comes.
        """
        foreign = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV") if self.python != sys.executable else ()
        environment = {k: v for k, v in os.environ.items() if k not in foreign}
        environment |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        environment |= {"TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_CPU_WORKERS": str(max(2, threads))}
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        command = [self.python, str(Path(__file__).with_name("worker.py")), str(work / "job.json")]
        with said.open("wb") as output, said.open(encoding="utf-8", errors="replace") as seen:
            try:
                # its stdin stays open as long as we are there: the worker ends when that closes
                child = subprocess.Popen(
                    command,
                    cwd=work,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as e:
                raise BackendError(f"--backend-python {self.python}: cannot be run: {e.strerror or e}") from None
            try:
                code = None
                while code is None:
                    with suppress(subprocess.TimeoutExpired):
                        code = child.wait(_LOOK)
                    for line in _lines(seen.read()):
                        log.info("%s: %s", self.backend, line)
                return code
            except BaseException:
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, signal.SIGTERM)
                    child.wait(_PATIENCE)
                raise
            finally:
                with suppress(ProcessLookupError):  # what it started may outlive it
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                assert child.stdin is not None
                child.stdin.close()

    def _what_happened(self, code: int, told: Mapping[str, Any], said: str) -> str:
        package, versions = self.known.package, told["versions"]
        where = f"{self.python} (Python {versions.get('python', '?')})"
        if told.get("missing"):
            return f"{self.backend}: no {package} in {where}; {self.advice}"
        have = ", ".join(f"{k} {v}" for k, v in versions.items() if k in (package, "transformers", "torch"))
        if told["stage"] == "import" and "error" in told:
            return f"{self.backend}: {have} in {where} cannot be imported ({told['error']}); {self.advice}"
        if "error" in told:
            why = told["error"]
        elif code < 0:
            why = f"ended by {signal.Signals(-code).name}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
        else:
            why = next(reversed(_lines(said)), f"exit status {code} and no word; is that a Python?")
        with tempfile.NamedTemporaryFile("w", prefix=f"quantforge-{self.backend}-", suffix=".log", delete=False) as kept:
            kept.write(said)
        return f"{self.backend} ({have or where}) failed: {why[:300]} (all it said: {kept.name}); {self.advice}"


def get(backend: str, method: str | None = None, python: str | os.PathLike[str] | None = None, device: str = "cpu") -> Library:
    """The library of that name with a method of its own (None: its usual one), in an interpreter (None: this one).

    Raises RecipeError: unknown, no such method, no such interpreter; BackendError: it needs a GPU.
    """
    known = LIBRARIES.get(backend.lower())
    if known is None:
        raise RecipeError(f"unknown back end {backend}{nearest(backend, LIBRARIES)}; known: {', '.join(LIBRARIES)}")
    if method is not None and method.lower() not in known.methods:
        others = [k for k, v in LIBRARIES.items() if method.lower() in v.methods]
        raise RecipeError(
            f"--backend {backend} has --method {' or '.join(known.methods)}, not {method}"
            + (f", which {' and '.join(others)} have" if others else "")
            + "; the built-in methods need no --backend"
        )
    found = shutil.which(os.path.expanduser(python)) if python is not None else sys.executable
    if found is None:
        raise RecipeError(f"--backend-python {os.fspath(python or '')}: there is no such interpreter")
    # not resolved: an environment's python is a link, and what it is depends on where that stands
    library = Library(
        backend=backend.lower(), method=(method or next(iter(known.methods))).lower(), python=os.path.abspath(found)
    )
    if not known.cpu and not device.startswith("cuda"):
        raise BackendError(f"{backend} quantizes only with CUDA: give --device cuda; {library.advice} and no GPU")
    return library


_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _lines(said: str) -> list[str]:
    """What a terminal would show line by line, without colours and empty ones."""
    return [line for raw in re.split(r"[\r\n]+", _ESCAPE.sub("", said)) if (line := raw.strip())]
