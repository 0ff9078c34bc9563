"""Statistics against known answers, intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import NonFiniteError, ShapeError
from quantforge.evaluation import metrics
from quantforge.evaluation.metrics.bootstrap import _student
from quantforge.evaluation.metrics.flips import flips
from quantforge.evaluation.metrics.kld import divergence
from quantforge.evaluation.metrics.ppl import perplexity
from quantforge.evaluation.metrics.similarity import cosine, equal_share, first_divergence


def score(*logits: np.ndarray, targets: np.ndarray, step: int = 7, columns: int = 90) -> metrics.Score:
    """Some tokens and some of the vocabulary at a time."""
    s = metrics.Score([f"m{i}" for i in range(len(logits))], targets)
    for c in range(0, logits[0].shape[1], columns):
        for a in range(0, len(targets), step):
            at = slice(a, min(a + step, len(targets)))
            s.add([z[at, c : c + columns].copy() for z in logits], at, c)
    return s


def test_against_float64() -> None:
    rng = np.random.default_rng(1)
    ref = rng.normal(0, 3, (50, 1000)).astype(np.float32) + 40
    cand = (ref + rng.normal(0, 0.01, ref.shape)).astype(np.float32) - 7  # a constant must not matter
    targets = rng.integers(0, 1000, 50)
    s = score(ref, cand, targets=targets)

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64)
        return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)

    p, q = log_softmax(ref), log_softmax(cand)
    kld = (np.exp(p) * (p - q)).sum(-1)
    r, c = s.tokens(0), s.tokens(1)
    np.testing.assert_allclose(c.kld, kld, atol=3e-7)
    assert kld.mean() < 2e-4  # a divergence this small is still resolved:
    assert c.kld.mean() == pytest.approx(kld.mean(), rel=1e-3)
    np.testing.assert_allclose(c.nll, -q[np.arange(50), targets], rtol=1e-6)
    np.testing.assert_allclose(r.nll, -p[np.arange(50), targets], rtol=1e-6)
    assert (r.kld == 0).all()
    np.testing.assert_array_equal(s.targets, targets)
    np.testing.assert_array_equal(c.top, cand.argmax(-1))
    d = divergence(c, r)
    assert d["kld_p99"] == pytest.approx(np.percentile(kld, 99), abs=2e-6)
    dp = 100 * (np.exp(q) - np.exp(p))[np.arange(50), targets]
    assert d["dp_rms"] == pytest.approx(np.sqrt((dp**2).mean()), rel=1e-3)
    assert d["dp_mean"] == pytest.approx(dp.mean(), abs=1e-5)


def test_known_answers() -> None:
    uniform = np.zeros((4, 8), np.float32)
    half = np.log(np.array([0.5] * 2 + [1e-30] * 6, np.float32))[None].repeat(4, 0)
    s = score(half, uniform, half, targets=np.array([0, 1, 0, 1]))
    ref, flat, same = (s.tokens(i) for i in range(3))
    assert perplexity(ref)["ppl"] == pytest.approx(2)
    assert perplexity(flat) == {"ppl": pytest.approx(8), "ppl_stderr": pytest.approx(0, abs=1e-6)}
    np.testing.assert_allclose(flat.kld, np.log(4), rtol=1e-6)
    d = divergence(flat, ref)
    seen = metrics.Seen(1, flat, ref, s.targets, metrics.Bootstrap(np.arange(4)))
    assert metrics.get("ppl").measure(seen).figures["ln_ppl_ratio"] == pytest.approx(np.log(4))
    assert d["dp_mean"] == pytest.approx(100 * (1 / 8 - 1 / 2))
    assert d["dp_rms"] == pytest.approx(37.5)
    e = divergence(same, ref)
    assert e["kld_max"] == 0 and e["same_top"] == 100 and e["dp_rms"] == 0


def test_stderr_is_that_of_independent_tokens() -> None:
    nll = np.random.default_rng(0).exponential(2, 10_000)
    p = perplexity(metrics.Tokens(nll, np.zeros(10_000, int), nll * 0))
    assert p["ppl_stderr"] == pytest.approx(np.exp(nll.mean()) * nll.std() / 100, rel=1e-3)


def test_flips() -> None:
    targets = np.array([1, 1, 1, 1, 1])
    ref = np.array([1, 2, 2, 2, 1])
    top = np.array([2, 1, 3, 2, 1])
    f = flips(top, ref, targets)
    assert f == {"right_to_wrong": 1, "wrong_to_right": 1, "wrong_to_wrong": 1, "total": 3, "percent": 60}


def test_not_a_number_names_the_model() -> None:
    z = np.zeros((3, 5), np.float32)
    bad = z.copy()
    bad[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match="m1: logit 2 of scored token 1 is not finite") as raised:
        score(z, bad, targets=np.zeros(3, int), columns=2)
    assert raised.value.index == (1, 1, 2)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"m1: logits \[3, 6\]"):
        score(np.zeros((3, 5)), np.zeros((3, 6)), targets=np.zeros(3, int))


def test_half_precision_logits_are_widened() -> None:
    z = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    s = metrics.Score(["a", "b"], torch.zeros(20, dtype=torch.int64))
    s.add([z, z.float()])
    assert s.tokens(1).kld.max() < 1e-6


@pytest.mark.parametrize(("p", "df", "t"), [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 5, 2.57058), (0.975, 30, 2.04227)])
def test_student(p: float, df: int, t: float) -> None:
    assert _student(p, df) == pytest.approx(t, rel=2e-3)


@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_covers(skewed: bool) -> None:
    """95% intervals of a mean and of a paired difference, on 40 documents of unequal length with common effects."""
    rng = np.random.default_rng(5)
    hits = paired = naive = 0
    trials = 500
    for trial in range(trials):
        sizes = rng.integers(20, 200, 40)
        clusters = np.repeat(np.arange(40), sizes)
        effect = rng.normal(0, 1, (2, 40)) if not skewed else rng.gamma(4, 0.5, (2, 40)) - 2
        a = 3 + effect[0][clusters] + rng.normal(0, 1, len(clusters))
        b = a + 0.1 + 0.3 * effect[1][clusters] + rng.normal(0, 0.2, len(clusters))
        boot = metrics.Bootstrap(clusters, resamples=500, seed=trial)
        one, two = boot.interval(a), boot.interval(b - a)
        hits += one.low <= 3 <= one.high
        paired += two.low <= 0.1 <= two.high
        naive += abs(a.mean() - 3) <= 1.96 * a.std() / np.sqrt(len(a))
    assert 0.92 <= hits / trials <= 0.98
    assert 0.92 <= paired / trials <= 0.98
    assert naive / trials < 0.5  # what tokens taken as independent would give


def test_bootstrap_is_paired() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 50)
    a = rng.normal(0, 5, 30)[clusters]
    boot = metrics.Bootstrap(clusters)
    assert boot.interval(a).stderr > 0.5
    shifted = boot.interval((a + 0.25) - a)
    assert (shifted.low, shifted.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_one_cluster_has_no_interval() -> None:
    i = metrics.Bootstrap(np.zeros(10, np.int64)).interval(np.arange(10.0))
    assert i.estimate == 4.5 and np.isnan(i.low) and np.isnan(i.high)


def test_answers() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert equal_share([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert equal_share([], []) == 1
    np.testing.assert_allclose(cosine([[1, 0], [1, 1], [0, 0]], [[2, 0], [-1, 1], [1, 0]]), [1, 0, 0], atol=1e-12)
