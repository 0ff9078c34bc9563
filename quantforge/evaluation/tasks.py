"""Tasks of lm-evaluation-harness: the real `lm_eval` runs its task files on decoded models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, UnsupportedError
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..runtime import Model

PathLike = str | os.PathLike[str]
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity")
_RIGHT = ("acc_norm", "acc", "exact_match")
"""Metrics of single examples that are 1 where the answer is right."""


def manager(tasks: Sequence[str], path: PathLike | None) -> Any:
    """lm_eval's task manager, which has these tasks; path: a directory with task files of one's own.

    Raises UnsupportedError without lm_eval, RecipeError for unknown tasks.
    """
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401 - has requirements of its own
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UnsupportedError(f"--tasks needs lm-evaluation-harness: pip install 'quantforge[tasks]' ({e})") from None
    path = None if path is None else os.path.expanduser(path)
    if path is not None and not Path(path).is_dir():
        raise RecipeError(f"--task-path {os.fspath(path)}: no such directory")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = TaskManager(include_path=None if path is None else os.fspath(path))
    if unknown := [t for t in tasks if t not in known.all_tasks]:
        raise RecipeError(f"lm_eval knows no task {', '.join(unknown)}; --task-path adds a directory with your own")
    return known


def run(
    models: Sequence[Model], tokenizer: Tokenizer, tasks: Sequence[str], manager: Any, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run tasks on every model; the first is the reference that flips are counted against.

    manager: from `manager`; limit: examples of each task. Returns what the models have in common
    and, of each, task -> metric, value, stderr, all metrics, flips. Raises RecipeError for data that cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    engine = tokenizer.transformers()
    summaries: list[dict[str, Any]] = []
    reference: Mapping[str, Any] = {}
    for model in models:
        with model.resident() as module:
            lm = HFLM(pretrained=module, tokenizer=engine, batch_size=8, backend="causal")
            try:
                out = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    log_samples=True,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
            except (OSError, ValueError, KeyError) as e:  # data that cannot be had, files that are wrong
                raise RecipeError(f"lm_eval: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
        reference = reference or out["samples"]
        summaries.append(
            {
                task: _summary(numbers) | {"flips": None if model is models[0] else _flips(reference[task], out["samples"][task])}
                for task, numbers in out["results"].items()
                if task in out["samples"]
            }
        )
    return {"names": list(summaries[0]), "harness": f"lm_eval {version('lm_eval')}", "limit": limit}, summaries


def _summary(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The metric that a task is known by, and all of them: keys are "metric,filter" in lm_eval."""
    values = {k.split(",")[0]: v for k, v in numbers.items() if "," in k and isinstance(v, (int, float))}
    plain = {k: float(v) for k, v in values.items() if not k.endswith("_stderr")}
    name = next((m for m in _PREFERRED if m in plain), next(iter(plain), ""))
    return {"metric": name, "value": plain.get(name), "metrics": plain, "examples": numbers.get("sample_len")}


def _flips(reference: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Examples whose answer became wrong or right; None where a task has no right and wrong."""
    metric = next((m for m in _RIGHT if reference and m in reference[0]), None)
    if metric is None:
        return None
    was = {s["doc_id"]: float(s[metric]) > 0.5 for s in reference}
    now = {s["doc_id"]: float(s[metric]) > 0.5 for s in mine}
    lost = sum(was[i] and not now[i] for i in was if i in now)
    won = sum(now[i] and not was[i] for i in was if i in now)
    return {"right_to_wrong": lost, "wrong_to_right": won, "total": lost + won, "percent": 100 * (lost + won) / max(1, len(was))}
