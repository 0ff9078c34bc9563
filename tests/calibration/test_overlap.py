"""Texts that a model was calibrated with and measured on are told apart, from the model's file alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge.calibration import overlap
from quantforge.calibration.overlap import RUN, Sketch, letters, runs
from quantforge.demo import MODEL
from quantforge.errors import CalibrationError
from tests import checkpoints

TEXT = Path(__file__).parents[2] / "quantforge" / "data" / "text"


def story(n: int, seed: int) -> str:
    words = ["".join(random.Random(f"{i}").choices("etaoinshrdlu", k=5)) for i in range(500)]
    return " ".join(random.Random(seed).choices(words, k=n))


def how(a: str, b: str, size: int = 4096) -> str | None:
    return Sketch.of("a", "", a, size).overlap(b, runs(b))


def test_runs_are_equal_where_letters_are() -> None:
    text = "Grüße, 世界! " * 5 + story(200, 1)
    plain = letters(text)
    found = runs(text)
    assert len(found) == len(plain) - RUN + 1
    by_content: dict[str, int] = {}
    for i, h in enumerate(found.tolist()):
        assert by_content.setdefault(plain[i : i + RUN], h) == h
    assert len(set(by_content.values())) == len(by_content)
    assert np.array_equal(runs(text.upper().replace(" ", "\n\t - ")), found)
    assert len(runs("short")) == 0


def test_long_texts_are_hashed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    text = story(3000, 1)
    whole = runs(text)
    monkeypatch.setattr(overlap, "_PIECE", 1000)
    assert np.array_equal(runs(text), whole)


def test_what_overlaps() -> None:
    a, b = story(20_000, 1), story(20_000, 2)
    assert how(a, b) is None
    assert how(a, a) is not None
    assert how(a, a[50_000:70_000]) is not None, "a part of it"
    assert how(a[50_000:52_000], a) is not None, "a whole of it"
    assert how(a, b + a[50_000:53_000].replace(" ", "\n").title()) is not None, "a passage, written otherwise"
    assert how(a, b + a[50_000:50_600]) is None, "a paragraph"
    assert how(a, b + "".join(a[i : i + 200] for i in range(0, 60_000, 1000))) is not None, "many short ones"
    # no spaces
    hanzi = "".join(random.Random(3).choices([chr(c) for c in range(0x4E00, 0x5E00)], k=30_000))
    assert how(hanzi, "无关" * 50 + hanzi[5000:6000]) is not None
    assert how(hanzi, a) is None


def test_the_shipped_texts() -> None:
    calibration, held_out = ((TEXT / f"{n}.txt").read_text() for n in ("calibration", "heldout"))
    for a, b in ((calibration, held_out), (held_out, calibration)):
        assert how(a, b) is None
        assert overlap.shared(a, b) is None


def test_whole_texts_are_compared_by_the_same_rule() -> None:
    a, b = story(20_000, 1), story(20_000, 2)
    assert overlap.shared(a, b) is None
    assert overlap.shared(a, b + a[50_000:50_600]) is None, "a paragraph"
    for passage in range(0, 100_000, 10_000):  # wherever it lies: nothing is sampled
        said = overlap.shared(a, b + a[passage : passage + 1300].replace(" ", "\n"))
        assert said is not None and "a passage of 1" in said
    assert overlap.shared("short", a) is None and overlap.shared(a, "") is None


def test_metadata_round_trip_and_damage() -> None:
    sketches = [Sketch.of("a.txt", "ab", story(2000, 1)), Sketch.of("b.txt", "cd", "tiny")]
    data = overlap.metadata(sketches)
    for got, expected in zip(overlap.remembered(data), sketches, strict=True):
        assert (got.name, got.sha256, got.limit) == (expected.name, expected.sha256, expected.limit)
        assert np.array_equal(got.hashes, expected.hashes)
    assert overlap.metadata([]) == {}
    key = "quantforge.calibration.hashes"
    for bad in ({key: "x"}, {key: ["!", "AAA"]}, {key: [1, None]}, {key: [""]}, {"quantforge.calibration.texts": 3}):
        assert overlap.remembered({**data, **bad}) == [] or list(bad) != [key]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return checkpoints.model(tmp_path_factory.mktemp("tiny"), "Llama", **sizes)


@pytest.mark.parametrize("way", ["gguf", "gptq", "imatrix", "gptq to gguf"])
def test_evaluation_refuses_what_a_model_was_calibrated_with(way: str, tiny: Path, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine.txt", tmp_path / "other.txt"
    mine.write_text(story(6000, 1))
    other.write_text(story(6000, 2) + story(6000, 1)[9000:12000])
    out = tmp_path / ("m.gguf" if "gguf" in way or way == "imatrix" else "m")
    given = {"method": "gptq", "calibration": mine, "calibration_chunks": 4}
    if way == "gguf":
        qf.convert(tiny, out, "Q4_0", **given)
    elif way == "imatrix":
        qf.calibrate(tiny, tmp_path / "im.gguf", mine, chunks=4)
        qf.convert(tiny, out, "Q4_0", tmp_path / "im.gguf")
    else:
        qf.convert(tiny, tmp_path / "m", format="gptq", bits=4, group_size=32, **given)
        if way == "gptq to gguf":
            qf.convert(tmp_path / "m", out, "Q4_0")
    run = {"reference": tiny, "metrics": ["ppl"], "chunks": 2, "noise_floor": False}
    for text in (mine, other):
        with pytest.raises(CalibrationError, match=r"m was calibrated with mine\.txt, and .*\.txt overlaps that: \d+% of it"):
            qf.evaluate(out, text=text, **run)
    qf.evaluate(out, **run)


def test_same_name_of_an_unknown_text_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0", MODEL / "llama.cpp-imatrix.gguf")
    with qf.open(tmp_path / "m.gguf") as source:
        dataset = source.config["quantize.imatrix.dataset"]
    text = tmp_path / Path(dataset).name
    text.write_text((TEXT / "heldout.txt").read_text()[:20_000])
    qf.evaluate(tmp_path / "m.gguf", reference=MODEL, text=text, metrics=["ppl"], chunks=1, noise_floor=False)
    assert f"also named {text.name}" in caplog.text
