"""A metric from outside: one object, found by name, in every report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import quantforge as qf
from quantforge import discovery
from quantforge.cli import group
from quantforge.demo import MODEL
from quantforge.errors import RecipeError, ShapeError, UnsupportedError
from quantforge.evaluation import metrics
from quantforge.evaluation.metrics import base
from quantforge.evaluation.report import Figure

pytestmark = pytest.mark.usefixtures("one_thread")


class Highest:
    """The highest logit of every token."""

    def __init__(self, models: int, tokens: int) -> None:
        self.logit = torch.full((models, tokens), -torch.inf)
        self.columns = torch.zeros(models, tokens, dtype=torch.int64)
        self.reference = torch.full((models, tokens), -torch.inf)

    def add(self, model: int, logits: torch.Tensor, reference: torch.Tensor, at: slice, column: int) -> None:
        assert logits.shape == reference.shape
        self.logit[model, at] = torch.maximum(self.logit[model, at], logits.amax(-1))
        self.reference[model, at] = torch.maximum(self.reference[model, at], reference.amax(-1))
        self.columns[model, at] += logits.shape[-1]


class Peak(metrics.Metric):
    name = "toy-peak"
    figures = (Figure("toy_peak", "a | peak", "logits", "higher"),)
    against_reference = False
    last: Highest

    def collector(self, models: int, tokens: int, device: str) -> Highest:
        Peak.last = Highest(models, tokens)
        return Peak.last

    def values(self, seen: metrics.Seen) -> Mapping[str, metrics.F64]:
        assert isinstance(seen.collected, Highest)
        return {"toy_peak": seen.collected.logit[seen.model].double().numpy()}


class Length(metrics.Metric):
    name = "toy-length"
    figures = (Figure("toy_length", "length", "tokens"),)
    needs = "answers"

    def judge(self, answers: metrics.Answers, model: int) -> metrics.Measured:
        lengths = np.asarray([len(a) for a in answers.ids[model]], float)
        interval = answers.bootstrap.interval(lengths)
        return metrics.Measured({"toy_length": interval.estimate}, {"toy_length": interval})


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """What a test registers goes again."""
    known = dict(base._registry.all())
    yield
    base._registry._items.clear()
    base._registry._items.update(known)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m") / "q2.gguf"
    qf.convert(MODEL, out, "Q2_K")
    return out


def test_a_metric_is_in_every_report(tmp_path: Path, small: Path) -> None:
    metrics.register(Peak)
    reports = [tmp_path / f"r.{s}" for s in ("json", "md", "html")]
    e = qf.evaluate({"a": small, "b": MODEL}, reference=MODEL, chunks=2, metrics=["toy-peak"], noise_floor=False, report=reports)
    peaks = Peak.last.logit.double().mean(1).numpy()
    a, b = e.models
    assert a.metrics["toy_peak"] == pytest.approx(peaks[1]) and e.reference.metrics["toy_peak"] == b.metrics["toy_peak"]
    assert a.metrics["toy_peak"] != b.metrics["toy_peak"]
    assert a.intervals["toy_peak"]["low"] < a.metrics["toy_peak"] < a.intervals["toy_peak"]["high"]
    (pair,) = e.intervals["differences"]
    assert pair["toy_peak"]["estimate"] == pytest.approx(a.metrics["toy_peak"] - b.metrics["toy_peak"])
    assert (Peak.last.columns == 4096).all()  # every token met the whole vocabulary once
    assert torch.equal(Peak.last.reference, Peak.last.logit[:1].expand(3, -1))
    assert a.ppl is not None and a.kld_mean is None

    written = json.loads(reports[0].read_text())
    assert written["figures"] == [{"key": "toy_peak", "label": "a | peak", "unit": "logits", "better": "higher"}]
    assert written["units"]["metrics.toy_peak"] == "logits"
    assert written["models"][0]["metrics"]["toy_peak"] == a.metrics["toy_peak"]
    head, _, *rows = [line for line in reports[1].read_text().splitlines() if line.startswith("|")]
    assert head.endswith("| a \\| peak (logits) |") and len(rows) == 3
    assert all(f"| {a.metrics['toy_peak']:.3g}"[:5] in row for row in rows[1:2])
    assert '"label": "a | peak"' in reports[2].read_text() and "data.figures.map" in reports[2].read_text()


def test_collecting_changes_no_other_figure(small: Path) -> None:
    metrics.register(Peak)
    run: dict[str, Any] = {"reference": MODEL, "chunks": 2, "noise_floor": False}
    (with_it,) = qf.evaluate(small, metrics=["kld", "flips", "toy-peak"], **run).models
    (without,) = qf.evaluate(small, metrics=["kld", "flips"], **run).models
    with_it.metrics.clear()
    del with_it.intervals["toy_peak"]
    assert with_it == without


def test_a_metric_of_answers(tmp_path: Path, small: Path) -> None:
    """From the command line, without similarity: nothing is embedded."""
    metrics.register(Length())
    (tmp_path / "p.txt").write_text("In Python,\nThe table\n")
    arguments = ["evaluate", str(small), "--reference", str(MODEL), "--chunks", "1", "--metrics", "toy-length"]
    done = CliRunner().invoke(group, [*arguments, "--prompts", str(tmp_path / "p.txt"), "--answer-tokens", "3", "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.output)
    assert printed["models"][0]["metrics"] == {"toy_length": 3} and printed["similarity"] is None
    assert printed["models"][0]["intervals"]["toy_length"]["estimate"] == 3
    assert printed["reference"]["metrics"] == {}


def test_every_metric_that_ships_fills_its_own_fields() -> None:
    from dataclasses import fields

    from quantforge.evaluation.report import ModelResult

    own = {f.name for f in fields(ModelResult)}
    for name in metrics.names():
        metric = metrics.get(name)
        assert metric.name == name and all(f.key in own and f.label for f in metric.figures)


def test_entry_points_and_broken_ones(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Point:
        dist, value = None, "m:X"

        def __init__(self, name: str, given: Any) -> None:
            self.name, self.given = name, given

        def load(self) -> Any:
            if isinstance(self.given, Exception):
                raise self.given
            return self.given

    points = [Point("toy", Peak), Point("broken", ImportError("no module x")), Point("odd", object())]
    asked = []
    monkeypatch.setattr(discovery, "entry_points", lambda group: asked.append(group) or points)
    monkeypatch.setattr(base._registry, "_searched", False)
    assert "toy-peak" in metrics.names() and asked == ["quantforge.evaluation.metrics"]
    assert "broken" in caplog.text and "no module x" in caplog.text and "it needs a name and figures" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figures": (Figure("bytes", "x", ""),)}, "reports have a bytes already"),
        ({"figures": (Figure("kld_mean", "x", ""),)}, "reports have a kld_mean already"),
        ({"figures": ()}, "it needs a name and figures"),
        ({"needs": "luck"}, "there are text and answers"),
        ({"name": "ppl"}, "a metric named ppl is already registered"),
        ({"name": "another"}, "reports have a toy_peak already"),
    ],
)
def test_metrics_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    metrics.register(Peak)
    with pytest.raises(UnsupportedError, match=message):
        metrics.register(type("Toy", (Peak,), {"figures": (Figure("toy_new", "x", ""),), **changes})
                         if changes.get("name") != "another" else type("Toy", (Peak,), changes))  # fmt: skip


def test_figures_that_were_not_announced(small: Path) -> None:
    wrong = type("Wrong", (metrics.Metric,), {
        "name": "wrong", "figures": (Figure("right", "right", ""),),
        "values": lambda self, seen: {"left": seen.tokens.nll},
    })  # fmt: skip
    metrics.register(wrong)
    with pytest.raises(UnsupportedError, match="metric wrong gave left, which is none of its figures: right"):
        qf.evaluate(small, reference=MODEL, chunks=1, metrics=["wrong"], noise_floor=False)


def test_values_are_one_for_each_token() -> None:
    wrong = Peak()
    tokens = metrics.Tokens(np.zeros(3), np.zeros(3, int), np.zeros(3))
    collected = Highest(1, 2)
    seen = metrics.Seen(0, tokens, tokens, np.zeros(3, int), metrics.Bootstrap(np.arange(3)), collected)
    with pytest.raises(ShapeError, match=r"metric toy-peak: toy_peak is \[2\], not \[3\]"):
        wrong.measure(seen)


def test_unknown_metrics_name_the_known() -> None:
    metrics.register(Peak)
    with pytest.raises(RecipeError, match=r"unknown metric toy-pek.*toy-peak.*known: .*kld.*toy-peak"):
        qf.evaluate(MODEL, reference=MODEL, metrics=["toy-pek"])
