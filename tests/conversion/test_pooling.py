"""How vectors of a text become one: sentence-transformers' files beside a model, GGUF's key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantforge.conversion.pooling import pooling_metadata
from quantforge.errors import FormatError, UnsupportedError

MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def directory(path: Path, modules: Any, pooling: Any = None) -> Path:
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, gguf.PoolingType.MEAN),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, gguf.PoolingType.CLS),
        ({"pooling_mode_lasttoken": True}, gguf.PoolingType.LAST),
        ({"pooling_mode": "mean"}, gguf.PoolingType.MEAN),
        ({"pooling_mode": "cls"}, gguf.PoolingType.CLS),
    ],
)
def test_sentence_transformers_words(said: dict[str, Any], kind: gguf.PoolingType, tmp_path: Path) -> None:
    assert pooling_metadata(directory(tmp_path, MODULES, said), "bert") == {"bert.pooling_type": kind.value}


def test_without_modules_nothing_is_pooled(tmp_path: Path) -> None:
    assert pooling_metadata(tmp_path, "llama") == {"llama.pooling_type": gguf.PoolingType.NONE.value}


@pytest.mark.parametrize(
    "said", [{"pooling_mode": "max"}, {}, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}]
)
def test_other_ways_are_refused(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"llama\.cpp pools by mean, cls or lasttoken"):
        pooling_metadata(directory(tmp_path, MODULES, said), "bert")


def test_layers_behind_the_pooling_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dense = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    pooling_metadata(directory(tmp_path, [*MODULES, dense], {"pooling_mode": "mean"}), "gemma-embedding")
    assert "2_Dense" in caplog.text


@pytest.mark.parametrize("modules", [{"a": 1}, ["a"]])
def test_no_list_of_modules(modules: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a list"):
        pooling_metadata(directory(tmp_path, modules), "bert")
