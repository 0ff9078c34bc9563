"""What a conversion is asked for: option objects, the arguments of the API, formats by name and by suffix."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge import formats, layouts
from quantforge.calibration.importance import Importance
from quantforge.calibration.importance import read as read_importance
from quantforge.conversion.options import Options, writable
from quantforge.demo import IMATRIX, MODEL
from quantforge.errors import RecipeError, UnsupportedError
from quantforge.formats import Format

TOY = """
import numpy as np

from quantforge import codecs, formats
from quantforge.arrays import TensorInfo
from quantforge.formats import Format, Stored
from quantforge.formats.base import FileSink, MappedFile, MappedSource, Place, Placement, Slot

TYPES = {"F32": "<f4", "F16": "<f2"}


class ToySource(MappedSource):
    format = "toy"

    def __init__(self, path):
        self.path, self.config = path, {}
        file = MappedFile(path)
        self._files, self.weights, self._places = [file], {}, {}
        lines = bytes(file.bytes[: 1 << 16]).split(b"\\n\\n")[0].decode().splitlines()[1:]
        for line in lines:
            name, codec, offset, *shape = line.split()
            info = TensorInfo(np.dtype(TYPES[codec]), tuple(map(int, shape)))
            self.weights[name] = Stored(codecs.get(codec), info.shape)
            self._places[name] = {"data": Place(file, int(offset), info)}


def place(header):
    offset, lines, slots = 1 << 16, ["toy"], {}
    for name, stored in header.tensors.items():
        info = stored.codec.layout(stored.shape)["data"]
        lines.append(" ".join(map(str, (name, stored.codec.name, offset, *stored.shape))))
        slots[name] = {"data": Slot("", offset, info)}
        offset += info.nbytes
    return Placement({"": ("\\n".join(lines) + "\\n\\n").encode()}, {"": offset}, slots)


class Toy(Format):
    name = "toy"
    suffixes = (".toy",)

    def recognises(self, path):
        return path.is_file() and path.suffix.lower() == ".toy"

    def open(self, path):
        return ToySource(path)

    def holds(self, codec):
        return codec.name in TYPES

    def size(self, header):
        return place(header).nbytes

    def create(self, path, header):
        return FileSink(path, header.tensors, place(header))


FORMAT = formats.register(Toy())
"""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """A directory with a module `toy`, whose format is registered."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "toy.py").write_text(TOY)
    known = dict(formats.base._registry.all())
    exec(TOY, {"__name__": "toy"})
    yield tmp_path
    formats.base._registry._items.clear()
    formats.base._registry._items.update(known)


@pytest.mark.parametrize(("name", "options"), [("m.toy", {}), ("m.TOY", {}), ("m.toy", {"format": "toy"})], ids=str)
def test_a_registered_format_is_written_and_read_back(toy: Path, name: str, options: dict) -> None:
    plan = qf.plan(MODEL, toy / name, "F16", **options)
    report = qf.convert(MODEL, toy / name, "F16", **options)
    assert plan.total_bytes == report.total_bytes == (toy / name).stat().st_size
    with qf.open(toy / name) as ours, qf.open(MODEL) as original:
        assert ours.format == "toy" and ours.weights.keys() == original.weights.keys()
        for tensor in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            assert np.allclose(ours.read(tensor).decode(), original.read(tensor).decode(), atol=1e-4)


def test_what_a_format_cannot_hold_is_said_before_anything_runs(toy: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"toy files cannot hold Q8_0; types that it holds.*: F32, F16$"):
        qf.convert(MODEL, toy / "m.toy", "Q8_0")
    assert not (toy / "m.toy").exists()


def test_a_format_goes_with_its_suffix(toy: Path) -> None:
    with pytest.raises(RecipeError, match=r"a toy output is a file named \*\.toy"):
        qf.plan(MODEL, "m", format="toy")
    with pytest.raises(RecipeError, match=r"a safetensors output is a directory"):
        qf.plan(MODEL, "m.toy", format="safetensors")
    with pytest.raises(RecipeError, match=r"files named .*\*\.toy"):
        qf.plan(MODEL, "m.onnx")


def test_the_command_line_knows_it(toy: Path) -> None:
    (toy / "site" / "toy-1.dist-info").mkdir()
    (toy / "site" / "toy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (toy / "site" / "toy-1.dist-info" / "entry_points.txt").write_text("[quantforge.formats]\ntoy = toy:FORMAT\n")
    path = f"{toy / 'site'}:{Path(qf.__file__).parents[1]}"

    def quantforge(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "quantforge", *map(str, arguments)]
        return subprocess.run(command, env={"PYTHONPATH": path}, check=True, capture_output=True, text=True).stdout

    assert "m.toy: F16" in quantforge("convert", MODEL, toy / "m.toy", "-t", "F16")
    assert re.search(r"^F16 .* tensors", quantforge("inspect", toy / "m.toy"), re.M)
    assert re.search(r"--format F\s+One of [^;]*\btoy\b", quantforge("convert", "--help"))


@pytest.mark.parametrize("name", ["out.npy", "out.onnx", "out.bin", "out.safetensors", "Qwen2.5-7B.ggml"])
def test_a_suffix_that_nothing_claims(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"files named \*\.gguf and directories of safetensors; .* end it with / or") as caught:
        qf.plan(MODEL, tmp_path / name)
    assert Path(name).suffix in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["out", "Qwen2.5-7B", "model-v1.5", "Llama-3.1-8B.w4a16-g128", ".hidden", "model.d", "out.npy/", "there.bin"],
)
def test_names_of_directories(name: str, tmp_path: Path) -> None:
    (tmp_path / "there.bin").mkdir()
    target, layout = Options(out=f"{tmp_path}/{name}").target()
    assert target.name == "safetensors" and layout is None


def test_the_case_of_a_suffix_says_nothing() -> None:
    assert Options(out="m.GGUF").target()[0].name == "gguf"
    assert Options(out="m.Gguf", format="GGUF").target()[0].name == "gguf"


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout_is_a_format(name: str) -> None:
    target, layout = Options(out="m", format=name).target()
    assert layout is not None and (target.name, layout.name) == ("safetensors", name)
    assert Options(out="m", format=layout).target() == (target, layout)
    with pytest.raises(RecipeError, match=f"a {name} output is a directory"):
        Options(out="m.gguf", format=name).target()


@pytest.mark.parametrize("name", writable())
def test_every_format_is_found_by_what_it_claims(name: str) -> None:
    chosen = formats.get(name)
    for out in [f"m{s}" for s in chosen.suffixes]:
        assert Options(out=out).target()[0] is chosen
    assert Options(out=f"m{chosen.suffixes[0] if chosen.suffixes else ''}", format=name).target()[0] is chosen


def test_an_unknown_format() -> None:
    with pytest.raises(RecipeError, match=r"unknown format gptk \(did you mean gptq.*known: .*gguf") as caught:
        qf.plan(MODEL, "m", format="gptk")
    assert all(n in str(caught.value) for n in (*writable(), *layouts.names()))


def test_a_format_that_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyRead(Format):
        name = "only-read"
        suffixes = (".only",)

        def recognises(self, path: Path) -> bool:
            return False

        def open(self, path: Path) -> formats.Source:
            raise AssertionError

    monkeypatch.setattr(formats.base._registry, "_items", {**formats.base._registry.all(), "only-read": OnlyRead()})
    with pytest.raises(RecipeError, match=r"only-read files are read, not written; there are files named \*\.gguf and"):
        qf.plan(MODEL, "m.only")
    with pytest.raises(RecipeError, match="unknown format only-read"):
        qf.plan(MODEL, "m", format="only-read")


@pytest.mark.parametrize(
    ("alone", "objects"),
    [
        (
            {"format": "gptq", "bits": 4, "group_size": 32, "symmetric": False},
            {"format": "gptq", "scheme": qf.Scheme(4, 32, False)},
        ),
        ({"format": "gptq", "version": "gptq_v2"}, {"format": layouts.get("gptq", version="gptq_v2")}),
        ({"recipe": "Q4_0", "format": "gguf"}, {"recipe": "Q4_0", "format": formats.get("gguf")}),
        ({"max_shard_size": 2_000_000}, {"max_shard_size": "2MB"}),
        (
            {"backend": "gptqmodel", "group_size": 32, "damping": 0.05, "backend_python": sys.executable},
            {"method": qf.Library("gptqmodel", damping=0.05, python=sys.executable), "scheme": qf.Scheme(group_size=32)},
        ),
    ],
    ids=lambda o: "-".join(o),
)
def test_single_values_and_objects_are_the_same(alone: dict, objects: dict, tmp_path: Path) -> None:
    out = tmp_path / ("m.gguf" if alone.get("format") == "gguf" else "m")
    a, b = (qf.plan(MODEL, out, **o) for o in (alone, objects))
    assert a.to_json() == b.to_json()
    assert a.header.layout == b.header.layout
    assert (a.calibrated and a.calibrated.method) == (b.calibrated and b.calibrated.method)


def test_methods_and_calibration_as_objects() -> None:
    from quantforge.methods import AWQ, GPTQ

    text = MODEL / "config.json"
    tuned = {"act_order": True, "damping": 0.1, "calibration": text, "calibration_chunks": 5, "calibration_ctx": 64}
    a = qf.plan(MODEL, "m.gguf", "Q4_0", method="gptq", **tuned).calibrated
    b = qf.plan(
        MODEL, "m.gguf", "Q4_0", method=GPTQ(act_order=True, damping=0.1), calibration=qf.Calibration(text, 5, 64)
    ).calibrated
    assert a == b and a is not None
    c = qf.plan(MODEL, "m.gguf", "Q4_0", method=AWQ(), clip=True).calibrated
    assert c is not None and c.method == AWQ(clip=True) and c.calibration == qf.Calibration()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": qf.Scheme(4), "bits": 4}, r"scheme= has its own bits"),
        ({"calibration": qf.Calibration(), "calibration_ctx": 64}, r"calibration= has its own ctx"),
        ({"max_shard_size": "much"}, r"--max-shard-size 'much': write a size"),
        ({"max_shard_size": 0}, r"--max-shard-size 0"),
        ({"version": "gptq_v2"}, r"version: only with the --format that has it"),
        ({"format": "awq", "threshold": 6.0}, r"--format awq has no option threshold"),
        ({"group_size": 32}, r"--group-size and --sym go with --bits, or with --format .*gptq"),
    ],
    ids=str,
)
def test_options_that_contradict(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        qf.plan(MODEL, "m", **options)


def test_every_argument_is_typed_and_has_a_bullet() -> None:
    convert, plan = inspect.signature(qf.convert), inspect.signature(qf.plan)
    for signature in (convert, plan):
        assert signature.return_annotation is not inspect.Signature.empty
        for p in signature.parameters.values():
            assert p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            assert p.annotation not in (inspect.Parameter.empty, "Any"), p.name
    bullets = re.findall(r"^    - (\w+): ", qf.convert.__doc__ or "", flags=re.M)
    assert bullets == [*dict.fromkeys(bullets)] and set(bullets) == set(convert.parameters)
    runs = {"threads", "force", "measure", "modelfile", "progress"}
    assert {k: v for k, v in convert.parameters.items() if k not in runs} == dict(plan.parameters)


def with_unused_columns(columns: int) -> Importance:
    """The shipped model's imatrix, as a text leaves it that never uses some columns of one matrix."""
    values = dict(read_importance(IMATRIX))
    values[UNUSED] = values[UNUSED].copy()
    values[UNUSED][:columns] = 0
    return Importance(values, path=IMATRIX)


UNUSED = "blk.0.ffn_down.weight"


def test_unused_columns_are_warned_of_where_bytes_are_llama_quantizes(tmp_path: Path) -> None:
    plan = qf.plan(MODEL, tmp_path / "m.gguf", "Q4_0", importance=with_unused_columns(64))
    assert [w for w in plan.warnings if re.search(r"no importance to 64 of \d+ columns of blk.0.ffn_down.weight;.*Q4_0", w)]
    assert not plan.importance[UNUSED][:64].any()
    plan.source.close()


@pytest.mark.parametrize("columns", [64, 10_000])
@pytest.mark.parametrize("kind", ["IQ3_S", "NVFP4"])
def test_unused_columns_count_a_little_elsewhere(kind: str, columns: int, tmp_path: Path) -> None:
    usual = with_unused_columns(0)[UNUSED]
    plan = qf.plan(MODEL, tmp_path / "m.gguf", kind, importance=with_unused_columns(columns))
    plan.source.close()
    assert not [w for w in plan.warnings if "importance to" in w]
    q = plan.importance[UNUSED]
    if columns > usual.size:
        assert (q == 1).all()
    else:
        np.testing.assert_allclose(q[:64], np.median(usual[64:]) / 100, rtol=1e-6)
        np.testing.assert_array_equal(q[64:], usual[64:])
