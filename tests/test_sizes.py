"""Sizes read, shown and measured."""

from __future__ import annotations

import numpy as np
import pytest

from quantforge import sizes
from quantforge.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("6GB", 6 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 15 * 10**8),
        (".5k", 500),
        (" 3kb ", 3000),
        ("2TiB", 2**41),
        ("42b", 42),
        ("42000000", 42_000_000),
        (7, 7),
    ],
    ids=str,
)
def test_parse(text: str | int, n: int) -> None:
    assert sizes.parse(text) == n


@pytest.mark.parametrize("text", ["much", "", "GB", "-1GB", "1e9", "5 GB or so", -1])
def test_no_size(text: str | int) -> None:
    with pytest.raises(RecipeError, match=r"^--memory .*: write a size like 6GB"):
        sizes.parse(text, "--memory")


def test_least() -> None:
    assert sizes.parse("0") == 0
    with pytest.raises(RecipeError):
        sizes.parse("0.4", least=1)


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 KB"), (7e6, "7.00 MB"), (3e12, "3000.00 GB")])
def test_show(n: float, text: str) -> None:
    assert sizes.show(n) == text


def test_resident() -> None:
    before = sizes.resident(peak=True)
    held = np.ones(1 << 25, np.uint8)
    assert 0 < sizes.resident() <= sizes.resident(peak=True)
    assert before <= sizes.resident(peak=True) and held.all()
