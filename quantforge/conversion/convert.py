"""The two functions that a conversion begins with; their arguments become `Options` here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .. import formats, methods, sizes
from ..backends import Library
from ..calibration.importance import Importance
from ..calibration.importance import read as read_importance
from ..errors import RecipeError
from ..formats import Adapters, Format, Source
from ..formats.files import write_file
from ..layouts import Layout
from ..methods import Method
from ..recipes import Recipe
from ..recipes.linears import Scheme
from .adapter import adapter_alone
from .library import decide_with
from .modelfile import NAME as MODELFILE
from .modelfile import with_modelfile
from .options import Calibration, Options
from .plan import Plan, decide
from .run import Report, Status, run

T = TypeVar("T", Scheme, Calibration)


def convert(
    model: str | Path | Source,
    out: str | Path,
    recipe: str | Path | Recipe | None = None,
    importance: str | Path | Importance | None = None,
    *,
    format: str | Format | Layout | None = None,
    scheme: Scheme | None = None,
    tensor_types: Sequence[str | tuple[str, str]] = (),
    method: str | Method | None = None,
    calibration: str | Path | Calibration = "builtin",
    max_shard_size: int | str | None = None,
    pre_tokenizer: str | None = None,
    vocab_only: bool = False,
    mtp: bool = True,
    allow_requantize: bool = False,
    fallback: str | None = None,
    fallback_type: str | None = None,
    lora: Adapters = (),
    base: str | Path | None = None,
    provenance: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    force: bool = False,
    modelfile: bool = False,
    measure: bool = False,
    progress: Callable[[Status], None] | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    calibration_chunks: int | None = None,
    calibration_ctx: int | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    sequential: bool | None = None,
    damping: float | None = None,
    clip: bool | None = None,
    backend: str | None = None,
    backend_python: str | Path | None = None,
    version: str | None = None,
    threshold: float | None = None,
) -> Report:
    """Convert a model; the output appears at `out` when it is complete, or not at all.

    What to convert, and to what:

    - model: a directory, a file of any format that can be read (.safetensors, .gguf), or an open Source.
    - out: a path. The suffix says the format (.gguf); a name without one is a directory of safetensors.
    - recipe: a preset ("Q4_K_M"), a type, a TOML file or a Recipe; default: what the format usually has.
    - importance: an imatrix file, or an Importance.
    - format: a format or a layout of checkpoints, by name ("gptq") or as an object. In a layout the linear layers of the
      blocks are quantized and nothing else.
    - scheme: Scheme(bits, group_size, symmetric) instead of a recipe: integers for the linear layers of the blocks.
    - tensor_types: "REGEX=TYPE" for some tensors, by GGUF's or the checkpoint's names; the first match wins.
    - method: how codes of the blocks' matrices are chosen: by name ("gptq"), an object such as `methods.GPTQ(damping=0.05)`,
      or another library, `Library("gptqmodel", python="...")`; default "rtn".
    - calibration: what the method sees: a text file, "builtin", or Calibration(text, chunks, ctx).
    - max_shard_size: bytes, or text like "5GB": the largest weight file. A directory has files of 5GB where nothing is said;
      a GGUF file is split into OUT-00001-of-0000N.gguf only where this is given and it is larger.
    - pre_tokenizer: tokenizer.ggml.pre, where the tokenizer's is not recognised.
    - vocab_only: a GGUF file with the metadata and the tokenizer, without tensors; the model needs none either.
    - mtp: False leaves out the layers that predict further tokens.
    - allow_requantize: quantize tensors that are quantized already.
    - fallback: what takes rows that no block of the wanted type divides: "llama-quantize" (the default), its choice, or
      "nearest", the type closest in size.
    - fallback_type: the type of a tensor whose values or shape the wanted type cannot hold, which is an error otherwise.
    - lora: adapters of PEFT (LoRA, DoRA) that are merged into the model while it is read, in order: directories,
      "DIR:SCALE", or (directory, scale).
    - base: the model that `model` is an adapter of: a GGUF file of the adapter alone is written.
    - provenance: write what made the output, and from what (`quantforge.*`), into its metadata.

    How it runs:

    - device: where tensors are encoded and methods run, "cpu" or "cuda".
    - threads: all CPUs by default; the output does not depend on it.
    - force: overwrite an existing output.
    - modelfile: also write `Modelfile` beside a GGUF output: what Ollama needs to know beside the file.
    - measure: also decode what was written, and report each tensor's error.
    - progress: called after each tile of rows.

    Single values of those objects, by themselves:

    - bits: of `scheme`.
    - group_size: of `scheme`; -1: a scale per row.
    - symmetric: of `scheme`; False: with a zero point.
    - calibration_chunks: of `calibration`, windows of text; default 128.
    - calibration_ctx: of `calibration`, tokens of each; default min(512, the model's).
    - act_order: of `methods.GPTQ` or a library: columns in the order of falling activations.
    - static_groups: of `methods.GPTQ` or a library: all scales are fitted beforehand.
    - sequential: of `methods.GPTQ`: matrices see what those before them in their block have become; False: one pass a block.
    - damping: of `methods.GPTQ` or a library: part of the Hessian's mean diagonal that is added to it.
    - clip: of `methods.AWQ`: search how much of each group's largest weight to cut off.
    - backend: name of a `Library` of `backends`, with `method` one of its own.
    - backend_python: the interpreter that has it; default: this one.
    - version: of GPTQ's layout, "gptq" or "gptq_v2".
    - threshold: of bitsandbytes' int8: activations above it are kept in floats.

    Raises FormatError, UnsupportedError, RecipeError, ShapeError, CalibrationError, BackendError before anything is
    written; NonFiniteError (NaN or infinity: names tensor and index) and OutputError, having removed what was.
    """
    job = plan(
        model,
        out,
        recipe,
        importance,
        format=format,
        scheme=scheme,
        tensor_types=tensor_types,
        method=method,
        calibration=calibration,
        max_shard_size=max_shard_size,
        pre_tokenizer=pre_tokenizer,
        vocab_only=vocab_only,
        mtp=mtp,
        allow_requantize=allow_requantize,
        fallback=fallback,
        fallback_type=fallback_type,
        lora=lora,
        base=base,
        provenance=provenance,
        device=device,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        calibration_chunks=calibration_chunks,
        calibration_ctx=calibration_ctx,
        act_order=act_order,
        static_groups=static_groups,
        sequential=sequential,
        damping=damping,
        clip=clip,
        backend=backend,
        backend_python=backend_python,
        version=version,
        threshold=threshold,
    )
    try:
        out = Path(os.path.expanduser(out))
        beside = with_modelfile(job, out, force) if modelfile else None
        report = run(job, out, threads=threads, force=force, measure=measure, progress=progress)
        if beside is not None:
            write_file(out.with_name(MODELFILE), beside.encode())
        return report
    finally:
        if not isinstance(model, Source):
            job.source.close()


def plan(
    model: str | Path | Source,
    out: str | Path,
    recipe: str | Path | Recipe | None = None,
    importance: str | Path | Importance | None = None,
    *,
    format: str | Format | Layout | None = None,
    scheme: Scheme | None = None,
    tensor_types: Sequence[str | tuple[str, str]] = (),
    method: str | Method | None = None,
    calibration: str | Path | Calibration = "builtin",
    max_shard_size: int | str | None = None,
    pre_tokenizer: str | None = None,
    vocab_only: bool = False,
    mtp: bool = True,
    allow_requantize: bool = False,
    fallback: str | None = None,
    fallback_type: str | None = None,
    lora: Adapters = (),
    base: str | Path | None = None,
    provenance: bool = True,
    device: str = "cpu",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    calibration_chunks: int | None = None,
    calibration_ctx: int | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    sequential: bool | None = None,
    damping: float | None = None,
    clip: bool | None = None,
    backend: str | None = None,
    backend_python: str | Path | None = None,
    version: str | None = None,
    threshold: float | None = None,
) -> Plan:
    """Decide everything about a conversion from headers alone: types, metadata, the exact size.

    The arguments are those of `convert`. Raises what `convert` raises before anything is written; the plan's `source` is
    the caller's to close.
    """
    tuning = {"act_order": act_order, "static_groups": static_groups, "sequential": sequential, "damping": damping, "clip": clip}
    how = _method(method, {k: v for k, v in tuning.items() if v is not None}, backend, backend_python)
    layout_options = {k: v for k, v in {"version": version, "threshold": threshold}.items() if v is not None}
    seen, default = (calibration, None) if isinstance(calibration, Calibration) else (None, Calibration(calibration))
    options = Options(
        out=os.path.expanduser(out),
        recipe=recipe,
        importance=read_importance(importance) if isinstance(importance, str | Path) else importance,
        format=format,
        layout_options=layout_options,
        scheme=_object("scheme", scheme, Scheme(), bits=bits, group_size=group_size, symmetric=symmetric),
        tensor_types=tensor_types,
        method=how,
        calibration=_object("calibration", seen, default, chunks=calibration_chunks, ctx=calibration_ctx),
        max_shard_size=None if max_shard_size is None else sizes.parse(max_shard_size, "--max-shard-size", least=1),
        pre_tokenizer=pre_tokenizer,
        vocab_only=vocab_only,
        mtp=mtp,
        allow_requantize=allow_requantize,
        fallback=fallback,
        fallback_type=fallback_type,
        provenance=provenance,
        device=device,
    )
    if base is not None:
        source, options = adapter_alone(model, base, lora, options)
    else:
        opened = model if isinstance(model, Source) else formats.open_path(model, weights=not vocab_only)
        source = formats.merged(opened, lora)
    return decide_with(how, source, options) if isinstance(how, Library) else decide(source, options)


def _object(what: str, given: T | None, default: T | None, **values: Any) -> T:
    """An object that was given, or the default with single values. Raises RecipeError where both were."""
    chosen = {k: v for k, v in values.items() if v is not None}
    if given is None:
        assert default is not None
        return replace(default, **chosen)
    if chosen:
        raise RecipeError(
            f"{what}= has its own {', '.join(chosen)}: give them in the {type(given).__name__}, or only by themselves"
        )
    return given


def _method(method: str | Method | None, tuning: dict[str, Any], backend: str | None, python: str | Path | None) -> Method | None:
    """The method as an object; None for plain rounding, which runs without torch."""
    if backend is not None:
        if not isinstance(method, str | None):
            raise RecipeError(f"--backend {backend}: give the method by its name")
        method = Library(backend, python=python, method=method)
    elif python is not None:
        raise RecipeError("--backend-python goes with --backend")
    if isinstance(method, Library):
        for option, own in (("clip", "AWQ"), ("sequential", "GPTQ")):
            if option in tuning:
                raise RecipeError(f"--{option} belongs to the built-in {own}: leave it out, or --backend")
        return replace(method, **tuning)
    if not tuning and (method is None or method == "rtn"):
        return None
    return methods.get(method or "rtn", **tuning)
