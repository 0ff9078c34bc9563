"""absmax and zero-point at every width and grain, in every format: the codec's numbers, or one clear line."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import quantforge as qf
from quantforge import codecs
from quantforge.cli import group
from tests import checkpoints

ALL = [f"int{b}-{per}-{s}" for b, per, s in product(range(2, 9), ("tensor", "channel", "g32", "g64", "g128"), ("sym", "asym"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return checkpoints.model(tmp_path_factory.mktemp("model"), "Llama", **sizes)


@pytest.fixture(scope="module")
def weights(model: Path) -> dict[str, np.ndarray]:
    with qf.open(model) as source:
        return {name: source.read(name).decode() for name in source.weights}


def compressed_tensors_holds(codec: Any) -> bool:
    return codec.bits in (4, 8) and (codec.symmetric or codec.per != "tensor")


def gguf_holds(codec: Any) -> str | None:
    """The type that takes its integers over."""
    if codec.symmetric:
        return "Q4_0" if codec.bits <= 4 else "Q5_0" if codec.bits == 5 else "Q8_0"
    return {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 5: "Q5_1"}.get(codec.bits)


@pytest.mark.parametrize("name", ALL)
def test_every_width_and_grain(name: str, model: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    codec: Any = codecs.get(name)

    qf.convert(model, tmp_path / "own", name, tensor_types=["token_embd|^output=F32"], threads=1)
    with qf.open(tmp_path / "own") as source:
        made = [k for k, s in source.weights.items() if s.codec is codec]
        assert len(made) == 7
        for k in made:
            np.testing.assert_array_equal(source.read(k).decode(), codec.decode(codec.encode(weights[k]), weights[k].shape))

    if compressed_tensors_holds(codec):
        report = qf.convert(model, tmp_path / "ct", name, format="compressed-tensors", threads=1)
        used = {codecs.get(t.type) for t in report.tensors} - {codecs.get("F32")}
        assert [c.name for c in used] == [f"{name}-f32"]  # scales are the model's dtype
        with qf.open(tmp_path / "ct") as source:
            for k in made:
                e = source.read(k)
                np.testing.assert_array_equal(e.decode(), codecs.quantize(weights[k], f"{name}-f32").decode())
    else:
        with pytest.raises(qf.QuantForgeError, match=r"int4, int8, fp8|choose --sym") as refused:
            qf.convert(model, tmp_path / "ct", name, format="compressed-tensors")
        assert "\n" not in str(refused.value) and not (tmp_path / "ct").exists()

    holder = gguf_holds(codec)
    if holder is None:
        with pytest.raises(qf.UnsupportedError, match="symmetric ones and asymmetric ones of at most 5 bits") as refused:
            qf.convert(model, tmp_path / "m.gguf", name)
        assert "\n" not in str(refused.value) and not (tmp_path / "m.gguf").exists()
        return
    bits, per = codec.bits, codec.per
    options = {"bits": bits, "group_size": int(per[1:]) if per[0] == "g" else -1, "symmetric": codec.symmetric}
    if per == "tensor":
        report = qf.convert(model, tmp_path / "m.gguf", name, tensor_types=["token_embd|^output=F32"], threads=1)
    else:
        report = qf.convert(model, tmp_path / "m.gguf", threads=1, **options)
    taken = [t for t in report.tensors if t.type == holder]
    exact = codec.symmetric
    assert len(taken) == 7 and all(t.note and ("lossless" in t.note) == exact and name in t.note for t in taken)
    with qf.open(tmp_path / "m.gguf") as gguf, qf.open(tmp_path / "own") as own:
        w, mine = own.read("model.layers.0.mlp.down_proj.weight").decode(), gguf.read("blk.0.ffn_down.weight").decode()
        if exact:
            np.testing.assert_array_equal(mine, w)
        np.testing.assert_allclose(mine, w, atol=np.abs(w).max() * 2.0**-10)
    # and from the checkpoint, without a look at the weights
    qf.convert(tmp_path / "own", tmp_path / "again.gguf", holder, tensor_types=["token_embd|^output=F32"], threads=1)
    with qf.open(tmp_path / "m.gguf") as a, qf.open(tmp_path / "again.gguf") as b:
        assert a.read("blk.0.attn_q.weight").tobytes() == b.read("blk.0.attn_q.weight").tobytes()


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("symmetric", ["--sym", "--asym"])
def test_on_the_command_line(bits: int, symmetric: str, model: Path, tmp_path: Path) -> None:
    for out, options in (("ct", ["--format", "compressed-tensors"]), ("m.gguf", [])):
        numbers = ["--bits", str(bits), "--group-size", "32", symmetric]
        done = CliRunner().invoke(group, ["convert", str(model), str(tmp_path / out), *numbers, *options])
        if (tmp_path / out).exists():
            assert done.exit_code == 0
        else:
            assert isinstance(done.exception, qf.QuantForgeError) and "\n" not in str(done.exception)
    assert (tmp_path / "ct").exists() == (bits in (4, 8))
    assert (tmp_path / "m.gguf").exists() == (symmetric == "--sym" or bits < 6)


def test_other_words_for_the_same() -> None:
    assert codecs.get("absmax8-g32") is codecs.get("int8-g32-sym")
    assert codecs.get("zeropoint-int4-channel") is codecs.get("int4-channel-asym")
