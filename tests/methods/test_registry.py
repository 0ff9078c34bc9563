"""Every method, and any that a user brings, converts a model: found by name, called for what it takes, given what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import quantforge as qf
from quantforge import codecs, methods
from quantforge.arrays import Parts
from quantforge.cli import group
from quantforge.codecs import Codec
from quantforge.codecs.plain import PlainCodec
from quantforge.errors import CalibrationError, RecipeError, ShapeError, UnsupportedError
from quantforge.methods import Method, Stats
from tests import checkpoints

SHORT: dict[str, Any] = {"calibration_chunks": 4, "calibration_ctx": 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 64}
    return checkpoints.model(tmp_path_factory.mktemp("tiny"), "Llama", **sizes)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    known = methods.base._registry
    monkeypatch.setattr(known, "_items", dict(known.all()))


def fits(codec: Codec) -> bool:
    """A type of GGUF files with at least 4 bits, for 64 columns."""
    if codec.ggml_type is None or codec.needs_importance or isinstance(codec, PlainCodec):
        return False
    try:
        return codec.nbytes((64, 64)) >= 64 * 64 // 2
    except ShapeError:
        return False


@pytest.mark.parametrize("name", methods.names())
def test_every_method_converts(name: str, tiny: Path, tmp_path: Path) -> None:
    method = methods.get(name)
    taken = [n for n in codecs.names() if method.takes(codecs.get(n)) and fits(codecs.get(n))]
    for kind in (taken[0], taken[-1]):
        report = qf.convert(tiny, tmp_path / f"{kind}.gguf", kind, method=method, measure=True, **SHORT)
        judged = [t for t in report.tensors if t.output_error is not None]
        assert len(judged) == 7
        with qf.open(tmp_path / f"{kind}.gguf") as source:
            for t in judged:
                assert t.method in (name, method.rewrite, "rtn")
                assert t.output_error is not None and t.rtn_output_error is not None
                assert t.output_error <= t.rtn_output_error
                assert t.rel_rmse is not None and t.rel_rmse < 0.2
                assert source.weights[t.name].codec.name == t.type == kind


class Shrink(Method):
    """Cuts blocks off at a part of their largest weight where that errs less; remembers what it was given and gave."""

    name = "toy"
    needs = frozenset({"importance"})
    seen: list[Stats | None]
    made: list[bytes]

    def __init__(self) -> None:
        self.seen, self.made = [], []

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        assert stats is not None
        x, q = w.numpy(), stats.importance.numpy()
        blocks = x.reshape(-1, codec.block_size)
        top, best, least = np.abs(blocks).max(-1, keepdims=True), blocks, np.float32(np.inf)
        for part in (1.0, 0.95, 0.9, 0.85, 0.8):
            trial = blocks.clip(-part * top, part * top)
            d = codec.decode(codec.encode(trial.reshape(x.shape)), x.shape) - x
            error = (d**2 * q).reshape(blocks.shape).sum(-1, keepdims=True)
            best, least = np.where(error < least, trial, best), np.minimum(error, least)
        parts = codec.encode(best.reshape(x.shape))
        self.seen.append(stats)
        self.made.append(parts["codes"].tobytes())
        return parts


@pytest.mark.usefixtures("registry")
def test_a_method_that_needs_importance_is_called(tiny: Path, tmp_path: Path) -> None:
    toy = methods.register(Shrink())
    report = qf.convert(tiny, tmp_path / "m", "nf4", format="bitsandbytes", method="toy", **SHORT)
    judged = [t for t in report.tensors if t.output_error is not None]
    mine = [t for t in judged if t.method == "toy"]
    assert len(judged) == 7
    assert sum((t.output_error or 1) < (t.rtn_output_error or 0) for t in mine) >= 3
    with qf.open(tmp_path / "m") as source:
        assert source.config["quantforge.method"] == "toy"
        for t in mine:
            assert any(source.read(t.name).parts["codes"].tobytes() in made for made in toy.made), t.name
    for stats in toy.seen:
        assert stats is not None and stats.tokens == 3 * 32
        with pytest.raises(CalibrationError, match="gathered no hessian"):
            _ = stats.hessian

    options = "--format bitsandbytes -t nf4 --method toy --calibration-chunks 4 --calibration-ctx 32"
    done = CliRunner().invoke(group, ["convert", str(tiny), str(tmp_path / "c"), *options.split()])
    assert done.exit_code == 0, done.output
    assert f"toy kept for {len(mine)} of 7 matrices" in done.output
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()


class Zero(Method):
    """Everything is 0: no judge would keep it."""

    name = "zero"
    needs = frozenset[str]()

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        assert stats is None
        return codec.encode(np.zeros(tuple(w.shape), np.float32))


def test_a_method_that_needs_nothing_is_simply_used(tiny: Path, tmp_path: Path) -> None:
    report = qf.convert(tiny, tmp_path / "m.gguf", "Q4_0", method=Zero(), **SHORT)
    zero = [t for t in report.tensors if t.method == "zero"]
    assert len(zero) == 7
    assert all(t.output_error is None for t in zero)
    with qf.open(tmp_path / "m.gguf") as source:
        assert all(not source.read(t.name).decode().any() for t in zero)
        assert not any("calibration" in key for key in source.config), "it saw no text"


class Inputs(Method):
    """Looks at the inputs themselves."""

    name = "inputs"
    needs = frozenset({"inputs"})

    def takes(self, codec: Codec) -> bool:
        return codec.name == "Q4_0"

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        assert stats is not None
        assert stats.inputs.shape == (stats.tokens, w.shape[1])
        torch.testing.assert_close(stats.importance, stats.inputs.square().mean(0))
        return codec.encode(w.numpy(), stats.importance.numpy())


def test_inputs_and_types_that_it_does_not_take(tiny: Path, tmp_path: Path) -> None:
    rules = [(r"attn_v", "Q8_0")]
    report = qf.convert(tiny, tmp_path / "m.gguf", "Q4_0", method=Inputs(), tensor_types=rules, **SHORT)
    by_type = {(t.type, t.method) for t in report.tensors if t.output_error is not None}
    assert by_type == {("Q4_0", "inputs"), ("Q8_0", "rtn")}, "a tie with rtn is the method's"


class Doubling(Method):
    """Only rewrites: the columns of every group twice as large."""

    name = "doubling"

    def prepare(self, block: methods.Block) -> None:
        for g in block.groups():
            same = g.loss(g.matrices)
            assert same == 0
            assert g.loss([0 * w for w in g.matrices]) > 0
            g.scale(g.share(2 * torch.ones(g.matrices[0].shape[1])))

    def quantize(self, w: torch.Tensor, codec: Codec, stats: Stats | None) -> Parts:
        return codec.encode(np.zeros(tuple(w.shape), np.float32))


def test_what_only_prepare_changed_has_the_methods_name(tiny: Path, tmp_path: Path) -> None:
    report = qf.convert(tiny, tmp_path / "m.gguf", "Q8_0", method=Doubling(), **SHORT)
    judged = [t for t in report.tensors if t.output_error is not None]
    assert {t.method for t in judged} == {"doubling"}
    assert all((t.output_error or 1) < 0.01 for t in judged), "zeros were not kept"
    with qf.open(tmp_path / "m.gguf") as a, qf.open(tiny) as b:
        twice = a.read("blk.0.ffn_down.weight").decode() / b.read("model.layers.0.mlp.down_proj.weight").decode()
        assert np.median(twice) == pytest.approx(2, rel=0.02)


@pytest.mark.usefixtures("registry")
def test_what_is_no_method_is_refused(tiny: Path, tmp_path: Path) -> None:
    class Needy(Zero):
        needs = frozenset({"gradient"})

    with pytest.raises(UnsupportedError, match="zero needs gradient; there are hessian, importance, inputs"):
        methods.register(Needy)
    with pytest.raises(UnsupportedError, match=r"Method is no method: .*abstract"):
        methods.register(Method)
    with pytest.raises(RecipeError, match=r"derive it from quantforge\.methods\.Method"):
        qf.convert(tiny, tmp_path / "m.gguf", "Q4_0", method=object())
    methods.register(Zero())
    with pytest.raises(RecipeError, match=r"--act-order goes with --method awq\+gptq or gptq, not zero"):
        methods.get("zero", act_order=True)
