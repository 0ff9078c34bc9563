"""AWQ: the search finds what brute force finds; folding changes no function; the file is better than plain rounding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantforge as qf
from quantforge import codecs
from quantforge.codecs import Codec
from quantforge.demo import MODEL
from quantforge.methods import AWQ, Stats, output_error
from quantforge.methods.numerics.awq import clipped
from tests import checkpoints


def test_scale_search_equals_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    n, codec = 128, codecs.get("Q4_0")
    x = torch.randn(500, n, generator=g) * torch.exp(1.5 * torch.randn(n, generator=g))
    ws = [torch.randn(24, n, generator=g), torch.randn(40, n, generator=g)]

    def loss(others: Sequence[torch.Tensor]) -> float:
        return sum(float((x.double() @ (o - w).double().T).square().sum()) for o, w in zip(others, ws, strict=True))

    found = AWQ().scales(ws, [codec, codec], x.square().mean(0), loss, loss)
    trials = {}
    rms = x.double().square().mean(0).sqrt().numpy()
    for a in np.arange(20) / 20:
        s = rms**a
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        q = [torch.from_numpy(codec.decode(codec.encode(w.numpy() * s), tuple(w.shape)) / s) for w in ws]
        trials[a] = (loss(q), s)
    least, expected = min(trials.values(), key=lambda t: t[0])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert least < 0.9 * trials[0.0][0]


def test_scales_that_held_out_windows_reject_are_not_used() -> None:
    w, codec = torch.randn(8, 64), codecs.get("Q4_0")
    falling = iter(range(100, 0, -1))
    s = AWQ().scales([w], [codec], torch.rand(64), lambda others: float(next(falling)), lambda others: 1.0)
    assert (s == 1).all()


@pytest.mark.parametrize("name", ["int3-g32-asym", "Q4_0", "int4-channel-sym"])
def test_clipping_equals_brute_force(name: str) -> None:
    """Of every group of every row alone, the range that leaves the least output error of the columns so far."""
    codec, n, out = codecs.get(name), 64, 6
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, n, generator=g) @ (torch.eye(n) + 0.5 * torch.randn(n, n, generator=g) / n**0.5)
    w = torch.randn(out, n, generator=g)
    s = Stats(2 * x.T @ x / len(x), len(x))
    size = codec.block_size if codec.block_size > 1 else n
    expected = torch.zeros_like(w)
    for row in range(out):
        for first in range(0, n, size):
            span = slice(first, first + size)
            group, errors = w[row : row + 1, span], []
            importance = s.importance[span].numpy()
            trials = [(1 - i / 20, None) for i in range(13)] + [(1 - i / 10, importance) for i in range(4)]
            for part, given in trials:
                cut = group.clamp(-group.abs().max() * part, group.abs().max() * part)
                q = torch.from_numpy(codec.decode(codec.encode(cut.numpy(), given), (1, size)))
                expected[row, span] = q
                d = (expected - w)[row, : first + size].double()
                errors.append((float((x[:, : first + size].double() @ d).square().sum()), q))
            expected[row, span] = min(errors, key=lambda t: t[0])[1]
    _, parts = clipped(w, codec, s)
    got = torch.from_numpy(codec.decode(parts, (out, n)))
    assert (got == expected).float().mean() > 0.95, "a tie, to float32, may fall either way"
    plain = torch.from_numpy(codec.decode(codec.encode(w.numpy(), s.importance.numpy()), (out, n)))
    assert output_error(w, got, s) < 0.95 * output_error(w, plain, s)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_1", "IQ4_XS", "IQ2_XXS", "NVFP4", "nf4-dq", "int8-row", "int4-g32-sym-act"])
def test_ranges_of_every_kind_of_codec(name: str) -> None:
    """What is put together of columns is a matrix of the codec; it errs less than plain rounding, if rows share nothing."""
    codec, n, out = codecs.get(name), 512, 8
    g = torch.Generator().manual_seed(1)
    x = torch.randn(600, n, generator=g) + 2 * torch.randn(n, generator=g)
    w = torch.randn(out, n, generator=g)
    s = Stats(2 * x.T @ x / len(x), len(x))
    _, parts = clipped(w, codec, s)
    assert {k: (p.dtype, p.shape) for k, p in parts.items()} == {
        k: (i.dtype, tuple(i.shape)) for k, i in codec.layout((out, n)).items()
    }
    got = torch.from_numpy(codec.decode(parts, (out, n)))
    plain = torch.from_numpy(codec.decode(codec.encode(w.numpy(), s.importance.numpy()), (out, n)))
    assert output_error(w, got, s) < (0.9 if codec.row_local else 1.001) * output_error(w, plain, s)


def test_earlier_errors_are_undone() -> None:
    """The target is w·x₀: with x = x₀(1 + e) weights that know e err less than w itself, however finely it is rounded."""
    codec, n, out = codecs.get("Q8_0"), 64, 6
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(900, n, generator=g)
    x = x0 @ (torch.eye(n) + 0.1 * torch.randn(n, n, generator=g) / n**0.5)
    s = Stats(2 * x.T @ x / 900, 900, 2 * (x0 - x).T @ x / 900, 2 * (x0 - x).T @ (x0 - x) / 900)
    w = torch.randn(out, n, generator=g)
    got = torch.from_numpy(codec.decode(AWQ().quantize(w, codec, s), (out, n)))
    assert output_error(w, got, s) < 0.1 * output_error(w, w, s)


@dataclass(frozen=True)
class Forced(AWQ):
    """Scales whatever the search would say."""

    def scales(
        self,
        ws: Sequence[torch.Tensor],
        codecs: Sequence[Codec],
        importance: torch.Tensor,
        loss: Callable[[Sequence[torch.Tensor]], float],
        judge: Callable[[Sequence[torch.Tensor]], float],
        share: Callable[[torch.Tensor], torch.Tensor] = lambda s: s,
    ) -> torch.Tensor:
        """1 or 2: exact in every float, and hardly any harm to a block's common scale."""
        return share(2.0 ** torch.randint(0, 2, importance.shape, generator=torch.Generator().manual_seed(len(importance))))


def test_folding_preserves_the_function(tmp_path: Path) -> None:
    """Norms, value rows (shared by query heads) and up rows take the scales out again."""
    qf.convert(MODEL, tmp_path / "plain.gguf", "Q8_0")
    qf.convert(MODEL, tmp_path / "forced.gguf", "Q8_0", method=Forced(), calibration_chunks=2)
    with qf.open(tmp_path / "plain.gguf") as a, qf.open(tmp_path / "forced.gguf") as b:
        for name in ("attn_norm", "ffn_norm", "attn_v", "ffn_up", "attn_q", "ffn_down", "attn_output"):
            x, y = (s.read(f"blk.3.{name}.weight").decode() for s in (a, b))
            assert np.abs(np.log2(np.abs(x).mean(-1) / np.abs(y).mean(-1))).max() > 0.1, name
    found = qf.evaluate(
        [tmp_path / "plain.gguf", tmp_path / "forced.gguf"], reference=MODEL, chunks=4, metrics=["ppl", "kld"], noise_floor=False
    )
    kld = {m.name: m.kld_mean or 1 for m in found.models}
    assert kld["forced"] < 0.005
    assert kld["forced"] < 4 * kld["plain"]


@pytest.mark.parametrize("clip", [False, None])
def test_better_than_rounding(clip: bool | None, tmp_path: Path) -> None:
    report = qf.convert(MODEL, tmp_path / "awq.gguf", "Q4_0", method=AWQ(steps=4), clip=clip, calibration_chunks=8)
    assert {t.method for t in report.tensors if t.type == "Q4_0" and t.name.startswith("blk.")} == {"awq"}
    qf.convert(MODEL, tmp_path / "none.gguf", "Q4_0")
    found = qf.evaluate(
        [tmp_path / "awq.gguf", tmp_path / "none.gguf"], reference=MODEL, chunks=8, metrics=["ppl", "kld"], noise_floor=False
    )
    kld = {m.name: m.kld_mean or 1 for m in found.models}
    assert kld["awq"] < 0.95 * kld["none"]


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_experts(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert by its own tokens, in its place of the stacked tensor."""
    sizes: dict[str, Any] = {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    model = checkpoints.model(tmp_path / "moe", "Qwen3Moe", max_position_embeddings=64, **sizes)
    report = qf.convert(model, tmp_path / "m.gguf", "Q4_0", method=method, calibration_chunks=16, measure=True)
    stacked = [t for t in report.tensors if "_exps" in t.name]
    assert len(stacked) == 6
    for t in stacked:
        assert t.output_error is not None
        assert t.rtn_output_error is not None
        assert t.output_error <= t.rtn_output_error
        assert "gptq" in t.method
        assert (t.rel_rmse or 1) < 0.2, "an expert in another's place would be far off"


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_experts_of_checkpoints(kind: str, method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers keeps experts stacked; the file has them one by one, each by its own tokens, which are counted."""
    sizes: dict[str, Any] = {"num_experts_per_tok": 2, "num_hidden_layers": 1}
    sizes |= {"num_local_experts": 8} if kind == "Mixtral" else {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32}
    model = checkpoints.model(tmp_path / "moe", kind, max_position_embeddings=64, **sizes)
    report = qf.convert(
        model, tmp_path / "m", format="gptq", bits=4, group_size=32, method=method, calibration_chunks=6, measure=True
    )
    experts = [t for t in report.tensors if ".experts." in t.name]
    assert len(experts) == 24
    for t in experts:
        assert t.tokens is not None
        assert t.output_error is not None
        assert t.rtn_output_error is not None
        assert t.output_error <= t.rtn_output_error
        assert (t.rel_rmse or 1) < 0.25, "an expert in another's place would be far off"
    first = [t for t in experts if re.search(r"(w1|gate_proj)", t.name)]
    assert sum(t.tokens[0] for t in first if t.tokens) == 6 * 64 * 2, "each token goes to two experts"
    assert len({t.tokens[0] for t in first if t.tokens}) > 1
    assert sum("gptq" in t.method for t in experts) > 12
    assert any("experts' matrices saw fewer than 128 calibration tokens" in w for w in report.warnings)
    assert "stands in for the missing ones" in caplog.text
    found = qf.evaluate(tmp_path / "m", reference=model, chunks=2, metrics=["ppl", "kld"], noise_floor=False)
    assert (found.models[0].kld_mean or 9) < 0.5
