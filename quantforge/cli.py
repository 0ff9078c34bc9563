"""The command line: parse, call one API function, print its report."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from . import __version__
from .errors import QuantForgeError, RecipeError

if TYPE_CHECKING:
    from .conversion import Progress
    from .planning import Plan

# Only click and the exception tree are imported here: `quantforge --help` answers at once.

F = TypeVar("F", bound=Callable[..., Any])


class _OneLineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="quantforge %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and show tracebacks.")
@click.pass_context
def group(context: click.Context, verbose: bool) -> None:
    """Convert any language-model checkpoint into any other, quantized as well as the science allows."""
    context.obj = {"verbose": verbose}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


def main() -> None:
    """Entry point: every failure is one line on stderr and an exit code other than 0."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely: temporary files go too
    try:
        code = group.main(prog_name="quantforge", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except click.ClickException as e:
        context = e.ctx if isinstance(e, click.UsageError) else None
        where = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"error: {e.format_message().rstrip('.')}{where}".replace("\n", " "), err=True)
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except (QuantForgeError, OSError, MemoryError) as e:
        if verbose:
            raise
        click.echo(f"error: {e or type(e).__name__}".replace("\n", " "), err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError


def _split_rule(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    rules = []
    for value in values:
        pattern, equals, kind = value.rpartition("=")
        if not equals or not pattern or not kind:
            raise click.BadParameter(f"{value!r}: write REGEX=TYPE, as in 'attn_v=Q8_0'")
        rules.append((pattern, kind))
    return rules


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value or "0", re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if value is not None and size < 1:
        raise click.BadParameter(f"{value!r} is no size like 5GB, 500MB or 200MiB")
    return size or None


def recipe_options(command: F) -> F:
    """The options that choose which tensor gets which type."""
    options = [
        click.option("--type", "-t", "kind", metavar="T", help="Preset (Q4_K_M, Q4_0, ...) or type; default Q4_K_M."),
        click.option("--recipe", metavar="FILE", type=click.Path(dir_okay=False), help="A recipe file (TOML)."),
        click.option(
            "--tensor-type",
            "tensor_types",
            metavar="RE=T",
            multiple=True,
            callback=_split_rule,
            help="Type for the tensors whose name matches; repeatable, the first match wins.",
        ),
        click.option("--output-tensor-type", metavar="T", help="Type of the output tensor."),
        click.option("--token-embedding-type", metavar="T", help="Type of the token embedding."),
        click.option("--pure", is_flag=True, help="The same type for every weight matrix: no mixture."),
        click.option("--keep-output", is_flag=True, help="Leave the output tensor unquantized."),
    ]
    for option in reversed(options):
        command = option(command)

    @wraps(command)
    def wrapped(
        *args: Any,
        kind: str | None,
        recipe: str | None,
        tensor_types: list[tuple[str, str]],
        output_tensor_type: str | None,
        token_embedding_type: str | None,
        pure: bool,
        keep_output: bool,
        **kwargs: Any,
    ) -> Any:
        from . import recipes

        if kind and recipe:
            raise RecipeError("--type and --recipe exclude each other: name the base preset inside the recipe file")
        own_rules = bool(recipe or tensor_types or output_tensor_type or token_embedding_type or pure or keep_output)
        if kwargs.get("backend") and not own_rules:  # it may be the library's own word
            return command(*args, recipe=kind, **kwargs)
        linears = kwargs.get("bits") is not None or kwargs.get("format") not in (None, "gguf", "safetensors")
        if linears and not kwargs.get("backend"):
            # one type for the linear layers of the blocks, which the format knows by its own names
            if recipe or output_tensor_type or token_embedding_type or pure or keep_output:
                raise RecipeError(
                    "--bits and checkpoint formats quantize the blocks' linear layers; of rules, only --tensor-type"
                )
            return command(*args, recipe=kind, tensor_types=tensor_types, **kwargs)
        if not own_rules and kind is None:
            return command(*args, recipe=None, **kwargs)
        chosen = recipes.get(recipe or kind or "Q4_K_M").with_rules(
            tensor_types=tensor_types,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            pure=pure,
            keep_output=keep_output,
        )
        return command(*args, recipe=chosen, **kwargs)

    return wrapped  # type: ignore[return-value]


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar on a terminal; nothing when piped."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[tensors]}/{task.fields[total_tensors]} tensors"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[written]}  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, tensors=0, total_tensors=0, written="", rate="", name="")

        def show(p: Any) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{p.weights / elapsed / 1e6:.0f} M weights/s" if elapsed > 0.2 else ""
            bar.update(
                task,
                total=p.total_weights,
                completed=p.weights,
                tensors=p.tensors,
                total_tensors=p.total_tensors,
                written=_size(p.bytes),
                rate=rate,
                name=p.name,
            )

        yield show


def _print_plan(plan: Plan) -> None:
    width = max((len(t.name) for t in plan.tensors), default=4)
    for t in plan.tensors:
        note = f"  {t.note}" if t.note else ""
        shape = "×".join(map(str, t.shape))
        click.echo(f"{t.name:<{width}}  {shape:>14}  {t.source_codec.name:>5} → {t.codec.name:<8} {t.nbytes:>14,}{note}")
    for warning in plan.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{len(plan.tensors)} tensors, {plan.total_bytes:,} bytes ({_size(plan.total_bytes)}), {plan.bpw:.3f} bits per weight"
    )


@group.command()
@click.argument("model", type=click.Path())
@click.argument("out", type=click.Path())
@recipe_options
@click.option(
    "--format",
    metavar="F",
    help="gguf, safetensors, gptq, awq, compressed-tensors, bitsandbytes; default: gguf for *.gguf, else safetensors.",
)
@click.option(
    "--bits", metavar="N", type=click.IntRange(2, 8), help="Integers of that width for the linear layers of the blocks."
)
@click.option("--group-size", metavar="N", type=click.IntRange(-1), help="Columns that share a scale; -1: a scale per row.")
@click.option(
    "--sym/--asym", "symmetric", default=None, help="Without or with a zero point; default: what the format usually has."
)
@click.option("--checkpoint-format", metavar="V", help="GPTQ layout: gptq (v1) or gptq_v2; default: v1 where symmetric, else v2.")
@click.option("--int8-threshold", metavar="X", type=float, help="bitsandbytes int8: activations kept in floats; default 6.0.")
@click.option("--max-shard-size", metavar="SIZE", callback=_bytes, help="Largest weight file, as 5GB or 500MB; default 5GB.")
@click.option("--imatrix", metavar="FILE", type=click.Path(dir_okay=False), help="Importance matrix (llama.cpp's GGUF or .dat).")
@click.option(
    "--threads", metavar="N", type=click.IntRange(1), help="Threads; default: all CPUs. Output bytes do not depend on it."
)
@click.option("--pre-tokenizer", metavar="NAME", help="Value of tokenizer.ggml.pre where the tokenizer's is not recognised.")
@click.option("--allow-requantize", is_flag=True, help="Quantize tensors that are quantized already.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the exact size; read no tensor data, write nothing.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--report", metavar="FILE.json", type=click.Path(dir_okay=False), help="Write a report with each tensor's error.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the report as JSON.")
@click.option("--method", metavar="M", help="rtn, gptq, awq or awq+gptq (torch); default: rtn, or the back end's own.")
@click.option("--backend", metavar="B", help="Quantize with auto-gptq, autoawq, gptqmodel, llm-compressor or auto-round.")
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
    "--clip/--no-clip", default=None, help="AWQ: search how much of each group's largest weight to cut off; default with awq."
)
@click.option("--damping", metavar="X", type=float, help="GPTQ: part of the Hessian's mean diagonal added to it; default 0.01.")
@click.option(
    "--device", metavar="D", default="cpu", show_default=True, help="Where tensors are encoded and --method runs: cpu or cuda."
)
def convert(
    model: str,
    out: str,
    recipe: Any,
    format: str | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    checkpoint_format: str | None,
    int8_threshold: float | None,
    max_shard_size: int | None,
    imatrix: str | None,
    threads: int | None,
    pre_tokenizer: str | None,
    allow_requantize: bool,
    dry_run: bool,
    force: bool,
    report: str | None,
    as_json: bool,
    **calibration: Any,
) -> None:
    """Convert MODEL (a directory, a .safetensors or .gguf file) to OUT (a .gguf file, or a directory of safetensors)."""
    from . import convert as run
    from . import plan as make_plan

    options: dict[str, Any] = {
        "allow_requantize": allow_requantize,
        "pre_tokenizer": pre_tokenizer,
        "format": format,
        **calibration,
    }
    options |= {"bits": bits, "group_size": group_size, "symmetric": symmetric, "max_shard_size": max_shard_size}
    if checkpoint_format is not None:
        options["version"] = checkpoint_format
    if int8_threshold is not None:
        options["threshold"] = int8_threshold
    if dry_run:
        plan = make_plan(model, out, recipe, imatrix, **options)
        if as_json:
            click.echo(json.dumps(plan.to_json(), ensure_ascii=False))
        else:
            _print_plan(plan)
        return
    with _progress() as progress:
        done = run(
            model,
            out,
            recipe,
            imatrix,
            threads=threads,
            force=force,
            measure=bool(report or as_json),
            progress=progress,
            **options,
        )
    if report:
        Path(report).write_text(json.dumps(done.to_json(), indent=1, ensure_ascii=False) + "\n")
    if as_json:
        click.echo(json.dumps(done.to_json(), ensure_ascii=False))
        return
    for note in sorted({t.note for t in done.tensors if t.note}):
        click.echo(f"note: {note}", err=True)
    judged = [t for t in done.tensors if t.output_error is not None]
    for kept in sorted({t.method for t in judged}):
        names = [t.name for t in judged if t.method == kept]
        some = f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if kept == "rtn" else ""
        click.echo(f"{kept} kept for {len(names)} of {len(judged)} matrices{some}")
    click.echo(f"{done.path}: {done.recipe}, {_size(done.total_bytes)}, {done.bpw:.3f} bits per weight, {done.seconds:.1f} s")


def evaluation_options(command: F) -> F:
    """The options that say on what models are compared."""
    options = [
        click.option(
            "--text",
            metavar="FILE",
            default="builtin",
            show_default=True,
            help="Text to score; documents end with two blank lines.",
        ),
        click.option("--ctx", metavar="N", type=int, help="Tokens per window; default min(512, the model's)."),
        click.option(
            "--stride", metavar="N", type=int, help="Sliding window that scores the last N tokens; default: second halves."
        ),
        click.option("--chunks", metavar="N", type=int, help="Score at most N windows."),
        click.option("--metrics", metavar="LIST", default="ppl,kld,flips,similarity", show_default=True, help="What to measure."),
        click.option("--prompts", metavar="FILE", help="Prompts, one on each line; default: 32 that ship."),
        click.option("--answer-tokens", metavar="N", type=int, default=64, show_default=True, help="Length of the answers."),
        click.option("--embedder", metavar="NAME", help="A sentence-transformers model; default: the reference's hidden states."),
        click.option("--tasks", metavar="LIST", help="Tasks of lm-evaluation-harness, comma-separated."),
        click.option("--task-path", metavar="DIR", help="Directory with task files of your own."),
        click.option("--task-limit", metavar="N", type=int, help="Examples of each task."),
        click.option("--noise-floor/--no-noise-floor", default=True, show_default=True, help="Also run the reference in bf16."),
        click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu or cuda."),
        click.option("--report", metavar="FILE", multiple=True, help="Write FILE.html, .md or .json; repeatable."),
        click.option("--json", "as_json", is_flag=True, help="Print the evaluation as JSON."),
    ]
    for option in reversed(options):
        command = option(command)

    @wraps(command)
    def wrapped(*args: Any, metrics: str, tasks: str | None, as_json: bool, **kwargs: Any) -> Any:
        from .report.markdown import render

        kwargs["metrics"] = _listed(metrics)
        kwargs["tasks"] = _listed(tasks or "")
        with _stage() as progress:
            found = command(*args, progress=progress, **kwargs)
        click.echo(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else render(found))

    return wrapped  # type: ignore[return-value]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@contextmanager
def _stage() -> Iterator[Callable[[str, int, int], None] | None]:
    """What an evaluation is doing, on a terminal; nothing when piped."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


@group.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--reference", metavar="REF", required=True, help="What the models are compared with: a directory or file.")
@evaluation_options
def evaluate(models: tuple[str, ...], **options: Any) -> Any:
    """Compare MODELs with a reference: perplexity, KL divergence, flips, answers."""
    from . import evaluate as run

    return run(models, **options)


@group.command()
@click.argument("model")
@click.option("--types", metavar="LIST", help="Types to compare; default Q8_0 down to IQ2_XXS.")
@click.option(
    "--imatrix", metavar="FILE", default="auto", show_default=True, help="Importance; auto: a file beside the model; none."
)
@click.option("--memory", metavar="SIZE", help="Name the best type that fits into this memory, e.g. 6GB.")
@click.option("--context", metavar="N", type=click.IntRange(1), help="Tokens of context for --memory; default: the model's.")
@click.option("--out", metavar="DIR", help="Keep the converted files in DIR.")
@evaluation_options
def compare(model: str, types: str | None, imatrix: str, **options: Any) -> Any:
    """Convert MODEL to several types, evaluate and rank them."""
    from . import compare as run

    chosen: dict[str, Any] = {} if types is None else {"types": _listed(types)}
    return run(model, imatrix=None if imatrix == "none" else imatrix, **chosen, **options)


@group.command()
@click.argument("model", type=click.Path())
@click.argument("out", metavar="OUT.gguf", type=click.Path(dir_okay=False))
@click.option("--text", metavar="FILE", default="builtin", show_default=True, help="Calibration text; builtin: the shipped one.")
@click.option("--ctx", metavar="N", type=click.IntRange(4), help="Tokens per window; default: 512, or less if the model's is.")
@click.option("--chunks", metavar="N", type=click.IntRange(1), help="At most N windows; default: the whole text.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def calibrate(model: str, out: str, as_json: bool, **options: Any) -> None:
    """Run text through MODEL and write its importance matrix, as llama-imatrix does, to OUT.gguf."""
    from . import calibrate as run

    with _stage() as progress:
        done = run(model, out, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(done.to_json(), ensure_ascii=False))
        return
    for name, counts in done.experts.items():
        click.echo(f"{name}: tokens per expert {min(counts)} to {max(counts)}")
    click.echo(f"{done.path}: {done.entries} matrices, {done.chunks} windows of {done.ctx} tokens, {done.seconds:.1f} s")


@group.command()
@click.argument("model", type=click.Path())
@click.option("--prompt", metavar="TEXT", help="What the answer continues, as it is; default: what comes from standard input.")
@click.option(
    "--max-tokens", "--max-new-tokens", "max_tokens", metavar="N", type=click.IntRange(1), default=64, show_default=True,
    help="Tokens of the answer, at most.",
)  # fmt: skip
@click.option(
    "--temperature", metavar="T", type=click.FloatRange(0), default=0.0, show_default=True,
    help="0: the likeliest token every time; 1: tokens as likely as the model has them.",
)  # fmt: skip
@click.option("--top-k", metavar="N", type=click.IntRange(0), default=0, help="Draw from the N likeliest tokens; 0: from all.")
@click.option(
    "--top-p", metavar="P", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="Draw from the likeliest tokens that together have this probability.",
)  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(0), help="The same draws every time.")
@click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--activations", type=click.Choice(["int8", "float"]), default="int8", show_default=True, help="Precision on the CPU."
)
def generate(model: str, prompt: str | None, **options: Any) -> None:
    """Continue a text with MODEL as it is stored."""
    from .loading import answer

    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("--prompt TEXT is missing, and nothing comes from standard input")
        prompt = sys.stdin.read().removesuffix("\n")
    pieces = answer(model, prompt, **options)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:  # a shell's prompt begins a line, after Ctrl-C too
        click.echo()


@group.command()
@click.argument("path", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@click.option("--tensors", is_flag=True, help="List the tensors.")
@click.option("--hash", "hashes", is_flag=True, help="sha256 of each tensor's bytes (implies --tensors).")
def inspect(path: str, as_json: bool, tensors: bool, hashes: bool) -> None:
    """Show what is in a model: metadata, tensors, types, sizes."""
    from .inspection import describe

    found = describe(path, hashes=hashes)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found["metadata"].items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and len(text) > 80:
            text = f"[{len(value)} values] {text[:60]}..."
        elif len(text) > 160:
            text = f"{text[:150]}... ({len(text)} characters)"
        click.echo(f"{key} = {text}")
    if tensors or hashes:
        width = max((len(t["name"]) for t in found["tensors"]), default=4)
        for t in found["tensors"]:
            digest = f"  {t['sha256']}" if hashes else ""
            click.echo(f"{t['name']:<{width}}  {'×'.join(map(str, t['shape'])):>14}  {t['type']:<8} {t['bytes']:>14,}{digest}")
    for kind, row in found["types"].items():
        click.echo(f"{kind:<10} {row['tensors']:>5} tensors  {row['bytes']:>16,} bytes")
    click.echo(f"{len(found['tensors'])} tensors, {found['total_bytes']:,} bytes, {found['bpw']:.3f} bits per weight")


@group.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def types(as_json: bool) -> None:
    """List the types that tensors can be stored in."""
    from .inspection import list_types

    rows = list_types()
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'name':<10} {'block':>6} {'bytes':>6} {'bpw':>8} {'id':>4}")
    for row in rows:
        kind = "" if row["ggml_type"] is None else row["ggml_type"]
        note = "  wants importance" if row["needs_importance"] else ""
        click.echo(f"{row['name']:<10} {row['block_size']:>6} {row['type_size']:>6} {row['bpw']:>8.4f} {kind:>4}{note}")


@group.command()
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False), default="demo-out", show_default=True, help="Where the files go."
)
@click.option("--prompt", metavar="TEXT", help="What llama.cpp is asked to complete.")
def demo(out: str, prompt: str | None) -> None:
    """Convert the shipped 5.8 M-parameter model to several types and let real llama.cpp speak with each."""
    from .demo import PROMPT, run

    run(Path(out), click.echo, prompt=prompt or PROMPT)
