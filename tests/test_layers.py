"""Imports go strictly down the layers of docs/architecture.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge

PACKAGE = Path(quantforge.__file__).parent
LAYERS = [
    {"arrays", "discovery", "sizes"},
    {"native"},
    {"codecs"},
    {"device", "archs", "layouts"},
    {"tokenizer"},
    {"formats", "recipes"},
    {"nn", "methods"},
    {"runtime"},
    {"calibration"},
    {"backends"},
    {"conversion"},
    {"evaluation"},
    {"inspection", "verification"},
    {"__init__"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FREE = {"errors", "extras"}
STACKED = {
    "codecs": ["spoken", "grid", "base", "integers", "lattice"],
    "backends": ["worker", "base"],
    "formats": ["diagnosis", "files", "low_rank", "base", "rows", "safetensors", "gguf", "adapters", "merged"],
    "nn": ["tiles", "integers", "fp8", "lookups", "planes", "ops", "products", "stored", "cuda", "linear"],
    "runtime": ["skeleton", "mapping", "stored", "matrices", "head", "model", "passes", "loading"],
    "tokenizer": [
        *("spm_file", "files", "pretokenizers", "vocabulary", "special", "base", "byte_level", "sentencepiece", "raw_bpe"),
        *("unigram", "wordpiece", "models", "to_gguf", "from_gguf", "to_files", "engine", "chat"),
    ],
    "recipes": ["presets", "recipe", "linears"],
    "calibration": ["overlap", "corpus", "importance", "gather"],
    "conversion": [
        "pooling",
        "contents",
        "options",
        "lattices",
        "plan",
        "adapter",
        "library",
        "tiles",
        "moments",
        "outputs",
        "blockwise",
        "run",
        "modelfile",
        "convert",
    ],
    "evaluation": ["report", "metrics", "answers", "tasks", "comparison", "run", "scorecard"],
    "verification": ["report", "pairs", "tensors", "logits"],
    "cli": ["shared"],
}  # modules that others of their package may import, if those do not stand before them here
FREELY = {"archs"}  # families build on each other's tables; Python itself refuses circles
HEAVY = {"torch", "transformers"}
MAY_BE_HEAVY = {
    *("methods/numerics", "runtime", "nn", "calibration/gather"),
    *("conversion/moments", "conversion/outputs", "conversion/blockwise"),
}

MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)


def unit(path: Path) -> str:
    """The module or sub-package directly below quantforge."""
    return path.parts[0].removesuffix(".py")


def level(name: str) -> int:
    for i, names in enumerate(LAYERS):
        if name in names:
            return i
    raise AssertionError(f"{name} has no layer: add it to docs/architecture.md and to this test")


def imports(path: Path) -> set[tuple[str, ...]]:
    """Dotted paths below quantforge of what `path` imports, wherever in the file, type-checking blocks aside."""
    package = ("quantforge", *path.parts[:-1])
    found: set[tuple[str, ...]] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(tuple(a.name.split(".")) for a in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found.update((*base, a.name) for a in node.names)

    Visitor().visit(ast.parse((PACKAGE / path).read_text()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path: Path) -> None:
    me = unit(path)
    for target in imports(path):
        if target[0] != "quantforge" or len(target) < 2:
            continue
        other = target[1]
        if not (PACKAGE / other).is_dir() and not (PACKAGE / f"{other}.py").exists():
            continue  # a name defined in quantforge/__init__.py
        if other in FREE:
            continue
        if other == me:
            inside = target[2] if len(target) > 2 else ""
            is_module = (PACKAGE / other / f"{inside}.py").exists() and inside != path.stem
            order = STACKED.get(me, [])
            if me in FREELY:
                continue
            if inside in order:
                above = path.stem in order and order.index(inside) >= order.index(path.stem)
                assert not above, f"{path} imports {inside}, which is above it"
                continue
            assert not is_module or inside == "base" or path.stem == "__init__", f"{path} imports its sibling {'.'.join(target)}"
            continue
        assert level(other) < level(me), f"{path} (layer {level(me)}) imports {other} (layer {level(other)})"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_imports_only_where_allowed(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text())
    top = {n for node in tree.body if isinstance(node, ast.Import) for n in (a.name.split(".")[0] for a in node.names)}
    top |= {
        node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    if not {p.as_posix() for p in (path.with_suffix(""), *path.parents)} & MAY_BE_HEAVY:
        assert not top & HEAVY, f"{path} imports {top & HEAVY} at module level"


def test_the_table_is_the_one_in_the_docs() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([a-z_]+)(?:/|\.py)` \| \S.* \|$", text, flags=re.M)
    assert [int(number) for number, _ in rows] == sorted(level(name) for names in LAYERS for name in names)
    assert {name: int(number) for number, name in rows} == {name: level(name) for names in LAYERS for name in names}
    here = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert here - FREE == {name for _, name in rows}, "a row for each folder and module, and no other"


def test_import_does_not_load_torch() -> None:
    code = (
        "import sys, quantforge.cli, quantforge.demo; from quantforge import methods; methods.names();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
