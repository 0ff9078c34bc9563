"""Modelfiles: read back as Ollama reads them, with what the model's own files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import quantforge as qf
from quantforge.conversion.modelfile import _literal, _quoted
from quantforge.demo import MODEL
from quantforge.errors import OutputError, RecipeError
from tests.tokenizer.test_chat import PLAIN


def parsed(text: str) -> list[tuple[str, str]]:
    """The commands: a value ends with its line or, quoted, with the first line that ends with the quote."""
    found, lines = [], text.split("\n")
    while lines:
        line = lines.pop(0)
        if not line or line.startswith("#"):
            continue
        command, _, value = line.partition(" ")
        if command == "PARAMETER":
            name, _, value = value.partition(" ")
            command = f"{command} {name}"
        for quote in ('"""', '"'):
            if value.startswith(quote):
                while not (len(value) >= 2 * len(quote) and value.endswith(quote)):
                    value += "\n" + lines.pop(0)
                value = value[len(quote) : -len(quote)]
                break
        found.append((command, value))
    return found


def model(directory: Path, template: str | None, generation: dict[str, object]) -> Path:
    shutil.copytree(MODEL, directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_what_the_models_files_say(tmp_path: Path) -> None:
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "max_length": 256}
    source = model(tmp_path / "model", PLAIN["default prompt"], {**sampling, "eos_token_id": [1, 0]})
    (source / "LICENSE").write_text('Do "what" you like\n')
    qf.convert(source, tmp_path / "my model.gguf", "Q8_0", modelfile=True)
    said = parsed((tmp_path / "Modelfile").read_text())
    with qf.open(tmp_path / "my model.gguf") as made:
        tokens = made.config["tokenizer.ggml.tokens"]
    values = dict(said)
    assert said[0] == ("FROM", "./my model.gguf")
    assert [v for k, v in said if k == "PARAMETER stop"] == [tokens[1], tokens[0]]
    numbers = {k.removeprefix("PARAMETER "): float(v) for k, v in said if k.startswith("PARAMETER ") and "stop" not in k}
    assert numbers == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repeat_penalty": 1.05, "num_ctx": 256}
    assert values["LICENSE"] == 'Do "what" you like'
    assert values["TEMPLATE"] == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    )
    assert "SYSTEM" not in values or values["SYSTEM"] == 'Be """kind""".'


def test_ordinary_tokens_that_end_a_text_are_no_stop_texts(tmp_path: Path) -> None:
    """The text of a digit's token is in many others, and a line end's has another alphabet."""
    source = model(tmp_path / "model", None, {"eos_token_id": [1, 300]})
    qf.convert(source, tmp_path / "m.gguf", "Q8_0", modelfile=True)
    with qf.open(tmp_path / "m.gguf") as made:
        tokens = made.config["tokenizer.ggml.tokens"]
    said = parsed((tmp_path / "Modelfile").read_text())
    assert [v for k, v in said if k == "PARAMETER stop"] == [tokens[1]]


def test_what_cannot_be_said_exactly_is_left_to_the_file(tmp_path: Path) -> None:
    source = model(tmp_path / "model", PLAIN["chatml"] + "{% if tools %}{% endif %}", {"do_sample": False})
    qf.convert(source, tmp_path / "m.gguf", "Q8_0", modelfile=True)
    text = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in dict(parsed(text)) and "# the chat template in the GGUF file does more" in text
    assert dict(parsed(text))["PARAMETER temperature"] == "0"


@pytest.mark.parametrize(
    "text", ["plain", "two\nlines", 'a "b" c', '"', 'ends with "', '"""', 'x """ y', 'a """ b\nc', '"""\n"""']
)
def test_hostile_text_is_read_back_or_refused(text: str) -> None:
    quoted = _quoted(text)
    assert quoted is None or parsed(f"SYSTEM {quoted}\nFROM x\n") == [("SYSTEM", text), ("FROM", "x")]
    assert quoted is not None or '"' in text
    go = _literal(text + "{{ .System }}{")
    assert '"""' not in go and "{{ .System" not in go.replace('{{ "{" }}', "")


def test_where_there_is_no_modelfile(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\*\.gguf"):
        qf.convert(MODEL, tmp_path / "m", modelfile=True)
    with pytest.raises(RecipeError, match="one file"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q8_0", modelfile=True, max_shard_size="1MB")
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        qf.convert(MODEL, tmp_path / "m.gguf", "Q8_0", modelfile=True)
    assert [p.name for p in tmp_path.iterdir()] == ["Modelfile"] and (tmp_path / "Modelfile").read_text() == "mine"
