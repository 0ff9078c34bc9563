"""One thread for BLAS and torch: the tests' arrays are small, and pytest-xdist already fills the cores."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# a shell's background ignores it; what tests start and interrupt would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes in one thread, whatever the environment says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a ggml type's kernel writes is returned as it is, also where scales left f16: ggml writes the same bytes."""
    from quantforge.codecs.base import GgmlCodec

    monkeypatch.setattr(GgmlCodec, "check_range", lambda *_: None)


def pytest_runtest_logfinish() -> None:
    """A process that lost its CUDA device to an illegal access fails every later test: pytest-xdist starts another."""
    torch = sys.modules.get("torch")
    if "PYTEST_XDIST_WORKER" in os.environ and torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
