"""Models side by side on text: against real llama.cpp's logits, what is held meanwhile, and numbers that overflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.calibration.corpus import BUILTIN, Corpus, cut
from quantforge.demo import MODEL
from quantforge.errors import NonFiniteError
from quantforge.evaluation import metrics
from quantforge.evaluation.comparison import Comparison
from quantforge.runtime import Model
from quantforge.tokenizer import Tokenizer
from tests import checkpoints
from tests.llama_cpp import Llama

TEXT = MODEL.parent / "text" / "heldout.txt"
WINDOWS = 10

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(ggufs: dict[str, Path]) -> qf.Evaluation:
    return qf.evaluate(ggufs, reference=ggufs["F16"], chunks=WINDOWS, answer_tokens=12)


@pytest.fixture(scope="module")
def llama_logits(ggufs: dict[str, Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Log-probabilities float64 [scored, vocabulary] of each file under llama.cpp, and the tokens that follow."""
    logits: dict[str, np.ndarray] = {}
    targets = np.zeros(0, int)
    for name, path in ggufs.items():
        with Llama(path) as model:
            tokens = model.tokenize(TEXT.read_text(), add_special=True)[: 256 * WINDOWS]
            rows = []
            for w in range(WINDOWS):
                window = [tokens[0], *tokens[w * 256 + 1 : (w + 1) * 256]]  # BOS, as llama-perplexity does
                rows.append(model.logits(window)[128:255].astype(np.float64))
            z = np.concatenate(rows)
            z -= z.max(-1, keepdims=True)
            logits[name] = z - np.log(np.exp(z).sum(-1, keepdims=True))
            targets = np.concatenate([tokens[w * 256 + 129 : (w + 1) * 256] for w in range(WINDOWS)])
    return logits, targets


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_K_M"])
def test_perplexity_is_llama_cpps(found: qf.Evaluation, llama_logits: Any, kind: str) -> None:
    logits, targets = llama_logits
    want = np.exp(-logits[kind][np.arange(len(targets)), targets].mean())
    ours = next(m for m in found.models if m.name == kind)
    assert found.text["tokens_scored"] == len(targets) == WINDOWS * 127
    assert ours.ppl == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_divergence_is_llama_cpps(found: qf.Evaluation, llama_logits: Any, kind: str) -> None:
    logits, _ = llama_logits
    p, q = logits["F16"], logits[kind]
    kld = (np.exp(p) * (p - q)).sum(-1)
    ours = next(m for m in found.models if m.name == kind)
    # llama.cpp rounds activations to 8 bits for K-quants' products, in blocks of 256: its own loss, on top
    assert ours.kld_mean == pytest.approx(kld.mean(), rel=0.02 if kind == "Q4_0" else 0.05)
    assert ours.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=0.1)
    assert ours.same_top == pytest.approx(100 * (p.argmax(-1) == q.argmax(-1)).mean(), abs=1)


def test_same_numbers_have_no_divergence(found: qf.Evaluation, ggufs: dict[str, Path]) -> None:
    same = found.models[0]
    assert same.name == "F16" and same.kld_max == 0 and same.same_top == 100 and same.flips["total"] == 0
    assert same.similarity["cosine"] == pytest.approx(1) and same.similarity["unchanged"] == 32
    floor = found.noise_floor
    assert 0 < floor.kld_mean < found.models[2].kld_mean / 10
    assert [m.bytes for m in found.models] == [p.stat().st_size for p in ggufs.values()]
    assert 4.5 < found.models[1].bpw_body < 4.6 < found.models[1].bpw


def test_intervals_and_tensors(found: qf.Evaluation) -> None:
    q4 = found.models[1]
    for key, value in (("kld_mean", q4.kld_mean), ("ppl", q4.ppl), ("ln_ppl_ratio", q4.ln_ppl_ratio), ("same_top", q4.same_top)):
        i = q4.intervals[key]
        assert i["low"] < value < i["high"] and i["estimate"] == pytest.approx(value)
    pair = next(d for d in found.intervals["differences"] if d["a"] == "Q4_0" and d["b"] == "Q4_K_M")
    assert pair["kld_mean"]["estimate"] == pytest.approx(q4.kld_mean - found.models[2].kld_mean)
    assert pair["kld_mean"]["low"] > 0  # with so few windows, pairing is what makes this difference clear
    down = next(t for t in q4.tensors if t.name == "model.layers.3.mlp.down_proj.weight")
    assert (down.role, down.layer, down.type, down.bpw) == ("ffn_down", 3, "Q4_0", 4.5)
    assert 0.05 < down.rel_rmse < 0.12 and 0.03 < down.weighted_error < 0.15
    assert {t.role for t in q4.tensors} >= {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "token_embd"}
    assert len(q4.hidden_error) == 6 and 0 < q4.hidden_error[0] < q4.hidden_error[-1]


def test_one_window_has_no_intervals(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    two = {k: ggufs[k] for k in ("Q4_0", "Q4_K_M")}
    e = qf.evaluate(two, reference=MODEL, chunks=1, metrics=["kld"], report=[tmp_path / "r.md", tmp_path / "r.json"])
    assert np.isnan(e.models[0].intervals["kld_mean"]["low"])
    assert "nan" not in (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["models"][0]["intervals"]["kld_mean"]["low"] is None


def damaged(tmp_path: Path, tensor: str, value: float, at: tuple[int, ...]) -> Path:
    shutil.copytree(MODEL, tmp_path / "damaged", ignore=shutil.ignore_patterns("*.gguf", "llama.cpp.json"))
    weights = load_file(MODEL / "model.safetensors")
    weights[tensor] = weights[tensor].copy()
    weights[tensor][at] = value
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    return tmp_path / "damaged"


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.layers.2.mlp.up_proj.weight", float("nan"), (3, 5))
    with pytest.raises(NonFiniteError, match=r"damaged: model\.layers\.2\.mlp\.up_proj\.weight: weight \[3, 5\] is nan"):
        qf.evaluate(path, reference=MODEL, chunks=1)


def test_activations_that_overflow(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.layers.2.mlp.up_proj.weight", 3e38, (slice(None), slice(None)))
    with pytest.raises(NonFiniteError, match=r"damaged: not a number after model\.layers\.2\.mlp\.up_proj"):
        qf.evaluate(path, reference=MODEL, chunks=1)


def test_final_states_that_overflow(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.norm.weight", 3e38, (slice(None),))
    with pytest.raises(NonFiniteError, match=r"damaged: not a number after the final norm"):
        qf.evaluate(path, reference=MODEL, chunks=1)


PEAK = """
import sys
import quantforge as qf
from quantforge import sizes
options = {"text": sys.argv[1], "prompts": ["In Python, a list", "To open a table"], "answer_tokens": 3, "ctx": 128, "chunks": 6}
qf.evaluate(sys.argv[2], reference=sys.argv[2], **options)  # what libraries load and keep
before = sizes.resident()
run = qf.evaluate(sys.argv[3:], reference=sys.argv[3], **options)
weights = run.similarity["weight_bytes"]
held = run.run["hidden_bytes"] + max(run.run["block_bytes"], run.run["head_bytes"] + run.run["logit_bytes"])
print(sizes.resident(peak=True) - before, held, weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_depth_or_models(tmp_path: Path) -> None:
    """Peak of a process that evaluates, answers and noise floor included, is what the report says."""
    (tmp_path / "text").write_text(TEXT.read_text()[:20_000])
    small = checkpoints.model(tmp_path / "small", "Llama")
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024, "vocab_size": 30_000}
    found = []
    for layers, models in ((4, 1), (16, 3)):
        source = checkpoints.model(tmp_path / "sources" / f"{layers}", "Llama", num_hidden_layers=layers, **sizes)
        copies = [tmp_path / f"{layers}-{i}" for i in range(models)]
        for c in copies:
            c.symlink_to(source)
        # freed memory goes back at once: what is measured is what is in use
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        command = [sys.executable, "-c", PEAK, str(tmp_path / "text"), str(small), *map(str, copies)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append([int(n) for n in done.stdout.split()])
    (shallow, held, weights), (deep, held_too, weights_too) = found
    block, ends = 4 * (384 * 384 * 3 + 384 * 1024 * 3), 2 * 4 * 384 * 30_000
    assert ends < weights == weights_too < ends + 2 * block  # not twelve blocks more
    assert held < held_too < 120e6 < 3 * ends  # two models more: their blocks, not their heads
    for peak, said in ((shallow, max(held, weights)), (deep, max(held_too, weights_too))):
        assert said / 2 < peak < 2 * said + 40e6
    assert deep < shallow + 10 * block  # of the 48 that three models have more


def test_what_is_told_and_kept(ggufs: dict[str, Path]) -> None:
    """Progress goes from nothing to all of the blocks, then of the tokens; every metric gets the same tokens and draws."""
    told: list[tuple[str, int, int]] = []
    with ExitStack() as stack:
        models = [Model(stack.enter_context(qf.open(ggufs[k])), k) for k in ("F16", "Q4_0")]
        tokenizer = Tokenizer(MODEL, models[0].config, gguf_metadata=False)
        windows = cut(Corpus.read(BUILTIN, tokenizer), tokenizer, 64, chunks=3)
        run = Comparison(models, windows, metrics.chosen(["kld"]), lambda *what: told.append(what))
        run.go()
    blocks = [t[1:] for t in told if t[0] == "blocks"]
    tokens = [t[1:] for t in told if t[0] == "tokens"]
    assert told == [*(("blocks", *b) for b in blocks), *(("tokens", *t) for t in tokens)]
    for stages in (blocks, tokens):
        assert [done for done, _ in stages] == sorted(done for done, _ in stages)
        assert len({of for _, of in stages}) == 1 and stages[-1][0] == stages[-1][1]
    ref, q4 = run.seen(0, "ppl"), run.seen(1, "kld")
    assert ref.tokens is q4.reference and ref.bootstrap is q4.bootstrap and ref.collected is None
    assert len(q4.targets) == len(q4.tokens.nll) == 3 * 31 and (ref.tokens.kld == 0).all() and q4.tokens.kld.mean() > 0
    assert run.clusters[1] == "windows" and run.clusters[0].n == 3
    assert not run.tensors[0] and {t.type for t in run.tensors[1]} >= {"Q4_0", "F32"}
    assert run.held_bytes >= run.hidden_bytes + run.block_bytes
