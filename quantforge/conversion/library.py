"""A plan for another library of `backends`: what it will be told, and what its checkpoint becomes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .. import codecs, formats, layouts, recipes
from ..backends import Library
from ..codecs.integers import IntegerCodec
from ..codecs.plain import prevailing
from ..errors import RecipeError, UnsupportedError
from ..formats import Source
from ..layouts.base import whole_groups
from ..recipes.linears import Scheme
from .options import CHECKPOINT, Options
from .plan import Plan, all_floats, decide


def decide_with(library: Library, source: Source, options: Options) -> Plan:
    """As `plan.decide`; the plan's `finish` says what becomes of what the library leaves. Raises BackendError, too."""
    if not (source.path / "config.json").is_file() or formats.get(source.format).gguf_names:
        raise UnsupportedError(
            f"{source.path}: --backend needs a checkpoint directory as transformers loads it; "
            "`quantforge convert MODEL DIR --type BF16` makes one"
        )
    if source.adapters:
        raise UnsupportedError(
            f"{source.path}: --backend reads MODEL itself, without --lora; `quantforge convert MODEL DIR --type BF16 --lora ...` "
            "makes one model of both"
        )
    if not all_floats(s.codec for s in source.weights.values()):
        raise UnsupportedError(f"{source.path}: quantized already; --backend quantizes the original model")
    recipe, scheme, format = options.recipe, options.scheme, options.format_name
    schemes, written_in = library.known.schemes, library.known.methods[str(library.method)]
    kind = schemes.get(str(recipe).upper())
    made_of_it = None if kind else recipe
    """What its checkpoint is converted to, where that is another type."""
    if made_of_it is not None and scheme == Scheme() and not isinstance(made_of_it, recipes.Recipe):
        with suppress(UnsupportedError):  # what stands on even steps the library can make as well
            grid = codecs.get(str(made_of_it)).integers
            if grid is not None and not grid.whole:
                scheme = Scheme(grid.hi.bit_length(), grid.group or -1, grid.zero is not None)
    usual = "awq" if scheme.symmetric is False and "awq" in written_in and scheme.bits in (None, 4) else written_in[0]
    layout = format if format in written_in else usual
    dtype = prevailing((s.codec, s.shape) for s in source.weights.values())
    _, codec = layouts.get(layout).choose(kind, scheme.bits, scheme.group_size, scheme.symmetric, dtype)
    even = Scheme()
    if isinstance(codec, IntegerCodec):
        even = Scheme(codec.bits, codec.group or -1, codec.symmetric)
        library = replace(library, bits=codec.bits, group_size=codec.group or -1, symmetric=codec.symmetric)
    library = replace(library, layout=layout, scheme=str(recipe).upper() if kind else None)

    elsewhere = replace(options, layout_options={}).target()[0].name != CHECKPOINT
    base = replace(options, method=None, recipe=None, scheme=Scheme())
    if made_of_it is not None:
        how = replace(base, recipe=made_of_it)
    elif elsewhere:
        how = replace(base, scheme=even) if even != Scheme() else replace(base, recipe=codec.name)
    else:
        how = replace(base, format=options.format or layout, recipe=kind, scheme=Scheme() if kind else even)
    if library.act_order and not library.static_groups and layout == "gptq" and (elsewhere or how.format_name != "gptq"):
        raise RecipeError("--act-order scatters groups over the columns, which only GPTQ files can say: add --static-groups")
    as_is = made_of_it is None and (elsewhere or format in (None, layout, CHECKPOINT))
    changed = any((options.max_shard_size, options.tensor_types, options.pre_tokenizer, options.layout_options))
    adopt = as_is and not elsewhere and format != CHECKPOINT and not changed
    first = decide(source, replace(how, method=library))
    for planned in first.tensors:
        if isinstance(planned.target, IntegerCodec):
            whole_groups(planned.target, planned.shape)
    library.check(options.device)  # the last: what is wrong with the order should not be told after an installation
    then = how
    if as_is and (adopt or elsewhere or format == CHECKPOINT):
        then = replace(base, recipe=recipes.AS_STORED, format=options.format if elsewhere else None)
    finish = partial(_finish, replace(then, allow_requantize=True))
    return replace(first, finish=finish, adopt=adopt, recipe=f"{first.recipe}, {library.name}")


def _finish(options: Options, made: Path) -> Plan:
    """The plan for the checkpoint that the library left."""
    return decide(formats.open_path(made), options)
