"""Every architecture that transformers and llama.cpp both know is registered, or listed with the reason why it is not."""

from __future__ import annotations

from pathlib import Path

import tomllib
import transformers

from quantforge import archs

TABLE = tomllib.loads((Path(__file__).parents[2] / "benchmarks" / "architectures.toml").read_text(encoding="utf-8"))


def test_all_that_both_know_are_registered_or_explained() -> None:
    known, listed = set(archs.supported()), TABLE["not_registered"]
    assert not known & set(listed)
    assert set(TABLE["both"]) <= known | set(listed)
    assert set(listed) <= set(TABLE["both"])
    assert all(reason.strip() for reason in listed.values())


def test_transformers_has_all_of_them() -> None:
    assert [n for n in TABLE["both"] if not hasattr(transformers, n)] == []


def test_the_page_lists_the_reasons() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert [n for n, reason in TABLE["not_registered"].items() if f"| {n} | {reason} |" not in page] == []
