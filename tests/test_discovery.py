"""How extensions are found, and what happens to those that do not work."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from quantforge import codecs, discovery, formats
from quantforge.discovery import Registry, marked
from quantforge.errors import UnsupportedError


class Thing:
    def __init__(self, name: str) -> None:
        self.name = name


def check(given: object) -> Thing:
    if not isinstance(given, Thing):
        raise UnsupportedError(f"{given!r} is no thing")
    return given


GOOD, BAD = Thing("good"), "a text"


def registry(monkeypatch: pytest.MonkeyPatch, **points: str) -> Registry[Thing]:
    """Of a package without modules, with these entry points."""
    group = "quantforge.data"
    found = [EntryPoint(name, value, group) for name, value in points.items()]
    monkeypatch.setattr(discovery, "entry_points", lambda group: found)
    monkeypatch.setattr(discovery, "marked", lambda package, marker: iter(()))
    return Registry(group, "thing", check, marker="THING")


def test_one_broken_plug_in_is_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    here = "tests.test_discovery"
    things = registry(monkeypatch, good=f"{here}:GOOD", bad=f"{here}:BAD", gone="no.such.module:X", nothing=f"{here}:NOTHING")
    monkeypatch.setitem(__import__("sys").modules, here, SimpleNamespace(GOOD=GOOD, BAD=BAD))
    with caplog.at_level(logging.WARNING):
        assert list(things.all()) == ["good"]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 3 and all("\n" not in s for s in said)
    assert "the thing bad" in said[0] and "'a text' is no thing" in said[0]
    assert "the thing gone" in said[1] and "no.such.module:X" in said[1] and "ModuleNotFoundError" in said[1]
    assert "the thing nothing" in said[2] and "AttributeError" in said[2]


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    things = registry(monkeypatch)
    things.register(GOOD)
    things.register(GOOD)  # the same one again
    assert things.get("GOOD") is GOOD and things.find("better") is None
    with pytest.raises(UnsupportedError, match=r"unknown thing goood \(did you mean good\?\); known: good"):
        things.get("goood")

    class Other(Thing):
        """Of the same name."""

    with pytest.raises(UnsupportedError, match=r"a thing named good is already registered by .*Thing"):
        things.register(Other("good"))


def test_ours_are_not_replaced() -> None:
    class Gguf(type(formats.get("gguf"))):  # type: ignore[misc]
        """A class of another module under the same name."""

    with pytest.raises(UnsupportedError, match="format named gguf is already registered"):
        formats.register(Gguf())
    with pytest.raises(UnsupportedError, match="no instance of"):
        formats.register(object())
    with pytest.raises(UnsupportedError, match=r"no quantforge\.Codec"):
        codecs.register(dict)


def test_modules_without_the_marker_are_helpers() -> None:
    found = [f.name for f in marked("quantforge.formats", "FORMAT")]
    assert found == ["gguf", "safetensors"]
