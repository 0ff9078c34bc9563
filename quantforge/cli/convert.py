"""quantforge convert."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import sizes
from .shared import Listing, progress_bar, recipe_options

if TYPE_CHECKING:
    from ..conversion.plan import Plan, PlannedTensor
    from ..conversion.run import TensorReport


def _formats() -> list[str]:
    from .. import layouts
    from ..conversion.options import writable

    return [*writable(), *layouts.names()]


def _methods() -> list[str]:
    from .. import methods

    return methods.names()


def _backends() -> list[str]:
    from .. import backends

    return backends.names()


def _fallbacks() -> Sequence[str]:
    from ..recipes.presets import FALLBACKS

    return FALLBACKS


def _print_plan(plan: Plan) -> None:
    width = max((len(t.name) for t in plan.tensors), default=4)
    for t in plan.tensors:
        note = f"  {t.note}" if t.note else ""
        shape = "×".join(map(str, t.shape))
        click.echo(f"{t.name:<{width}}  {shape:>14}  {t.source_codec.name:>5} → {t.codec.name:<8} {t.nbytes:>14,}{note}")
    _print_notes(plan.tensors)
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    shown = f"{plan.total_bytes:,} bytes ({sizes.show(plan.total_bytes)})"
    click.echo(f"{len(plan.tensors)} tensors, {shown}, {plan.bpw:.3f} bits per weight")


def _print_notes(tensors: Iterable[PlannedTensor | TensorReport]) -> None:
    """How many tensors are not simply what was asked for, and why."""
    for note, n in sorted(Counter(t.note for t in tensors if t.note).items()):
        click.echo(f"note: {n} tensor{'s' if n > 1 else ''}: {note}", err=True)


@click.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@recipe_options
@click.option(
    "--format",
    metavar="F",
    cls=Listing,
    listing=_formats,
    help="One of {}; default: by the suffix of OUT, or safetensors.",
)
@click.option(
    "--bits", metavar="N", type=click.IntRange(2, 8), help="Integers of that width for the linear layers of the blocks."
)
@click.option("--group-size", metavar="N", type=click.IntRange(-1), help="Columns that share a scale; -1: a scale per row.")
@click.option(
    "--sym/--asym", "symmetric", default=None, help="Without or with a zero point; default: what the format usually has."
)
@click.option("--checkpoint-format", "version", metavar="V", help="GPTQ: gptq (v1) or gptq_v2; default: v2 where asymmetric.")
@click.option(
    "--int8-threshold", "threshold", metavar="X", type=float, help="bitsandbytes int8: activations kept in floats; default 6."
)
@click.option(
    "--max-shard-size",
    "--split-max-size",
    "max_shard_size",
    metavar="SIZE",
    help="Largest weight file, as 5GB or 500MB; default: of a directory 5GB, a GGUF file is not split.",
)
@click.option(
    "--imatrix",
    "importance",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Importance matrix (llama.cpp's GGUF or .dat).",
)
@click.option(
    "--threads", metavar="N", type=click.IntRange(1), help="Threads; default: all CPUs. Output bytes do not depend on it."
)
@click.option("--pre-tokenizer", metavar="NAME", help="Value of tokenizer.ggml.pre where the tokenizer's is not recognised.")
@click.option("--vocab-only", is_flag=True, help="A GGUF file of metadata and tokenizer, without tensors.")
@click.option(
    "--no-mtp", "mtp", is_flag=True, flag_value=False, default=True, help="Leave out layers that predict further tokens."
)
@click.option(
    "--fallback",
    metavar="F",
    cls=Listing,
    listing=_fallbacks,
    help="Rows that no block of the wanted type divides: {}; the second is the type closest in size. Default: the first.",
)
@click.option("--fallback-type", metavar="T", help="Type of tensors whose values or shape the wanted one cannot hold.")
@click.option("--allow-requantize", is_flag=True, help="Quantize tensors that are quantized already.")
@click.option(
    "--lora", metavar="DIR[:SCALE]", multiple=True, help="Merge an adapter of PEFT (LoRA, DoRA) into MODEL; repeatable, in order."
)
@click.option("--base", metavar="MODEL", type=click.Path(), help="MODEL is an adapter of this one: write it alone, as GGUF.")
@click.option(
    "--provenance/--no-provenance",
    default=True,
    show_default=True,
    help="Say in the metadata what made OUT, and from what: quantforge.*",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; write nothing, read a few rows of each tensor.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--modelfile", is_flag=True, help="Also write a Modelfile for Ollama beside OUT.")
@click.option("--report", metavar="FILE.json", type=click.Path(dir_okay=False), help="Write a report with each tensor's error.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the report as JSON.")
@click.option(
    "--method",
    metavar="M",
    cls=Listing,
    listing=_methods,
    help="How codes are chosen: {}; default: rtn, or the back end's own.",
)
@click.option("--backend", metavar="B", cls=Listing, listing=_backends, help="Another library that quantizes: {}.")
@click.option("--backend-python", metavar="PATH", help="The interpreter that has it; default: this one.")
@click.option("--calibration", metavar="FILE", default="builtin", show_default=True, help="Text that --method sees.")
@click.option("--calibration-chunks", metavar="N", type=click.IntRange(2), help="Windows of it; default 128.")
@click.option("--calibration-ctx", metavar="N", type=click.IntRange(4), help="Tokens of each; default: 512, or the model's.")
@click.option(
    "--act-order/--no-act-order", default=None, help="GPTQ: columns in the order of falling activations; GPTQ files: desc_act."
)
@click.option(
    "--static-groups/--no-static-groups", default=None, help="GPTQ: fit all scales beforehand; then --act-order needs no g_idx."
)
@click.option(
    "--sequential/--no-sequential",
    default=None,
    help="GPTQ: calibrate each matrix behind those of its block that are done; without, a block's inputs come from one pass.",
)
@click.option(
    "--clip/--no-clip", default=None, help="AWQ: search how much of each group's largest weight to cut off; default with awq."
)
@click.option("--damping", metavar="X", type=float, help="GPTQ: part of the Hessian's mean diagonal added to it; default 0.01.")
@click.option(
    "--device", metavar="D", default="cpu", show_default=True, help="Where tensors are encoded and --method runs: cpu or cuda."
)
def convert(
    model: str,
    out: str,
    threads: int | None,
    dry_run: bool,
    force: bool,
    modelfile: bool,
    report: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert MODEL (a directory, or a file) to OUT: a file such as *.gguf, or a directory.

    --format lists what there is.
    """
    from .. import convert as run
    from .. import plan as make_plan

    if report and Path(report).suffix.lower() != ".json":
        raise click.UsageError(f"--report {report}: convert's report is JSON, *.json; evaluate writes HTML and Markdown")
    if dry_run:
        plan = make_plan(model, out, **options)
        if as_json:
            click.echo(json.dumps(plan.to_json(), ensure_ascii=False))
        else:
            _print_plan(plan)
        return
    with progress_bar() as progress:
        done = run(
            model,
            out,
            threads=threads,
            force=force,
            modelfile=modelfile,
            measure=bool(report or as_json),
            progress=progress,
            **options,
        )
    if report:
        Path(report).expanduser().write_text(json.dumps(done.to_json(), indent=1, ensure_ascii=False) + "\n")
    if as_json:
        click.echo(json.dumps(done.to_json(), ensure_ascii=False))
        return
    _print_notes(done.tensors)
    judged = [t for t in done.tensors if t.output_error is not None]
    for kept in sorted({t.method for t in judged}):
        names = [t.name for t in judged if t.method == kept]
        some = f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if kept == "rtn" else ""
        click.echo(f"{kept} kept for {len(names)} of {len(judged)} matrices{some}")
    click.echo(
        f"{done.path}: {done.recipe}, {sizes.show(done.total_bytes)}, {done.bpw:.3f} bits per weight, {done.seconds:.1f} s"
    )


COMMAND = convert
