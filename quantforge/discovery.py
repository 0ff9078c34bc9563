"""How extensions are found: modules of a package that hold its marker, what is registered, and entry points.

The group of a package's entry points has the package's name: `quantforge.codecs`, `.methods`, `.formats`, `.layouts`, `.archs`,
`.backends`, `.evaluation.metrics`.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Generic, TypeVar

from .errors import QuantForgeError, UnsupportedError, nearest

logger = logging.getLogger(__name__)

T = TypeVar("T")


def marked(package: str, marker: str) -> Iterator[Any]:
    """What modules of a package hold as `marker`; those without it are helpers."""
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{entry.name}")
        if hasattr(module, marker):
            yield getattr(module, marker)


class Registry(Generic[T]):
    """All extensions of one kind by name, in the order in which they were found.

    They are looked for at the first question: modules of `package` that hold `marker` (or, where that is empty, register
    by themselves), then entry points. An entry point that fails is a warning that names it, and is left out.
    """

    def __init__(
        self,
        package: str,
        what: str,
        check: Callable[[Any], T],
        *,
        marker: str = "",
        names: Callable[[T], Iterable[str]] = lambda item: [item.name],  # type: ignore[attr-defined]
    ) -> None:
        """what: how messages call one ("method"). check: the extension itself from what was given; raises what is wrong."""
        self.package, self.what, self.marker = package, what, marker
        self._check, self._names = check, names
        self._items: dict[str, T] = {}
        self._searched = False
        self._lock = RLock()

    def register(self, given: Any) -> T:
        """Make an extension known by its names. Raises UnsupportedError where another one has one of them."""
        item = self._check(given)
        with self._lock:
            for name in self._names(item):
                known = self._items.get(name)
                # a class that a notebook defines again takes its own place
                again = known is item or (_origin(known) == _origin(item) and not _origin(item)[0].startswith(self.package))
                if known is not None and not again:
                    raise UnsupportedError(f"a {self.what} named {name} is already registered by {'.'.join(_origin(known))}")
                self._items[name] = item
        return item

    def all(self) -> dict[str, T]:
        """Name -> extension."""
        with self._lock:
            if not self._searched:
                self._searched = True  # modules may ask while they are imported
                for given in marked(self.package, self.marker):
                    self.register(given)
                for point in entry_points(group=self.package):
                    try:
                        self.register(point.load())
                    except Exception as e:
                        by = f" of {point.dist.name}" if point.dist else ""
                        why = str(e) if isinstance(e, QuantForgeError) else f"{type(e).__name__}: {e}"
                        logger.warning("the %s %s%s (%s) cannot be used: %s", self.what, point.name, by, point.value, why)
        return self._items

    def find(self, name: str) -> T | None:
        """The extension of that name, in any case, or None."""
        if (item := self._items.get(name)) is not None:
            return item
        every = self.all()
        return every.get(name) or next((item for known, item in every.items() if known.lower() == name.lower()), None)

    def get(self, name: str) -> T:
        """The extension of that name, in any case. Raises UnsupportedError naming the known ones."""
        if (item := self.find(name)) is None:
            raise UnsupportedError(f"unknown {self.what} {name}{nearest(name, self.all())}; known: {', '.join(self.all())}")
        return item


def _origin(item: Any) -> tuple[str, str]:
    kind = item if isinstance(item, type) else type(item)
    return kind.__module__, kind.__qualname__
