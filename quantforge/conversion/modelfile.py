"""An Ollama Modelfile for a GGUF file: what Ollama does not read from the file itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf

from ..errors import OutputError, RecipeError
from ..formats import Source
from ..tokenizer.chat import Turns
from ..tokenizer.files import read_json
from ..tokenizer.special import adds, ends
from .plan import Plan

_K = gguf.Keys.Tokenizer
NAME = "Modelfile"
_MOST_LICENCE = 1 << 20  # bytes
_PARAMETERS = {  # Ollama's, and llama.cpp's in GGUF
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


def with_modelfile(job: Plan, out: Path, force: bool) -> str:
    """The Modelfile that will stand beside the output of a plan.

    Raises RecipeError where Ollama cannot read the output, OutputError where there is another Modelfile.
    """
    if not job.format.gguf_names:
        raise RecipeError(f"{out}: a Modelfile is of a GGUF file; name the output *.gguf")
    if len(job.format.paths(out, job.header)) > 1:
        raise RecipeError(f"{out}: Ollama takes one file; leave out --split-max-size, or --modelfile")
    there = out.with_name(NAME)
    if there.exists() and not force:
        raise OutputError(there, "exists already; --force overwrites it")
    return render(out, job.header.metadata, job.source)


def render(out: Path, metadata: Mapping[str, Any], source: Source) -> str:
    """The Modelfile for `out`, a GGUF file with these metadata, made of `source`. Raises RecipeError for its name.

    TEMPLATE and SYSTEM are there where the chat template is a plain sequence of turns (`tokenizer.chat`): that is all a
    TEMPLATE can say exactly; else Ollama takes the file's own.
    """
    named = _quoted(f"./{out.name}")
    if named is None or not out.name.isprintable():
        raise RecipeError(f"{out!s}: a name that a Modelfile cannot hold")
    lines = [f"FROM {named if ' ' in out.name else named[1:-1]}", *_template(metadata)]
    lines += _stops(metadata)
    lines += list(_parameters(metadata, source))
    lines += _licence(metadata, source)
    return "\n".join(lines) + "\n"


def _stops(metadata: Mapping[str, Any]) -> list[str]:
    """A line for every end token that no other token's text can contain; ordinary ones end a text by their ids alone."""
    tokens, types = (list(metadata.get(k, ())) for k in (_K.LIST, _K.TOKEN_TYPE))
    ordinary = {i for i, kind in enumerate(types) if kind in (gguf.TokenType.NORMAL, gguf.TokenType.BYTE)}
    stops = [tokens[i] for i in ends(metadata) if 0 <= i < len(tokens) and i not in ordinary]
    return [f"PARAMETER stop {q}" for stop in stops if (q := _quoted(stop))]


def _template(metadata: Mapping[str, Any]) -> list[str]:
    template = metadata.get(_K.CHAT_TEMPLATE)
    if not isinstance(template, str):
        return ["# no chat template: the model continues text"]
    tokens = metadata.get(_K.LIST) or []
    named = {"bos_token": metadata.get(_K.BOS_ID), "eos_token": metadata.get(_K.EOS_ID)}
    turns = Turns.of(template, {k: tokens[i] for k, i in named.items() if isinstance(i, int) and 0 <= i < len(tokens)})
    text = None if turns is None else _quoted(_go(turns, adds(metadata)["bos"]))
    if turns is None or text is None:
        return ["# the chat template in the GGUF file does more than a TEMPLATE here could: Ollama reads it from the file"]
    lines = [f"TEMPLATE {text}"]
    if turns.default_system:
        system = _quoted(turns.default_system)
        lines.append(f"SYSTEM {system}" if system else "# the default system prompt has quotes that a Modelfile cannot hold")
    return lines


def _go(t: Turns, adds_bos: bool) -> str:
    """Turns as a template of Go's text/template, with Ollama's names: one exchange, which Ollama repeats."""
    start = "" if adds_bos else _literal(t.start)
    system = inside = ""
    if t.system is not None:
        system = "{{ if .System }}" + _literal(t.system[0]) + "{{ .System }}" + _literal(t.system[1]) + "{{ end }}"
    elif t.joined is not None:
        inside = "{{ if .System }}{{ .System }}" + _literal(t.joined) + "{{ end }}"
    user = f"{_literal(t.user)}{inside}{{{{ .Prompt }}}}"
    return f"{start}{system}{user}{_literal(t.assistant)}{{{{ .Response }}}}{_literal(t.end)}"


def _literal(text: str) -> str:
    """A text that Go's templates put out as it is, and that a Modelfile can quote."""
    return text.replace("{", '{{ "{" }}').replace('"""', r'{{ "\"\"\"" }}')


def _quoted(text: str) -> str | None:
    """A text as a Modelfile holds it, which has quotes but no escapes; None for one that it cannot hold."""
    if "\0" in text or "\r" in text or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    if '"""' not in text and not text.endswith('"'):
        return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
    quoted = f'"{text}"'
    return quoted if "\n" not in text and not quoted.startswith('"""') else None


def _parameters(metadata: Mapping[str, Any], source: Source) -> Iterator[str]:
    generation = {} if source.gguf_names else read_json(source.directory / "generation_config.json")
    values = {name: metadata[key] for name, key in _PARAMETERS.items() if key in metadata}
    if generation.get("do_sample") is False:
        values["temperature"] = 0
    arch = metadata[gguf.Keys.General.ARCHITECTURE]
    limit, context = metadata.get(gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=arch)), generation.get("max_length")
    if type(context) is int and context > 20 and isinstance(limit, int):  # 20: what transformers writes for nothing
        values["num_ctx"] = min(context, limit)
    for name, value in values.items():
        yield f"PARAMETER {name} {float(f'{value:.6g}'):g}" if not isinstance(value, int) else f"PARAMETER {name} {value}"


def _licence(metadata: Mapping[str, Any], source: Source) -> list[str]:
    """The text of the licence, or its name."""
    texts = [] if source.gguf_names else sorted(p for p in source.directory.glob("LICEN[SC]E*") if p.is_file())
    text = None
    if texts and texts[0].stat().st_size <= _MOST_LICENCE:
        text = texts[0].read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip()
    text = text or metadata.get(gguf.Keys.General.LICENSE)
    if not isinstance(text, str) or not text:
        return []
    quoted = _quoted(text)
    return [f"LICENSE {quoted}"] if quoted else ["# the licence has quotes that a Modelfile cannot hold"]
