"""Tables of a run: everything in plain text, Markdown for the README, and what the targets are missed by. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .run import Row, Run

BASE = "torch bf16"
UP_TO = (1, 8, 32, 64, 128, 1024, 4096)
"""Columns of the targets: this many activations, or fewer than that and more than in the column before."""
MANY = (0.9, 0.95)

_FOUR = (2.7, 2.5, 2.2, 1.7, 1.2, *MANY)
_GROUPS = (2.8, 2.6, 2.2, 1.7, 1.25, *MANY)
SPEED_UP: dict[str, tuple[float, ...]] = {
    "Q8_0": (1.6, 1.6, 1.5, 1.3, 1.1, *MANY),
    "Q6_K": (2.0, 1.9, 1.8, 1.5, 1.15, *MANY),
    "Q4_0": _FOUR,
    "Q4_K": _FOUR,
    "nf4": _FOUR,
    "IQ4_XS": _GROUPS,
    "int4-g128-sym": _GROUPS,
    "int4-g128-asym": _GROUPS,
    "IQ2_XXS": (3.6, 3.2, 2.4, 1.7, 1.2, *MANY),
}
"""Targets, times bf16, on an H200 with 8192 × 8192."""


@dataclass(frozen=True)
class Lead:
    """How much faster than whom."""

    codec: str
    over: str
    """The beginning of a library's name; the fastest of those that begin so counts."""
    least: int
    most: int
    """Activations."""
    times: float


LEADS = [
    *(Lead("int4-g128-sym", over, 1, 8, 1.3) for over in ("Marlin", "torch int4")),
    *(Lead("int4-g128-sym", over, 16, 64, 1.0) for over in ("Marlin", "torch int4")),
    *(Lead(codec, f"llama.cpp {codec}", 1, 8, 1.3) for codec in ("Q4_K", "Q6_K")),
    Lead("IQ2_XXS", "llama.cpp IQ2_XXS", 1, 8, 1.8),
    Lead("nf4", "bitsandbytes NF4", 1, 128, 1.2),
    *(Lead(codec, f"llama.cpp {codec}", 1, 0, 0) for codec in ("Q8_0", "Q4_0", "IQ4_XS")),  # compared, without a target
]

INSTRUCTIONS = Path(__file__).parents[2] / "docs/gpu.md"
"""Where the instructions per weight are, as counted in the machine code."""


def target(codec: str, m: int) -> float | None:
    """Times bf16."""
    column = next((i for i, most in enumerate(UP_TO) if m <= most), None)
    return SPEED_UP[codec][column] if codec in SPEED_UP and column is not None else None


def counted(page: Path = INSTRUCTIONS) -> dict[str, float]:
    """Codec -> instructions per weight of the kernels for few activations, from the table in docs/gpu.md."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    start = next((i for i, line in enumerate(lines) if re.match(r"\| *type *\| *instructions per weight", line)), len(lines))
    found = {}
    for line in lines[start + 2 :]:
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        number = re.match(r"[\d.]+", cells[1]) if len(cells) > 1 else None
        if number is None:
            break
        found[cells[0]] = float(number[0])
    return found


# ---- what is in a run


def chosen(rows: Iterable[Row]) -> dict[tuple[str, int, int, int], Row]:
    """(name, n, k, m) -> the time of the way that is taken: a row's first without a configuration."""
    found: dict[tuple[str, int, int, int], Row] = {}
    for r in rows:
        if not r.config:
            found.setdefault((r.name, r.n, r.k, r.m), r)
    return found


def _fastest(times: dict[tuple[str, int, int, int], Row], over: str, n: int, k: int, m: int) -> Row | None:
    found = [r for (name, *at), r in times.items() if name.startswith(over) and at == [n, k, m]]
    return min(found, key=lambda r: r.us, default=None)


def _ratio(slow: Row | None, fast: Row | None) -> float | None:
    return slow.us / fast.us if slow and fast else None


def _cell(ratio: float | None, wanted: float | None) -> str:
    """A ratio, and in brackets the target that it misses."""
    if ratio is None:
        return "–"
    return f"{ratio:.2f}" + (f" ({wanted:g})" if wanted is not None and ratio < wanted else "")


def bounds(r: Row, run: Run, instructions: dict[str, float]) -> dict[str, float]:
    """What a product must take at least, µs: its bytes, its instructions, its launch, its arithmetic."""
    assert run.limits
    inputs = 2 * r.m * (r.n + r.k)
    found = {
        "bytes": (r.nbytes + inputs) / run.limits.copy_gbs / 1e3,
        "launch": run.limits.launch_us,
        "arithmetic": 2 * r.m * r.n * r.k / run.limits.gemm_tflops / 1e6,
    }
    if r.name in instructions and r.way == "matvec" and run.limits.issue_tops:
        rounds = math.ceil(r.m / 16)  # of the whole matrix
        found["instructions"] = instructions[r.name] * r.n * r.k * rounds / run.limits.issue_tops / 1e6
    return found


# ---- tables


def text(run: Run) -> Iterator[str]:
    """Everything, a line at a time."""
    times, instructions = chosen(run.rows), counted()
    others = {r.name for r in run.rows if r.name not in instructions and r.name != BASE}
    yield f"{run.machine}"
    if run.limits:
        yield (
            f"copy {run.limits.copy_gbs:.0f} GB/s; bf16 8192³ {run.limits.gemm_tflops:.0f} TFLOP/s; "
            f"a kernel in a graph {run.limits.launch_us:.2f} µs; {run.limits.issue_tops:.1f} T instructions/s"
        )
    yield f"{'':22} {'N×K':>12} {'M':>5} {'µs':>9} {'GB/s':>6} {'%copy':>6} {'×bf16':>6} {'×peer':>6} {'error':>8}  way"
    copy = run.limits.copy_gbs if run.limits else math.nan
    for r in run.rows:
        at = (r.n, r.k, r.m)
        peers = [p for name in others - {r.name} if (p := times.get((name, *at)))]
        base, peer = times.get((BASE, *at)), min(peers, key=lambda p: p.us, default=None)
        ratios = (f"{found:6.2f}" if (found := _ratio(over, r)) else "     –" for over in (base, peer))
        yield (
            f"{r.name:22} {f'{r.n}×{r.k}':>12} {r.m:>5} {r.us:9.2f} {r.gbs:6.0f} {100 * r.gbs / copy:6.1f} {' '.join(ratios)} "
            f"{r.error:8.1e}  {r.way} {r.config}"
        )
    for name, why in run.missing.items():
        yield f"not measured: {name}: {why}"
    yield from (f"encode {e['codec']}: {e['gweights_s']:.2f} G weights/s" for e in run.encode)
    yield from (str(e) for e in run.model)


def _table(head: list[str], lines: Iterable[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for cells in lines:
        yield "| " + " | ".join(cells) + " |"


def readme(run: Run, shape: tuple[int, int] = (8192, 8192)) -> Iterator[str]:
    """Markdown: × bf16 by codec and M; × other libraries; where a target is missed and what binds there; models."""
    times = chosen(run.rows)
    if not any((n, k) == shape for _, n, k, _ in times):
        shape = next(((n, k) for _, n, k, _ in times), shape)
    here = {(name, m): r for (name, n, k, m), r in times.items() if (n, k) == shape}
    ms = sorted({m for _, m in here})
    ours = [name for name in dict.fromkeys(name for name, _ in here) if name in SPEED_UP or name in counted()]
    part = "" if run.finished else " (an unfinished run)"
    if here:
        where = f"{run.machine.get('device')}, {run.machine.get('date')}{part}: {shape[0]}×{shape[1]}"
        yield f"{where}, times faster than bf16; weights not in the L2, bf16 activations. In brackets: the target, where missed."
        yield ""
        lines = [["bf16, µs", *(f"{here[BASE, m].us:.1f}" if (BASE, m) in here else "–" for m in ms), ""]]
        for name in ours:
            cells = [_cell(_ratio(here.get((BASE, m)), here.get((name, m))), target(name, m)) for m in ms]
            worst = max((r.error for (other, _), r in here.items() if other == name), default=math.nan)
            lines.append([name, *cells, f"{worst:.1e}"])
        yield from _table(["", *(f"M={m}" for m in ms), "error"], lines)
        yield from _leads(run, times, shape, ms)
        yield from _missed(run, times)
    yield from _models(run)


def _leads(run: Run, times: dict[tuple[str, int, int, int], Row], shape: tuple[int, int], ms: list[int]) -> Iterator[str]:
    few = [m for m in ms if m <= 128]
    pairs: dict[tuple[str, str], dict[int, float]] = {}
    for lead in LEADS:
        wanted = pairs.setdefault((lead.codec, lead.over), {})
        wanted |= {m: lead.times for m in few if lead.least <= m <= lead.most}
    lines = []
    for (codec, over), wanted in pairs.items():
        found = [_ratio(_fastest(times, over, *shape, m), times.get((codec, *shape, m))) for m in few]
        if any(found):
            lines.append([f"{codec} / {over}", *(_cell(r, wanted.get(m)) for m, r in zip(few, found, strict=True))])
    if lines:
        yield ""
        yield from _table(["times faster than", *(f"M={m}" for m in few)], lines)


def _missed(run: Run, times: dict[tuple[str, int, int, int], Row]) -> Iterator[str]:
    """Every cell below its target: the time that it would need, and what binds."""
    instructions, lines = counted(), []
    for (name, n, k, m), r in times.items():
        base, wanted = times.get((BASE, n, k, m)), target(name, m)
        needs = [(base.us / wanted, f"{wanted:g}× bf16")] if base and wanted else []
        for lead in LEADS:
            if lead.codec == name and lead.least <= m <= lead.most and (other := _fastest(times, lead.over, n, k, m)):
                needs.append((other.us / lead.times, f"{lead.times:g}× {other.name}"))
        for need, over in needs:
            if r.us > need and run.limits:
                least = bounds(r, run, instructions)
                most = max(least, key=lambda b: least[b])
                cells = [f"{least[b]:.1f}" if b in least else "–" for b in ("bytes", "instructions", "launch", "arithmetic")]
                share = f"{100 * least[most] / r.us:.0f}% of the time is {most}"
                lines.append([name, f"{n}×{k}", str(m), over, f"{need:.1f}", f"{r.us:.1f}", *cells, share])
    if lines:
        yield ""
        yield "Missed targets, µs; bytes, instructions, launch and arithmetic are what each alone would take in this run."
        yield ""
        head = ["", "N×K", "M", "target", "needs", "takes", "bytes", "instructions", "launch", "arithmetic", ""]
        yield from _table(head, lines)


WAYS = {"graph": "CUDA graph of a step", "compiled": "`generate`, compiled", "generate": "`generate`"}


def _models(run: Run) -> Iterator[str]:
    spoken = [g for g in run.model if g["what"] == "generate"]
    names = list(dict.fromkeys(g["model"] for g in spoken))
    if names:
        made = next((g["parameters"] for g in run.model if "parameters" in g), 0)
        found = {(g["how"], g["model"]): g for g in spoken}

        def cells(how: str) -> list[str]:
            rows = [found.get((how, name), {}) for name in names]
            return [f"{g['tokens_s']:.0f}" if "tokens_s" in g else "–" for g in rows]

        yield ""
        yield from _table(
            [f"{made / 1e9:.1f} B Llama, one sequence, tokens/s", *names],
            [[what, *cells(how)] for how, what in WAYS.items()],
        )
    yield from _calibrated(run)
    for e in run.model:
        if e["what"] == "evaluate":
            yield ""
            yield f"Evaluator, {e['models']} models: {e['tokens_s']:.0f} tokens/s ({e['seconds']:.1f} s)."


def _calibrated(run: Run) -> Iterator[str]:
    """GPTQ of a block by the model's width, and of the whole random model."""
    sums = {r["model"]: r for r in run.model if r["what"] == "hessians"}
    loops = {(r["model"], r["codec"]): r for r in run.model if r["what"] == "gptq"}
    names = list(dict.fromkeys(codec for _, codec in loops))
    if names:
        tokens = next(iter(sums.values()))["tokens"]
        yield ""
        yield f"GPTQ of a block, s, and in brackets all blocks with their Hessians; these of {tokens} tokens."
        yield ""
        lines = []
        for model, r in sums.items():
            of = [loops.get((model, name)) for name in names]
            lines.append(
                [model, f"{r['seconds']:.2f}", *(f"{g['seconds']:.2f} ({g['all_blocks']:.0f})" if g else "–" for g in of)]
            )
        yield from _table(["width of", "Hessians", *names], lines)
    for r in run.model:
        if r["what"] == "convert":
            yield ""
            yield f"convert to {r['model']}: {r['seconds']:.1f} s" + (f", {r['windows']} windows" if "windows" in r else "")
