"""GPTQ against an unblocked column loop in float64, and what it does with bad Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge import codecs, methods
from quantforge.codecs import GridCodec
from quantforge.errors import CalibrationError, NonFiniteError, RecipeError, ShapeError, UnsupportedError
from quantforge.methods import GPTQ, Stats, gptq, output_error
from quantforge.methods.numerics.moments import aim, factor

GRIDS = [n for n in codecs.names() if isinstance(codecs.get(n), GridCodec)]


def grid(name: str) -> GridCodec:
    codec = codecs.get(name)
    assert isinstance(codec, GridCodec)
    return codec


def inputs(n: int, tokens: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """Correlated inputs with a few large columns: x[tokens, n]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or n, n, generator=g) / n**0.5 + (torch.eye(n) if rank is None else 0)
    return torch.randn(tokens, rank or n, generator=g) @ mix * torch.exp(torch.randn(n, generator=g))


def stats(x: torch.Tensor) -> Stats:
    return Stats(2 * x.T @ x / len(x), len(x))


def weights(out: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, n, generator=torch.Generator().manual_seed(seed)) * 0.05


def naive(
    w: torch.Tensor, codec: GridCodec, hessian: torch.Tensor, order: list[int], static: bool, size: int = 0
) -> torch.Tensor:
    """The paper's algorithm (OBQ with a fixed order), from a fresh inverse at every step: decoded weights, f64."""
    v, size = codec.vector, size or codec.block_size
    a = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, left, out = w.double().clone(), list(order), torch.zeros(w.shape, dtype=torch.float64)
    cost = torch.zeros(len(hessian), dtype=torch.float64)
    for k in range(len(order)):  # 1 / [inverse of what is left]ⱼⱼ
        cost[order[k]] = 1 / torch.linalg.inv(a[order[k:]][:, order[k:]])[0, 0]
    params = (
        {
            b: codec.fit(w[:, b * size : (b + 1) * size].float(), cost[b * size : (b + 1) * size].float())
            for b in range(len(order) // size)
        }
        if static
        else {}
    )
    while left:
        some, rest = left[:v], left[v:]
        b = some[0] // size
        if b not in params:
            params[b] = codec.fit(w[:, b * size : (b + 1) * size].float(), cost[b * size : (b + 1) * size].float())
        at = some[0] - b * size
        inverse = torch.linalg.inv(a[left][:, left])
        q = codec.round_weighted(w[:, some].float(), params[b], at, torch.linalg.inv(inverse[:v, :v]).diagonal())
        out[:, some] = codec.expand(q, params[b], at).double()
        if rest:
            w[:, rest] -= (w[:, some] - out[:, some]) @ torch.linalg.solve(inverse[:v, :v], inverse[:v, v:])
        left = rest
    return out


@pytest.mark.parametrize(
    ("name", "act_order", "static"),
    [
        *(("Q4_0", a, s) for a in (False, True) for s in (False, True)),
        ("Q2_K", False, False),
        ("Q3_K", True, False),
        ("IQ3_XXS", False, False),
        ("IQ3_XXS", True, True),
    ],
)
def test_equals_the_naive_loop(name: str, act_order: bool, static: bool) -> None:
    codec = grid(name)
    n, v = 2 * max(codec.block_size, 64), codec.vector
    w, h = weights(3, n), stats(inputs(n, 4 * n)).hessian
    diagonal = h.diagonal()
    if not act_order:
        order = list(range(n))
    else:
        vectors = diagonal.reshape(-1, v).sum(1)
        if static:
            firsts = vectors.argsort(descending=True).tolist()
        else:
            size = codec.block_size // v
            by_block = diagonal.reshape(-1, codec.block_size).sum(1).argsort(descending=True).tolist()
            firsts = [
                b * size + i for b in by_block for i in vectors[b * size : (b + 1) * size].argsort(descending=True).tolist()
            ]
        order = [f * v + i for f in firsts for i in range(v)]
    expected = naive(w, codec, h, order, static)
    codes, params = gptq(w, codec, h, act_order=act_order, static_groups=static)
    got = codec.expand(codes, params).double()
    # float32 against float64: a code on the edge may fall to the other side, and what follows makes up for it
    assert (got == expected).double().mean() > 0.97
    errors = [float(torch.einsum("ij,jk,ik->", d, h.double(), d)) for d in (got - w.double(), expected - w.double())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_beats_rtn_on_every_grid(name: str) -> None:
    """On inputs that it has not seen; and the file's bytes decode to what was chosen."""
    codec = grid(name)
    n = max(256, codec.block_size)
    x, w = inputs(n, 6 * n), weights(16, n)
    seen, held_out = stats(x[: 4 * n]), stats(x[4 * n :])
    errors = {}
    for method in ("gptq", "rtn"):
        parts = methods.get(method).quantize(w, codec, seen)
        errors[method] = output_error(w, torch.from_numpy(codec.decode(parts, tuple(w.shape))), held_out)
    assert errors["gptq"] < 0.9 * errors["rtn"]
    codes, params = gptq(w, codec, seen.hessian)
    decoded = codec.decode(codec.pack(codes, params), tuple(w.shape))
    np.testing.assert_array_equal(decoded, codec.expand(codes, params).numpy())


def test_segments_do_not_matter() -> None:
    codec, w, h = grid("Q4_1"), weights(8, 512), stats(inputs(512, 2000)).hessian
    results = [codec.expand(*gptq(w, codec, h, segment=s)) for s in (32, 64, 128, 512)]
    for r in results[1:]:
        assert (r == results[0]).float().mean() > 0.9
        errors = [float(((x - w) @ h * (x - w)).sum()) for x in (r, results[0])]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_shift_aims_at_the_unquantized_outputs() -> None:
    """w′ is the least-squares fit of the outputs w·x₀ by the inputs x."""
    n = 64
    x0 = inputs(n, 1000)
    x = x0 + 0.2 * inputs(n, 1000, seed=5)
    m = 2 / len(x)
    s = Stats(m * x.T @ x, len(x), m * (x0 - x).T @ x, m * (x0 - x).T @ (x0 - x))
    w = weights(8, n)
    assert s.shift is not None
    target = aim(w, s.shift, factor(s.hessian, 1e-9)[0], torch.arange(n))
    expected = torch.linalg.lstsq(x.double(), x0.double() @ w.double().T).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-5)
    exact = float(((x @ target.T - x0 @ w.T) ** 2).sum() / ((x0 @ w.T) ** 2).sum())
    assert output_error(w, target, s) == pytest.approx(exact, rel=1e-2)
    plain = Stats(s.hessian, s.tokens)
    q = {
        k: torch.from_numpy(grid("Q4_0").decode(GPTQ().quantize(w, grid("Q4_0"), v), (8, n))) for k, v in (("s", s), ("p", plain))
    }
    assert output_error(w, q["s"], s) < output_error(w, q["p"], s)


def test_rank_deficient_hessian_is_damped() -> None:
    """Fewer tokens than columns."""
    codec, n = grid("Q4_0"), 128
    x, w = inputs(n, 40, rank=10), weights(8, n)
    codes, params = gptq(w, codec, stats(x).hessian)
    d = codec.expand(codes, params) - w
    rtn = torch.from_numpy(codec.decode(methods.get("rtn").quantize(w, codec, stats(x)), (8, n))) - w
    assert (x @ d.T).norm() < 0.5 * (x @ rtn.T).norm()
    # no damping at all cannot work: the retry finds some
    upper, dead = factor(stats(x).hessian, 0.0)
    assert not dead.any()
    found = torch.linalg.inv(upper.T @ upper).diagonal() - stats(x).hessian.double().diagonal()
    assert float(found.min()) > 0


def test_dead_columns() -> None:
    codec, n = grid("Q8_0"), 64
    x, w = inputs(n, 300), weights(4, n)
    x[:, 7] = x[:, 40] = 0
    w[:, 7] = 1e6  # would ruin the block's scale
    codes, params = gptq(w, codec, stats(x).hessian)
    decoded = codec.expand(codes, params)
    assert decoded[:, [7, 40]].abs().max() == 0
    live = [j for j in range(n) if j not in (7, 40)]
    assert (decoded - w)[:, live].abs().max() < 0.01


def test_bad_statistics_are_one_clear_line() -> None:
    codec, w = grid("Q4_0"), weights(4, 64)
    with pytest.raises(CalibrationError, match="every calibration input is 0"):
        gptq(w, codec, torch.zeros(64, 64))
    with pytest.raises(NonFiniteError, match="not finite"):
        gptq(w, codec, torch.full((64, 64), float("nan")))
    with pytest.raises(CalibrationError, match="no Cholesky factor"):
        gptq(w, codec, torch.ones(64, 64) - 1e6 * (torch.diag(torch.ones(63), 1) + torch.diag(torch.ones(63), -1)))
    with pytest.raises(ShapeError, match="block size 32"):
        gptq(weights(4, 40), codec, torch.eye(40))
    with pytest.raises(UnsupportedError, match="F16 has no grid"):
        GPTQ().quantize(w, codecs.get("F16"), stats(inputs(64, 100)))
    with pytest.raises(RecipeError, match=r"unknown method gtpq \(did you mean gptq"):
        methods.get("gtpq")


@pytest.mark.parametrize("symmetric", ["sym", "asym"])
@pytest.mark.parametrize("per", ["channel", "g32", "g64", "g128"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_equal_the_naive_loop_in_every_order(bits: int, per: str, symmetric: str) -> None:
    """Plain, act-order with groups cut from the sorted columns (g_idx), act-order with static groups."""
    codec, n = grid(f"int{bits}-{per}-{symmetric}"), 128
    # a whole row's scale is fitted once, to all columns
    size = codec.block_size if per != "channel" else n
    w, h = weights(3, n), stats(inputs(n, 4 * n)).hessian
    falling = h.diagonal().argsort(descending=True, stable=True)
    results = {
        "plain": (GPTQ(), codec, naive(w, codec, h, list(range(n)), False, size)),
        "static": (GPTQ(act_order=True, static_groups=True), codec, naive(w, codec, h, falling.tolist(), True, size)),
    }
    if per != "channel":
        found = naive(w[:, falling], codec, h[falling][:, falling], list(range(n)), False, size)
        results["g_idx"] = (GPTQ(act_order=True), codecs.get(f"{codec.name}-act"), found[:, falling.argsort()])
    for order, (method, target, expected) in results.items():
        parts = method.quantize(w, target, stats(inputs(n, 4 * n)))
        got = torch.from_numpy(target.decode(parts, tuple(w.shape))).double()
        assert (got == expected).double().mean() > 0.97, order
        errors = [float(torch.einsum("ij,jk,ik->", d, h.double(), d)) for d in (got - w.double(), expected - w.double())]
        assert errors[0] == pytest.approx(errors[1], rel=0.02), order
        if order == "g_idx":
            assert np.array_equal(np.bincount(parts["group"]), [size] * (n // size))
            assert size == n or (np.diff(parts["group"]) < 0).any()


def test_options_find_their_method() -> None:
    method = methods.get("gptq", act_order=True, damping=0.05, static_groups=None)
    assert method == GPTQ(damping=0.05, act_order=True)
    both = methods.get("awq+gptq", static_groups=True)
    assert isinstance(both, methods.AWQ)
    assert both.inner == GPTQ(static_groups=True)
    assert both.name == "awq+gptq"
    with pytest.raises(RecipeError, match=r"--act-order goes with --method awq\+gptq or gptq, not awq"):
        methods.get("awq", act_order=True)
    for damping in (-0.1, 1.0, float("nan")):
        with pytest.raises(RecipeError, match="--damping"):
            methods.get("gptq", damping=damping)
