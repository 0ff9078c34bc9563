"""The Python blocks of docs/adding.md, docs/running.md and docs/verification.md run, section by section."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge

DOCS = Path(__file__).parents[1] / "docs"


def sections() -> dict[str, list[str]]:
    """Heading -> the Python blocks below it."""
    running = (DOCS / "running.md").read_text().replace("# Running", "## Running", 1)
    texts = [(DOCS / "adding.md").read_text(), running, (DOCS / "verification.md").read_text()]
    parts = re.split(r"^## (.+)$", "\n".join(texts), flags=re.M)[1:]
    blocks = {
        title: re.findall(r"^```python\n(.*?)^```$", body, flags=re.M | re.S)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: found for title, found in blocks.items() if found}


def test_the_codec_section_is_there() -> None:
    assert len(sections()["A codec"]) >= 3


@pytest.mark.parametrize("title", sections())
def test_section_runs(title: str, tmp_path: Path) -> None:
    """In a process of its own, so that what it registers stays there."""
    script = tmp_path / "section.py"
    script.write_text("\n\n".join(sections()[title]))
    env = os.environ | {"PYTHONPATH": str(Path(quantforge.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
