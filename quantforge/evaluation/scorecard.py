"""One model in several types, ranked: convert, evaluate, and say which one fits into the memory at hand."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .. import sizes
from ..calibration import importance
from ..calibration.corpus import Stages
from ..calibration.gather import calibrate
from ..conversion.convert import convert
from ..errors import CalibrationError, RecipeError
from ..formats import Adapters
from .report import Evaluation, ModelResult, Recommendation
from .report.base import check_path
from .run import PathLike, evaluate

logger = logging.getLogger(__name__)

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_XXS")
_CALIBRATION_CHUNKS = 100


def compare(
    model: PathLike,
    types: Sequence[str] = TYPES,
    *,
    imatrix: str | PathLike | importance.Importance | None = "auto",
    memory: int | str | None = None,
    context: int | None = None,
    out: PathLike | None = None,
    lora: Adapters = (),
    report: PathLike | Sequence[PathLike] = (),
    progress: Stages | None = None,
    **options: Any,
) -> Evaluation:
    """Convert a checkpoint to several types, evaluate all of them at once, rank them and choose.

    types: presets, types or recipe files. imatrix: importance for the conversion; "auto": a file with "imatrix" in its
    name beside the model, else gathered from the shipped calibration text. memory: bytes, or text like "6GB", into
    which weights and the KV cache (f16) of `context` tokens (default: the model's) must fit. out: keep the GGUF files in
    this directory. lora: adapters to merge into the checkpoint, as in `convert`. report, progress and other options: as for
    `evaluate`.
    """
    limit = None if memory is None else sizes.parse(memory, "--memory")
    reports = [report] if isinstance(report, (str, os.PathLike)) else list(report)
    for path in reports:
        check_path(path)
    names = list(dict.fromkeys(types))
    if not names:
        raise RecipeError("--types names no type")
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="quantforge-")
        where = Path(stack.enter_context(scratch) if out is None else os.path.expanduser(out))
        where.mkdir(parents=True, exist_ok=True)
        weights, origin = _imatrix(Path(os.path.expanduser(model)), imatrix, where, lora, progress)
        paths: dict[str, Path] = {}
        for i, kind in enumerate(names):
            if progress:
                progress(f"converting to {kind}", i, len(names))
            name = Path(kind).stem
            paths[name] = where / f"{name}.gguf"
            convert(Path(model), paths[name], kind, weights, lora=lora, force=True)
        evaluation = evaluate(paths, reference=model, lora=lora, progress=progress, **options)
    if limit is not None:
        evaluation.choice = choose(evaluation, limit, context)
    evaluation.run["imatrix"] = origin
    for path in reports:
        evaluation.save(path)
    return evaluation


def choose(evaluation: Evaluation, limit: int, context: int | None) -> Recommendation:
    """The closest to the reference of the models whose weights and KV cache fit into `limit` bytes."""
    shape = evaluation.reference.shape
    context = context or shape.get("context", 0) or 4096
    kv = context * shape["kv_bytes_per_token"]
    needs = {m.name: m.bytes + kv for m in evaluation.models}
    ranked = evaluation.ranked()
    fitting = [m for m in ranked if needs[m.name] <= limit]

    def cost(m: ModelResult) -> str:
        return f"{sizes.show(needs[m.name])} (weights {sizes.show(m.bytes)}, KV cache {sizes.show(kv)} for {context:,} tokens)"

    if not fitting:
        least = min(evaluation.models, key=lambda m: m.bytes)
        why = f"None of these fits into {sizes.show(limit)}: the smallest, {least.name}, needs {cost(least)}."
        return Recommendation(limit, context, kv, None, why, needs)
    best = fitting[0]
    measure = f"mean KLD {best.kld_mean:.3g}" if best.kld_mean is not None else f"PPL {best.ppl:.4g}"
    why = f"{best.name} is the closest to the reference ({measure}) of the {len(fitting)} that fit into {sizes.show(limit)}: "
    why += f"it needs {cost(best)}."
    if better := ranked[: ranked.index(best)]:
        why += f" {better[-1].name} would be closer but needs {sizes.show(needs[better[-1].name])}."
    return Recommendation(limit, context, kv, best.name, why, needs)


def _imatrix(
    model: Path, imatrix: Any, scratch: Path, lora: Adapters, progress: Stages | None
) -> tuple[importance.Importance | None, str]:
    """The importance to convert with, and where it is from."""
    if imatrix is None or isinstance(imatrix, importance.Importance):
        return imatrix, "none" if imatrix is None else "given"
    if imatrix != "auto":
        return importance.read(Path(imatrix)), str(imatrix)
    directory = model if model.is_dir() else model.parent
    beside = sorted(p for p in directory.glob("*imatrix*") if p.suffix in (".gguf", ".dat"))
    if beside:
        return importance.read(beside[0]), beside[0].name
    path = scratch / "imatrix.gguf"
    try:
        made = calibrate(model, path, chunks=_CALIBRATION_CHUNKS, lora=lora, force=True, progress=progress)
    except CalibrationError as e:
        logger.warning("no importance: %s", e)
        return None, "none"
    return importance.read(path), f"{made.tokens:,} tokens of {made.text}"
