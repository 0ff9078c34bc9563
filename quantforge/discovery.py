"""How extensions are found: a module of a package, or an entry point whose group is the package's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any


def modules(package: str) -> list[ModuleType]:
    """All modules of a package, imported, but for `base`, which says what the others are."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return [importlib.import_module(f"{package}.{m.name}") for m in found if m.name != "base"]


@cache
def discover(package: str, register: Callable[[Any], Any]) -> None:
    """Once: import a package's modules, which register what they hold, and register what entry points name."""
    modules(package)
    for point in entry_points(group=package):
        register(point.load())
