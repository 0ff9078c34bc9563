"""Q4_0 against IQ2_XXS on the shipped model: what do the bits buy?

    python benchmarks/q4_0_vs_iq2_xxs.py [--chunks 300] [--out DIR]

Converts the shipped model to Q4_0 without and with importance and to IQ2_XXS with it, evaluates all three
against the original in one pass, prints the table and writes the report as HTML, Markdown and JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import quantforge as qf
from quantforge.demo import IMATRIX, MODEL
from quantforge.evaluation.report.markdown import render


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--chunks", type=int, default=300)
    p.add_argument("--out", type=Path, default=Path("q4_0-vs-iq2_xxs"))
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, kind, importance in (
        ("Q4_0", "Q4_0", None),
        ("Q4_0 imatrix", "Q4_0", IMATRIX),
        ("IQ2_XXS imatrix", "IQ2_XXS", IMATRIX),
    ):
        paths[name] = a.out / f"{name.replace(' ', '-')}.gguf"
        qf.convert(MODEL, paths[name], kind, importance, force=True)
    found = qf.evaluate(paths, reference=MODEL, chunks=a.chunks, report=[a.out / f"report.{s}" for s in ("html", "md", "json")])
    print(render(found))


if __name__ == "__main__":
    main()
