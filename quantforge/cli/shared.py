"""What several commands share: options, sizes, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import sizes
from ..errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from ..conversion.run import Status

F = TypeVar("F", bound=Callable[..., Any])


class Listing(click.Option):
    """An option whose help has a list in the place of {}, looked up when the help is printed.

    Registries load NumPy, or more; `quantforge --help` and a command that runs do not wait for them.
    """

    def __init__(self, *names: Any, listing: Callable[[], Iterable[str]], **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self._listing = listing

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        """See click."""
        self.help = (self.help or "").replace("{}", ", ".join(self._listing()))
        return super().get_help_record(context)


def print_files(paths: Iterable[Path]) -> None:
    """What was written."""
    for path in paths:
        click.echo(f"{path}: {sizes.show(path.stat().st_size)}")


def split_rule(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, str]]:
    """REGEX=TYPE, many of them."""
    rules = []
    for value in values:
        pattern, equals, kind = value.rpartition("=")
        if not equals or not pattern or not kind:
            raise click.BadParameter(f"{value!r}: write REGEX=TYPE, as in 'attn_v=Q8_0'")
        rules.append((pattern, kind))
    return rules


def recipe_options(command: F) -> F:
    """The options that choose which tensor gets which type."""
    options = [
        click.option(
            "--type", "-t", "--outtype", "kind", metavar="T", help="Preset (Q4_K_M, Q4_0, ...) or type; default Q4_K_M."
        ),
        click.option("--recipe", metavar="FILE", type=click.Path(dir_okay=False), help="A recipe file (TOML)."),
        click.option(
            "--tensor-type",
            "tensor_types",
            metavar="RE=T",
            multiple=True,
            callback=split_rule,
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
        from .. import layouts, recipes

        if kind and recipe:
            raise RecipeError("--type and --recipe exclude each other: name the base preset inside the recipe file")
        own_rules = bool(recipe or tensor_types or output_tensor_type or token_embedding_type or pure or keep_output)
        if kwargs.get("backend") and not own_rules:  # it may be the library's own word
            return command(*args, recipe=kind, **kwargs)
        linears = kwargs.get("bits") is not None or str(kwargs.get("format")).lower() in layouts.names()
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
def progress_bar() -> Iterator[Callable[[Status], None] | None]:
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

        def show(p: Status) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{p.weights / elapsed / 1e6:.0f} M weights/s" if elapsed > 0.2 else ""
            bar.update(
                task,
                total=p.total_weights,
                completed=p.weights,
                tensors=p.tensors,
                total_tensors=p.total_tensors,
                written=sizes.show(p.bytes),
                rate=rate,
                name=p.name,
            )

        yield show


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
        from ..evaluation.report.markdown import render

        kwargs["metrics"] = listed(metrics)
        kwargs["tasks"] = listed(tasks or "")
        with stages() as progress:
            result = command(*args, progress=progress, **kwargs)
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else render(result))

    return wrapped  # type: ignore[return-value]


def listed(text: str) -> list[str]:
    """The words of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None] | None]:
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
