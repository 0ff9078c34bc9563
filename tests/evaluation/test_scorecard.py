"""Scorecards: types ranked, and the one that fits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import quantforge as qf
from quantforge.demo import MODEL
from quantforge.errors import RecipeError
from quantforge.evaluation.report import Evaluation, ModelResult
from quantforge.evaluation.scorecard import choose

pytestmark = pytest.mark.usefixtures("one_thread")


def model(name: str, size: int, kld: float | None, ppl: float) -> ModelResult:
    shape = {"context": 100, "kv_bytes_per_token": 10}
    return ModelResult(name, name, "gguf", size, 1, 1.0, 1.0, {}, shape, kld_mean=kld, ppl=ppl)


def evaluation(*models: ModelResult) -> Evaluation:
    return Evaluation(model("ref", 9000, None, 5.0), list(models), None, {}, {}, None, None, {})


def test_compare_ranks_and_chooses(tmp_path: Path) -> None:
    e = qf.compare(MODEL, ["Q2_K", "Q8_0", "Q4_0"], memory="7MB", context=1000, chunks=2, metrics=["kld"], out=tmp_path / "kept")
    assert [m.name for m in e.ranked()] == ["Q8_0", "Q4_0", "Q2_K"]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["Q2_K.gguf", "Q4_0.gguf", "Q8_0.gguf"]
    assert e.choice.kv_bytes == 1000 * 2 * 2 * 6 * 4 * 32  # tokens, key and value, f16, layers, heads, width
    assert e.choice.best == "Q4_0" and e.choice.needs["Q4_0"] == e.models[2].bytes + e.choice.kv_bytes <= 7_000_000
    assert "Q4_0 is the closest" in e.choice.why and "of the 2 that fit into 7.00 MB" in e.choice.why
    assert "Q8_0 would be closer but needs 9.3" in e.choice.why
    none = qf.compare(MODEL, ["Q8_0"], memory=1000, chunks=1, metrics=["kld"], noise_floor=False)
    assert none.choice.best is None and "None of these fits" in none.choice.why and none.noise_floor is None


def test_the_closest_that_fits_with_its_cache() -> None:
    e = evaluation(model("large", 5000, 0.01, 9.0), model("middle", 3000, 0.02, 8.0), model("small", 1000, 0.3, 7.0))
    assert [choose(e, limit, None).best for limit in (6000, 5999, 4000, 3999, 2000, 1999)] == [
        "large", "middle", "middle", "small", "small", None,
    ]  # fmt: skip
    picked = choose(e, 4500, 150)
    assert (picked.best, picked.context, picked.kv_bytes, picked.needs["middle"]) == ("middle", 150, 1500, 4500)
    assert "mean KLD 0.02" in picked.why and "large would be closer" in picked.why
    assert "would be closer" not in choose(e, 10**6, None).why
    nothing = choose(e, 10, None)
    assert nothing.why.startswith("None of these fits") and "the smallest, small" in nothing.why


def test_without_divergence_perplexity_ranks() -> None:
    picked = choose(evaluation(model("a", 5000, None, 9.0), model("b", 3000, None, 8.0)), 10**6, None)
    assert picked.best == "b" and "PPL 8" in picked.why


def test_where_the_importance_comes_from(tmp_path: Path) -> None:
    """None, a file, or one that lies beside the model: the report says which."""
    run = {"chunks": 1, "metrics": ["ppl"], "noise_floor": False}
    given = MODEL / "llama.cpp-imatrix.gguf"
    assert qf.compare(MODEL, ["Q4_0"], imatrix=None, **run).run["imatrix"] == "none"
    assert qf.compare(MODEL, ["Q4_0"], imatrix=given, **run).run["imatrix"] == str(given)
    beside = tmp_path / "m"
    shutil.copytree(MODEL, beside, ignore=shutil.ignore_patterns("*.gguf"))
    shutil.copy(given, beside / "my-imatrix.gguf")
    assert qf.compare(beside, ["Q4_0"], **run).run["imatrix"] == "my-imatrix.gguf"


def test_a_limit_that_is_no_size_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="much"):
        qf.compare(MODEL, ["Q4_0"], memory="much", out=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
