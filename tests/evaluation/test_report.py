"""Reports: the JSON schema, Markdown, and the HTML page, in a real browser where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantforge.errors import UnsupportedError
from quantforge.evaluation.report import Evaluation, Figure, ModelResult, Recommendation, TensorError

FIELDS = {
    *("name", "bytes", "bpw", "ppl", "ppl_stderr", "kld_mean", "kld_median", "kld_p99", "kld_p999", "kld_max"),
    *("same_top", "dp_rms", "flips", "similarity", "intervals"),
}

TYPES = {
    "Q8_0": (6.27, 8.5, 0.0006),
    "Q6_K": (4.88, 6.6, 0.0032),
    "Q5_K_M": (4.31, 5.8, 0.0075),
    "Q4_K_M": (3.78, 5.1, 0.026),
    "Q4_0": (3.66, 4.9, 0.041),
    "IQ4_XS": (3.51, 4.7, 0.0316),
    "Q3_K_M": (3.28, 4.4, 0.078),
    "Q2_K": (2.73, 3.6, 0.27),
    "IQ2_XXS": (2.1, 2.8, 0.77),
}
ROLES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def model(name: str, mb: float, bpw: float, kld: float | None, layers: int = 6) -> ModelResult:
    rng = np.random.default_rng(len(name))
    m = ModelResult(
        name=name,
        path=f"/models/{name}.gguf",
        format="gguf",
        bytes=int(mb * 1e6),
        parameters=5_770_496,
        bpw=bpw,
        bpw_body=bpw - 0.4,
        types={name: 5_000_000, "F32": 10_000},
        ppl=19.2 * float(np.exp((kld or 0) * 0.9)),
        ppl_stderr=0.29,
    )
    if kld is None:
        return m
    for k, f in {"mean": 1, "median": 0.6, "p90": 2.1, "p95": 3, "p99": 6, "p999": 14, "max": 30}.items():
        setattr(m, f"kld_{k}", kld * f)
    m.ln_ppl_ratio, m.same_top, m.dp_mean, m.dp_rms = kld * 0.9, 100 - 50 * kld**0.5, -kld, 20 * kld**0.5
    n = int(19000 * kld**0.5)
    m.flips = {"right_to_wrong": n // 3, "wrong_to_right": n // 5, "wrong_to_wrong": n // 2, "total": n, "percent": n / 384}
    m.intervals = {
        k: {"estimate": v, "low": v * 0.95, "high": v * 1.06, "stderr": v * 0.03}
        for k, v in {"kld_mean": kld, "ln_ppl_ratio": m.ln_ppl_ratio, "same_top": m.same_top}.items()
    }
    m.metrics = {"toy": 2 * kld}
    m.hidden_error = [float(kld**0.5 * (0.3 + 0.1 * i)) for i in range(layers)]
    m.tensors = [
        TensorError(
            f"blk.{i}.{r}.weight", r, i, name, [256, 256], bpw, float(e := 0.4 * kld**0.5 * rng.uniform(0.6, 1.4)), float(e * 0.8)
        )
        for i in range(layers)
        for r in ROLES
    ]
    m.tensors.append(TensorError("token_embd.weight", "token_embd", None, "Q6_K", [4096, 256], 6.56, 0.018, None))
    return m


def evaluation(layers: int = 6) -> Evaluation:
    models = [model(k, *v, layers) for k, v in TYPES.items()]
    differences = [
        {"a": a.name, "b": b.name, "kld_mean": {"estimate": d, "low": d - 0.01, "high": d + 0.01, "stderr": 0.005}}
        for i, a in enumerate(models)
        for b in models[i + 1 :]
        for d in [(a.kld_mean or 0) - (b.kld_mean or 0)]
    ]
    reference = [" set", " the", " value", " of", " the", " parameter", " to", " <", "b", ">", " in", " the", " table", "."]
    for i, m in enumerate(models):
        m.similarity = {
            "cosine": 1 - (m.kld_mean or 0) / 4,
            "scaled": 1 - (m.kld_mean or 0) / 2,
            "equal_tokens": 0.9 - 0.08 * i,
            "first_divergence": 40.0 - 4 * i,
            "unchanged": 20 - 2 * i,
        }
    answers = [
        {
            "prompt": "The CREATE TABLE command",
            "reference": reference,
            "models": {m.name: [*reference[: 12 - i], " index", "."] for i, m in enumerate(models)},
        },
        {"prompt": "In Python, a list", "reference": reference[::-1], "models": {m.name: reference[::-1] for m in models}},
    ]
    floor = {"cosine": 0.4, "scaled": 0.0, "equal_tokens": 0.03, "first_divergence": 0.0, "unchanged": 0}
    return Evaluation(
        reference=model("demo-model", 11.5, 16, None),
        models=models,
        noise_floor=model("reference in bf16", 11.5, 16, 2.5e-5),
        text={
            "name": "heldout.txt",
            "sha256": "0123abcd" * 8,
            "documents": 99,
            "tokens": 220_000,
            "tokens_scored": 38_400,
            "windows": 300,
            "ctx": 256,
            "stride": None,
            "bos": True,
            "scoring": "the second half of each window is scored",
            "bos_note": "BOS in front of every window",
        },
        intervals={
            "method": "95% paired bootstrap over 35 documents, 2000 resamples",
            "level": 0.95,
            "clusters": 35,
            "differences": differences,
        },
        similarity={
            "embedder": "mean hidden state of the reference",
            "prompts": 2,
            "tokens": 14,
            "ceiling": {**floor, "cosine": 1.0, "scaled": 1.0, "equal_tokens": 1.0},
            "floor": floor,
            "answers": answers,
        },
        tasks={"names": ["arc_easy"]},
        run={
            "seconds": 20.0,
            "tokens_per_second": 3840.0,
            "device": "cpu",
            "machine": "two cores",
            "memory": "peak 0.4 GB: one block of each model",
            "versions": {"quantforge": "0.1.0"},
        },
        choice=Recommendation(
            4_000_000,
            256,
            196_608,
            "Q4_K_M",
            "Q4_K_M is the closest to the reference of those that fit 4.00 MB with 256 tokens of context.",
            {},
        ),
        figures=[Figure("toy", "toy <i>", "nats", "lower")],
    )


def test_json_schema(tmp_path: Path) -> None:
    e = evaluation()
    e.models[0].intervals["kld_mean"]["low"] = float("nan")
    e.save(tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["schema"] == "quantforge.evaluation/1"
    for m in found["models"]:
        assert set(m) >= FIELDS
    assert found["models"][0]["intervals"]["kld_mean"]["low"] is None  # JSON has no NaN
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


def test_markdown_survives_hostile_names(tmp_path: Path) -> None:
    e = evaluation()
    e.models[0].name = "a|b<script>"
    e.save(tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| a"))
    assert row.startswith("| a\\|b&lt;script> | 6.27 | 8.500 |")
    table = [line for line in lines if line.startswith("|")][: 2 + 11]
    assert {line.replace("\\|", "").count("|") for line in table} == {13}
    assert table[0].endswith("| toy &lt;i> (nats) |")
    assert any("Q4_K_M against IQ4_XS" in line and "not distinguishable" in line for line in lines)


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"must end in \.json, \.md, \.html"):
        evaluation().save(tmp_path / "r.pdf")
    assert not list(tmp_path.iterdir())


def test_html_needs_no_network(tmp_path: Path) -> None:
    e = evaluation()
    e.models[0].name = "</script><script>alert(1)</script>"
    e.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "alert(1)</script>" not in page
    head = page[: page.index('<script type="application/json"')]
    assert "http" not in head and "src=" not in head
    assert "@@TITLE" not in page and "@@DATA" not in page


@pytest.fixture(scope="module")
def browser() -> Any:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("no chromium")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield b
        b.close()


@pytest.mark.parametrize(("width", "layers"), [(1280, 6), (390, 6), (1280, 80)])
def test_html_in_a_browser(tmp_path: Path, browser: Any, width: int, layers: int) -> None:
    e = evaluation(layers)
    e.models[0].name = "<b>&'\"</script>"
    e.save(tmp_path / "r.html")
    page = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda x: said.append(str(x)))
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length >= 10")
    assert page.locator("#plot-size .point").count() == 9
    assert page.locator("#plot-size .yerror").count() == 9
    assert page.locator("#plot-tail .scatter .js-line").count() == 9
    assert page.locator("#plot-heat .heatmaplayer image").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.evaluate("document.getElementById('plot-heat').parentElement.scrollWidth") <= width
    sizes = """[...document.querySelectorAll('p, td, th, small, li, dd, label, svg text')].filter(e => e.textContent.trim())
        .map(e => parseFloat(getComputedStyle(e).fontSize))"""
    assert min(page.evaluate(sizes)) >= 10  # px: readable on a phone

    def names() -> list[str]:
        found: list[str] = page.locator("#table tbody td:first-child").all_text_contents()
        return found

    assert page.locator("#table th button", has_text="toy <i>, nats").count() == 1
    by_size = names()
    assert by_size[0] == "IQ2_XXS"
    page.locator("#table th button", has_text="mean KLD").click()
    assert names()[:2] == ["reference in bf16", "<b>&'\"</script>"]
    page.locator("#table th button", has_text="mean KLD").click()
    assert names()[0] == "IQ2_XXS" and names()[-1].startswith("demo-model")  # no figure sorts last either way
    page.select_option("#answers-model", "Q2_K")
    assert page.locator("#right mark.first").text_content() == " index"
    page.select_option("#answers-prompt", "1")
    assert page.locator("#right mark").count() == 0 and "the same answer" in page.locator("#right-name").text_content()
    page.select_option("#heat-what", "bpw")
    page.select_option("#heat-model", "Q6_K")
    assert not said
    page.close()
