"""What a conversion is asked for, as objects: `plan` and `run` see these and nothing else of the arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import formats, layouts
from ..calibration.importance import Importance
from ..errors import RecipeError, nearest
from ..formats import Format
from ..layouts import Layout
from ..methods import Method
from ..recipes import Recipe
from ..recipes.linears import Scheme

CHECKPOINT = "safetensors"
"""The format whose directories have layouts, and that a name without suffix stands for."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that a method sees."""

    text: str | Path = "builtin"
    """A file, or "builtin": the shipped one."""
    chunks: int = 128
    """Windows, spread over the text."""
    ctx: int | None = None
    """Tokens of each; None: 512, or less if the model's context is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything that decides what an output will be, beside the source. The meanings are those of `convert`."""

    out: str | Path
    recipe: str | Path | Recipe | None = None
    importance: Importance | None = None
    format: str | Format | Layout | None = None
    layout_options: Mapping[str, Any] = field(default_factory=dict)
    """Of the layout that `format` names: {"version": "gptq_v2"}."""
    scheme: Scheme = field(default_factory=Scheme)
    tensor_types: Sequence[str | tuple[str, str]] = ()
    method: Method | None = None
    """None: plain rounding, which runs without torch."""
    calibration: Calibration = field(default_factory=Calibration)
    max_shard_size: int | None = None
    pre_tokenizer: str | None = None
    vocab_only: bool = False
    mtp: bool = True
    """False: without the layers that predict further tokens."""
    allow_requantize: bool = False
    fallback: str | None = None
    """Of `recipes.presets.FALLBACKS`; None: the recipe's."""
    fallback_type: str | None = None
    """Instead of an error where a type cannot hold a tensor's values or shape."""
    provenance: bool = True
    device: str = "cpu"

    @property
    def format_name(self) -> str | None:
        """What --format says, None if nothing."""
        return self.format if self.format is None or isinstance(self.format, str) else self.format.name

    def target(self) -> tuple[Format, Layout | None]:
        """The format that is written and, for a checkpoint directory, its layout.

        By its name or, where none is given, by the suffix of `out`; a name without suffix is a directory of safetensors.
        Raises RecipeError, listing what there is.
        """
        given, layout = self._named()
        claimed = None if _ends_as_directory(self.out) else formats.by_suffix(Path(self.out).suffix)
        chosen = given or claimed or _without_claim(self.out)
        if not chosen.writes:
            raise RecipeError(f"{self.out}: {chosen.name} files are read, not written; there are {_outputs()}")
        if claimed is not chosen and (claimed or chosen.suffixes):
            what = f"a file named {' or '.join(f'*{s}' for s in chosen.suffixes)}" if chosen.suffixes else "a directory"
            raise RecipeError(f"{self.out}: a {self.format_name} output is {what}")
        return chosen, layout

    def _named(self) -> tuple[Format | None, Layout | None]:
        """What `format` names."""
        given, options = self.format, self.layout_options
        if isinstance(given, str):
            known = {n.lower(): n for n in (*writable(), *layouts.names())}
            name = known.get(given.lower())
            if name is None:
                raise RecipeError(f"unknown format {given}{nearest(given, known)}; known: {', '.join(known.values())}")
            if name in layouts.names():
                try:
                    given, options = layouts.get(name, **options), {}
                except TypeError:
                    raise RecipeError(f"--format {name} has no option {', '.join(options)}") from None
            else:
                given = formats.get(name)
        if options:
            raise RecipeError(f"{', '.join(options)}: only with the --format that has it")
        return (formats.get(CHECKPOINT), given) if isinstance(given, Layout) else (given, None)


def writable() -> list[str]:
    """Names of the formats that can be written."""
    return [n for n in formats.names() if formats.get(n).writes]


_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,11}")
"""Of a file. That of Qwen2.5-7B, model-v1.5 or Llama-3.1-8B.w4a16-g128 is none."""


def _ends_as_directory(out: str | Path) -> bool:
    return os.fspath(out).endswith(tuple(s for s in (os.sep, os.altsep) if s))


def _without_claim(out: str | Path) -> Format:
    """The format of a path that no format's suffix claims."""
    suffix = Path(out).suffix
    if _EXTENSION.fullmatch(suffix) and not _ends_as_directory(out) and not Path(out).is_dir():
        raise RecipeError(
            f"{out}: no format is written to files named *{suffix}; there are {_outputs()}; "
            f"to name a directory so, end it with {os.sep} or give --format"
        )
    return formats.get(CHECKPOINT)


def _outputs() -> str:
    """What there is: "files named *.gguf, directories of safetensors"."""
    known = [formats.get(n) for n in writable()]
    files, directories = [s for f in known for s in f.suffixes], [f.name for f in known if not f.suffixes]
    return f"files named {', '.join(f'*{s}' for s in files)} and directories of {' or '.join(directories)}"
