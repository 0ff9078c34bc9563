"""The evaluation as Markdown, for a model card."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Evaluation, Figure, ModelResult, figure, method, neighbours

HEADER = (
    "| model | MB | bpw | PPL | ln PPL ratio | mean KLD (95%) | median | 99% | same top-1 % | RMS Δp % "
    "| flips right→wrong / wrong→right"
)


def render(evaluation: Evaluation) -> str:
    """A table, the paired differences of neighbours in rank, and how it was measured."""
    e = evaluation
    heads = [f"{_escape(f.label)}{f' ({_escape(f.unit)})' if f.unit else ''}" for f in e.figures]
    lines = ["## What quantization cost", "", " | ".join([HEADER, *heads]) + " |", "|---" + "|--:" * (10 + len(heads)) + "|"]
    lines.append(_row(e.reference, e.figures, reference=True))
    if e.noise_floor:
        lines.append(_row(e.noise_floor, e.figures))
    lines += [_row(m, e.figures) for m in e.models]
    if e.choice:
        lines += ["", e.choice.why]
    verdicts = neighbours(e)
    if verdicts:
        lines += ["", "Neighbours in rank, paired difference of mean KLD:", "", *(f"- {_escape(v)}" for v in verdicts)]
    if e.similarity:
        lines += ["", *_similarity(e)]
    if e.tasks:
        lines += ["", *_tasks(e)]
    return "\n".join([*lines, "", *_method(e), ""])


def _within(m: ModelResult, key: str, value: float | None) -> str:
    """A figure with its interval."""
    i = m.intervals.get(key)
    return figure(value) + (f" ({figure(i['low'])} – {figure(i['high'])})" if i else "")


def _row(m: ModelResult, figures: Sequence[Figure], reference: bool = False) -> str:
    kld = "–" if reference else _within(m, "kld_mean", m.kld_mean)
    flips = f"{m.flips['right_to_wrong']:.0f} / {m.flips['wrong_to_right']:.0f}" if m.flips else "–"
    cells = [
        f"{_escape(m.name)} (reference)" if reference else _escape(m.name),
        f"{m.bytes / 1e6:.2f}",
        f"{m.bpw:.3f}",
        "–" if m.ppl is None else f"{m.ppl:.3f} ± {m.ppl_stderr:.3f}",
        figure(m.ln_ppl_ratio, sign=True),
        kld,
        figure(m.kld_median),
        figure(m.kld_p99),
        "–" if m.same_top is None else f"{m.same_top:.2f}",
        "–" if m.dp_rms is None else f"{m.dp_rms:.2f}",
        flips,
        *(_within(m, f.key, m.metrics.get(f.key)) for f in figures),
    ]
    return "| " + " | ".join(cells) + " |"


def _similarity(e: Evaluation) -> list[str]:
    s = e.similarity or {}
    lines = [
        f"Answers to {s['prompts']} prompts, {s['tokens']} tokens, greedy; cosine by {_escape(s['embedder'])}.",
        "",
        "| model | cosine | equal tokens % | first divergent token (median) | unchanged answers |",
        "|---|--:|--:|--:|--:|",
    ]
    rows = [
        ("ceiling (reference in bf16)", s["ceiling"]),
        *((m.name, m.similarity) for m in e.models),
        ("floor (shuffled pairs)", s["floor"]),
    ]
    for name, r in rows:
        if r:
            cells = (
                f"{r['cosine']:.4f}",
                f"{100 * r['equal_tokens']:.1f}",
                f"{r['first_divergence']:.0f}",
                f"{r['unchanged']:.0f}",
            )
            lines.append(f"| {_escape(name)} | " + " | ".join(cells) + " |")
    return lines


def _tasks(e: Evaluation) -> list[str]:
    names = list((e.tasks or {}).get("names", []))
    lines = ["| model | " + " | ".join(_escape(n) for n in names) + " |", "|---" + "|--:" * len(names) + "|"]
    for m in [e.reference, *e.models]:
        results = m.tasks or {}
        cells = []
        for n in names:
            r = results.get(n)
            flip = "" if not r or r.get("flips") is None else f", {r['flips']['total']:.0f} flips"
            cells.append(f"{r['metric']} {r['value']:.4f}{flip}" if r else "–")
        lines.append(f"| {_escape(m.name)} | " + " | ".join(cells) + " |")
    return lines


def _method(e: Evaluation) -> list[str]:
    return ["### How it was measured", "", *(f"- {k}: {_escape(v)}" for k, v in method(e))]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
