"""What `pip install quantforge` leaves out: imported somewhere in the package, it says how to get it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .errors import MissingError

PACKAGES = ("torch", "transformers", "plotly")
"""What the extra "torch" brings."""
CPU_ONLY = "without a GPU, get torch first: pip install torch --index-url https://download.pytorch.org/whl/cpu"


class _Last(MetaPathFinder):
    """The finder that is asked when all others have found nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None; or MissingError, if it is this package that imports `name`. Others who look whether it is there are not told."""
        if name in PACKAGES and _asked_by().partition(".")[0] == __package__:
            raise MissingError(f"this needs {name}, which is not installed: pip install 'quantforge[torch]'; {CPU_ONLY}", name)
        return None


def _asked_by() -> str:
    """The module whose import statement is being carried out."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def watch() -> None:
    """From now on."""
    if not any(isinstance(finder, _Last) for finder in sys.meta_path):
        sys.meta_path.append(_Last())
