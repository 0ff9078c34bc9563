"""What a GPU is needed for, in two calls of a few minutes each, the most telling first.

    python benchmarks/gpu_session.py first OUT [--seconds 500]      is it right, how fast is it
    python benchmarks/gpu_session.py second OUT [--seconds 240]     encoding, GPTQ, models, tuning
    ... --device cpu                                                a rehearsal, tiny, without a GPU

What `make gpu-pack` left in out/gpu-pack (libraries, packages, other libraries' kernels) is used where it is there.
OUT has, from the first second on: session.jsonl (a line for each step and each check), tests.jsonl (for each test),
bench.json, models.json, tune.json, readme.md (tables), log (what the steps print). A step that says nothing for long, or
takes longer than its share, is killed and named; the others run all the same, but after a smoke test that fails nothing does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "out" / "gpu-pack"
SMOKE = 120
"""Seconds: half a minute is usual, but a fresh machine may read its libraries slowly."""
QUIET = 150
"""Seconds without a word after which a step hangs."""
GRACE = 6
"""Seconds that a step has to write what it knows when it is told to stop."""


@dataclass
class Step:
    """A process, and what it may take."""

    name: str
    command: list[str]
    seconds: float
    least: float = 10
    """With less time left it is not begun."""
    variables: dict[str, str] = field(default_factory=dict)


class Session:
    """Runs steps until the time is over."""

    def __init__(self, out: Path, seconds: float, slow: float) -> None:
        """slow: what a step's own time is multiplied with."""
        self.out, self.until, self.slow = out, time.monotonic() + seconds, slow
        self.process: subprocess.Popen[bytes] | None = None
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def say(self, row: dict[str, Any]) -> None:
        """A line for who watches, and one for the file."""
        print(" ".join(str(v) for v in row.values() if v not in ("", None)), flush=True)
        with (self.out / "session.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def run(self, step: Step) -> bool:
        """True if it ended well."""
        seconds = min(self.slow * step.seconds, self.left - GRACE)
        if seconds < step.least:
            self.say({"step": step.name, "result": "left out:", "why": f"{max(0, self.left):.0f} s left"})
            return False
        began = time.monotonic()
        path = self.out / "log"
        with path.open("ab") as log:
            log.write(f"\n==== {step.name}\n".encode())
            log.flush()
            start = log.tell()
            self.process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | step.variables,
            )
            why = self._watch(path, began + seconds)
        took = time.monotonic() - began
        code = self.process.returncode
        result = f"killed after {took:.0f} s:" if why else f"{'ok' if code == 0 else f'exit status {code}'} after {took:.0f} s"
        self.say({"step": step.name, "result": result, "why": why})
        if code != 0:
            self.failed.append(step.name)
            with path.open("rb") as log:
                log.seek(start)
                print(b"\n".join(log.read().splitlines()[-12:]).decode(errors="replace"), flush=True)
        return code == 0

    def _watch(self, log: Path, until: float) -> str:
        """Wait for the process; why it was killed, or nothing."""
        assert self.process
        size, heard = -1, time.monotonic()
        while True:
            try:
                self.process.wait(0.2)
                return ""
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if (written := log.stat().st_size) != size:
                size, heard = written, now
            if now > until or now > heard + self.slow * QUIET:
                self.stop()
                return f"it hangs, nothing for {now - heard:.0f} s" if now < until else "its time is over"

    def stop(self) -> None:
        """End the process that runs, and all that it started."""
        process = self.process
        if process is None or process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)
        with suppress(ProcessLookupError):  # what outlived it
            os.killpg(process.pid, signal.SIGKILL)


def unpacked() -> dict[str, str]:
    """Put the pack's libraries in place; variables that show the rest of it to processes."""
    for library in sorted((PACK / "lib").glob("*.so")):
        fresh = ROOT / "quantforge" / f"{library.name}.new"
        shutil.copyfile(library, fresh)
        os.replace(fresh, ROOT / "quantforge" / library.name)
    places = [str(ROOT), str(PACK / "site"), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(p for p in places if p), "PYTHONUNBUFFERED": "1"}
    if (marlin := PACK / "peers" / "marlin").exists():
        found |= {"MARLIN": str(marlin), "MARLIN_BUILD": str(marlin)}
    if (ggml := PACK / "peers" / "ggml").exists():
        found["GGML"] = str(ggml)
    return found


def has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def tests(part: str, out: Path, seconds: float) -> Step:
    """pytest on a part of the `gpu` tests."""
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "benchmarks.on_gpu.order",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "--tb=short",
    ]
    workers = min(12, os.cpu_count() or 1)
    command += ["-n", str(workers), "--max-worker-restart", "40", "--maxschedchunk", "1"] if has("xdist") else []
    command += ["--timeout", "120", "--timeout-method", "thread"] if has("pytest_timeout") else []
    variables = {"QUANTFORGE_GPU_TESTS": part, "QUANTFORGE_GPU_RESULTS": str(out / "tests.jsonl")}
    return Step(f"tests, {part}", [*command, *files], seconds, least=30, variables=variables)


def bench(a: argparse.Namespace, name: str, seconds: float, *options: str) -> Step:
    """benchmarks/gpu.py into `name`.json; it ends by itself a little before its time."""
    small = ["--smoke"] if a.device == "cpu" else []
    command = [sys.executable, "benchmarks/gpu.py", "--device", a.device, *small, *options, "--json", str(a.out / f"{name}.json")]
    return Step(name, [*command, "--minutes", f"{max(0.2, (seconds - 25) / 60):.2f}"], seconds, least=40)


def smoke(a: argparse.Namespace, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.on_gpu.smoke", "--device", a.device, *options]


def sanitizer(a: argparse.Namespace) -> Step | None:
    """memcheck of two kernels."""
    tool = shutil.which("compute-sanitizer") or next(iter(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)
    if tool is None and a.device != "cpu":
        return None
    watched = (
        [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"] if tool and a.device != "cpu" else []
    )
    return Step("sanitize", [*watched, *smoke(a, "--only", "product", "--codecs", "Q4_0,IQ2_XXS")], 60, least=25)


def first(a: argparse.Namespace, session: Session) -> None:
    """Whether it works; whether every kernel is right; how fast products are."""
    lines = ["--json", str(a.out / "session.jsonl")]
    if not session.run(Step("smoke", smoke(a, *lines), SMOKE)):
        session.say({"step": "end", "result": "nothing else is worth trying"})
        return
    session.run(tests("first", a.out, 0.35 * session.left))
    session.run(bench(a, "bench", min(200, session.left - 60), "--quick", "--parts", "products"))
    tables(a, session, "bench")
    if step := sanitizer(a):
        session.run(step)
    else:
        session.say({"step": "sanitize", "result": "left out:", "why": "no compute-sanitizer here"})
    session.run(tests("rest", a.out, session.left))
    verdict(a.out, session)


def second(a: argparse.Namespace, session: Session) -> None:
    """What needs more than a kernel."""
    session.run(bench(a, "models", 0.75 * session.left, "--parts", "encode,gptq,model"))
    tuned = ["--shapes", "8192x8192", "--m", "8,16,32,64,128,256,512"] if a.device == "cuda" else ["--m", "9"]
    which = ["--codecs", "Q4_K,Q4_0,Q8_0,Q6_K,IQ2_XXS"]
    session.run(bench(a, "tune", session.left, "--tune", "--ways", "--no-peers", "--parts", "products", *tuned, *which))
    tables(a, session, "bench", "models", "tune")


def tables(a: argparse.Namespace, session: Session, *names: str) -> None:
    """readme.md of what there is."""
    files = [str(p) for name in names if (p := a.out / f"{name}.json").exists()]
    if not files:
        return
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--readme", *files], cwd=ROOT, capture_output=True, text=True)
    (a.out / "readme.md").write_text(done.stdout or done.stderr)
    print(done.stdout[:7000], flush=True)


def verdict(out: Path, session: Session) -> None:
    """How many tests there were, and which failed."""
    path = out / "tests.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    count = Counter(r["outcome"] for r in rows)
    for row in [r for r in rows if r["outcome"] == "failed"][:30]:
        print(f"failed: {row['test']}: {row.get('why', '')[:150]}", flush=True)
    session.say({"step": "tests", "result": ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())) or "none"})


CALLS: dict[str, tuple[Callable[[argparse.Namespace, Session], None], float]] = {"first": (first, 500), "second": (second, 240)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("call", choices=CALLS)
    p.add_argument("out", type=lambda text: Path(text).resolve())
    p.add_argument("--seconds", type=float, help="that it may take in all")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    a = p.parse_args()
    steps, seconds = CALLS[a.call]
    if a.device == "cpu":  # however slow the machine is
        seconds *= 10
    session = Session(a.out, a.seconds or seconds, 10 if a.device == "cpu" else 1)
    os.environ |= unpacked()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        steps(a, session)
    finally:
        session.stop()
        print(f"{a.seconds or seconds:.0f} s, {session.left:.0f} s of them left", flush=True)
    if session.failed:
        sys.exit(f"not well: {', '.join(session.failed)}")


if __name__ == "__main__":
    main()
