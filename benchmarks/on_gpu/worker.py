"""Measuring in a process of its own: a kernel that crashes or hangs, or a library that aborts, costs its own job only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


class JobError(Exception):
    """Why a job ended before its end."""


def _serve(pipe: Connection) -> None:
    """Runs jobs until there are no more, or until the device is lost."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # nobody there any more
            return
        function, arguments = job
        why = ""
        try:
            for found in function(*arguments):
                pipe.send(("found", found))
        except Exception as e:
            why = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"[:300]
        if lost := _lost():
            why += " (the device was lost)"
        pipe.send(("failed", why) if why else ("done", ""))
        if lost:
            return


def _lost() -> bool:
    """Whether nothing more runs in this process, after an illegal access. Gives memory back."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return True
    return False


class Worker:
    """A process that is started when there is work, and again after one that ended badly."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def run(self, function: Callable[..., Iterator[Any]], *arguments: Any, patience: float = 120) -> Iterator[Any]:
        """What function(*arguments) yields in the other process, one by one.

        function: of a module. patience: seconds between two of them. Raises JobError.
        """
        if self._process is None or not self._process.is_alive():
            self.stop()
            context = get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((function, arguments))
            while True:
                if not self._pipe.poll(patience):
                    raise JobError(f"nothing for {patience:.0f} s")
                kind, found = self._pipe.recv()
                if kind == "done":
                    return
                if kind == "failed":
                    raise JobError(found)
                yield found
        except (EOFError, OSError):
            self._process.join(5)
            raise JobError(f"the process ended with {self._process.exitcode}") from None
        except JobError as e:
            if str(e).startswith("nothing for") or "device was lost" in str(e):
                self.stop(0)
            raise
        except GeneratorExit:  # the rest is not wanted
            self.stop(0)
            raise

    def stop(self, patience: float = 3) -> None:
        """End the process, whatever it is doing; one that waits for work leaves by itself."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(patience)
            self._process.kill()
            self._process.join(10)
        self._process = self._pipe = None
