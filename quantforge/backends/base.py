"""What the libraries can do, and how one is run: `worker.py` in another process gets a copy of the model directory
(links) and windows of calibration tokens, and leaves a checkpoint that our reader opens."""

from __future__ import annotations

import inspect
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
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arrays import Parts
from ..codecs import Codec
from ..discovery import Registry
from ..errors import BackendError, RecipeError, UnsupportedError, nearest
from ..methods import Method, Stats
from .worker import Backend

if TYPE_CHECKING:
    import torch

    from ..calibration.corpus import Ints

log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between looks at what a library says."""
_PATIENCE = 10
"""Seconds that a library has to end when it is told to."""


def _check(given: Any) -> Backend:
    if not isinstance(given, Backend):
        raise UnsupportedError(f"{given!r} is no instance of quantforge.backends.Backend")
    return given


_registry: Registry[Backend] = Registry(__package__, "back end", _check, marker="BACKEND")
register = _registry.register


def names() -> list[str]:
    """Names of all back ends."""
    return list(_registry.all())


@dataclass(frozen=True, slots=True)
class Made:
    """What a library left."""

    path: Path
    """A checkpoint directory, with the model's own tokenizer files."""
    version: str
    seconds: float


@dataclass(frozen=True)
class Library(Method):
    """A library as a `Method`, for whole models only. Raises RecipeError: unknown, no such method, interpreter or option."""

    backend: str
    """A name of `names`."""
    _: KW_ONLY
    python: str | os.PathLike[str] | None = None
    """The interpreter that has it; None: this one."""
    method: str | None = None
    """One of its own; None: its usual one."""
    act_order: bool | None = None
    static_groups: bool | None = None
    damping: float | None = None
    """These three as in `methods.GPTQ`; None: as the library has it."""
    layout: str = ""
    """In which it writes. This and the rest is what `plan` makes of the recipe."""
    scheme: str | None = None
    """Its own word for the type; None: bits, group_size and symmetric."""
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        name = self.backend
        if (known := _registry.find(name)) is None:
            raise RecipeError(f"unknown back end {name}{nearest(name, names())}; known: {', '.join(names())}")
        method = (self.method or next(iter(known.methods))).lower()
        if method not in known.methods:
            others = [k for k, v in _registry.all().items() if method in v.methods]
            raise RecipeError(
                f"--backend {name} has --method {' or '.join(known.methods)}, not {self.method}"
                + (f", which {' and '.join(others)} have" if others else "")
                + "; the built-in methods need no --backend"
            )
        interpreter = sys.executable if self.python is None else shutil.which(os.path.expanduser(self.python))
        if interpreter is None:
            raise RecipeError(f"--backend-python {os.fspath(self.python or '')}: there is no such interpreter")
        for option in ("act_order", "damping", "static_groups"):
            if getattr(self, option) is not None and (method != "gptq" or option not in known.gptq_options):
                raise RecipeError(f"--{option.replace('_', '-')}: {known.name}'s {method} has no such option")
        # not resolved: an environment's python is a link, and what it is depends on where that stands
        for field, value in (("backend", known.name), ("method", method), ("python", os.path.abspath(interpreter))):
            object.__setattr__(self, field, value)

    def check(self, device: str) -> None:
        """Raises BackendError where it needs another device."""
        if not self.known.cpu and not device.startswith("cuda"):
            raise BackendError(f"{self.backend} quantizes only with CUDA: give --device cuda; {self.advice} and no GPU")

    @property
    def known(self) -> Backend:
        """What it can do."""
        return _registry.get(self.backend)

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
        job = {k: getattr(self, k) for k in settings} | {
            "file": os.path.abspath(inspect.getfile(self.known.quantize)),
            "device": device,
            "rows": ids.tolist(),
        }
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
        command = [os.fspath(self.python or sys.executable), str(Path(__file__).with_name("worker.py")), str(work / "job.json")]
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


_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _lines(said: str) -> list[str]:
    """What a terminal would show line by line, without colours and empty ones."""
    return [line for raw in re.split(r"[\r\n]+", _ESCAPE.sub("", said)) if (line := raw.strip())]
