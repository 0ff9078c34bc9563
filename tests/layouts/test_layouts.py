"""Checkpoints with a layout: what is written reads back as the same numbers, goes on to other formats, and what
cannot be right is refused. The libraries themselves are asked in tests/clients/test_checkpoints.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import codecs, formats
from quantforge.codecs.integers import pack_bits, reorder, unpack_bits
from quantforge.demo import MODEL
from quantforge.formats import Header, Stored
from quantforge.inspection import describe
from quantforge.layouts.gptq import Gptq

LAYER = "model.layers.1.mlp.down_proj.weight"
RNG = np.random.default_rng(8)

WRITTEN = [
    *(("gptq", {"bits": b, "group_size": g}) for b, g in ((2, 64), (3, 128), (4, -1), (8, 32))),
    ("gptq", {"bits": 3, "symmetric": False}),
    ("awq", {}),
    ("awq", {"group_size": 32, "symmetric": True}),
    ("compressed-tensors", {"bits": 4, "symmetric": False}),
    ("compressed-tensors", {"bits": 8}),
    *(("compressed-tensors", {"recipe": r}) for r in ("W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")),
    *(("bitsandbytes", {"recipe": r}) for r in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")),
    ("safetensors", {"bits": 5, "group_size": 64}),
]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    with qf.open(MODEL) as source:
        return {name: source.read(name).decode() for name in source.weights}


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_are_one_stream(bits: int) -> None:
    for n in (1, 7, 32, 64):
        codes = RNG.integers(0, 1 << bits, (3, n)).astype(np.uint8)
        packed = pack_bits(codes, bits)
        stream = [sum(int(c) << (i * bits) for i, c in enumerate(row)).to_bytes(-(-n * bits // 8), "little") for row in codes]
        assert packed.tobytes() == b"".join(stream)
        np.testing.assert_array_equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize(("format", "options"), WRITTEN, ids=str)
def test_written_is_what_the_codec_made(format: str, options: dict[str, Any], tmp_path: Path, weights: Any) -> None:
    out = tmp_path / "m"
    plan = qf.plan(MODEL, out, format=format, **options)
    report = qf.convert(MODEL, out, format=format, threads=2, **options)
    assert plan.total_bytes == sum(p.stat().st_size for p in out.iterdir())
    quantized = {t.name: codecs.get(t.type) for t in report.tensors if t.type != "BF16"}
    assert len(quantized) == 42 and all(".layers." in n and "norm" not in n for n in quantized)
    with qf.open(out) as source:
        assert sorted(source.weights) == sorted(weights)
        for name, w in weights.items():
            e = source.read(name)
            if name in quantized:
                assert e.codec is quantized[name]
                w = codecs.quantize(w, e.codec).decode()
                if e.codec.name == "NVFP4" and not name.endswith(("o_proj.weight", "down_proj.weight")):
                    continue  # their scale is another matrix's, too: tested below
                if e.codec.name == "NVFP4":  # the file holds 1 / scale
                    np.testing.assert_allclose(e.decode(), w, rtol=3e-7)
                    continue
            np.testing.assert_array_equal(e.decode(), w)
    again = tmp_path / "again"
    if format != "safetensors" and "NVFP4A16" not in options.values():  # the same type again: the same bytes
        qf.convert(out, again, format=format, threads=1, **options)
        with qf.open(again) as a, qf.open(out) as b:
            assert all(a.read(k).tobytes() == b.read(k).tobytes() for k in weights)
        assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("format", "options", "kind", "exact"),
    [
        ("gptq", {"bits": 4}, "Q4_0", True),
        ("gptq", {"bits": 3, "group_size": -1}, "Q4_0", True),
        ("gptq", {"bits": 8, "group_size": 32}, "Q8_0", True),
        ("awq", {"group_size": 64}, "Q4_1", False),
        ("compressed-tensors", {"bits": 8}, "Q8_0", False),
        ("bitsandbytes", {"bits": 8}, "Q8_0", False),
        ("safetensors", {"bits": 5, "symmetric": False, "group_size": 32}, "Q5_1", False),
    ],
    ids=str,
)
def test_integers_go_on_to_gguf(
    format: str, options: dict[str, Any], kind: str, exact: bool, tmp_path: Path, weights: Any
) -> None:
    qf.convert(MODEL, tmp_path / "m", format=format, **options)
    report = qf.convert(tmp_path / "m", tmp_path / "m.gguf", kind, measure=True)
    row = next(t for t in report.tensors if t.name == "blk.1.ffn_down.weight")
    assert row.type == kind and row.note is not None
    assert ("lossless" in row.note) == exact and ("f16" in row.note) != exact
    with qf.open(tmp_path / "m") as a, qf.open(tmp_path / "m.gguf") as b:
        before, after = a.read(LAYER).decode(), b.read("blk.1.ffn_down.weight").decode()
    if exact:
        assert row.rel_rmse == 0
        np.testing.assert_array_equal(after, before)
    np.testing.assert_allclose(after, before, atol=np.abs(before).max() * 2.0**-10)


def test_absmax_int8_in_groups_of_32_is_q8_0(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "q8.gguf", "Q8_0")
    qf.convert(MODEL, tmp_path / "absmax.gguf", "int8-g32-sym")
    ours, ggml = (describe(tmp_path / f"{n}.gguf", hashes=True)["tensors"] for n in ("absmax", "q8"))
    assert ours == ggml
    qf.convert(MODEL, tmp_path / "zp.gguf", bits=4, group_size=128, symmetric=False)
    kinds = {t["type"] for t in describe(tmp_path / "zp.gguf")["tensors"]}
    assert kinds == {"Q4_1", "BF16", "F32"}


def test_quantized_again_only_when_asked(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m", format="gptq")
    with pytest.raises(qf.RecipeError, match=r"already quantized \(int4-g128-sym\).*Q4_0 takes it over"):
        qf.convert(tmp_path / "m", tmp_path / "m.gguf", "Q4_K")
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "Q4_K", allow_requantize=True)
    qf.convert(tmp_path / "m", tmp_path / "f16.gguf", "F16")  # decoding needs no leave
    with qf.open(tmp_path / "m") as a, qf.open(tmp_path / "f16.gguf") as b:
        np.testing.assert_array_equal(
            b.read("blk.1.ffn_down.weight").decode(), a.read(LAYER).decode().astype(np.float16).astype(np.float32)
        )


def act_order(directory: Path, version: str | None = None, bits: int = 4) -> dict[str, np.ndarray]:
    """The demo model as GPTQ's act-order leaves it; what its layers stand for."""
    config = json.loads((MODEL / "config.json").read_text())
    encoded = {}
    with qf.open(MODEL) as source:
        for name in source.weights:
            e = source.read(name)
            if ".layers." in name and "norm" not in name:
                order = RNG.permutation(e.shape[1])
                e = reorder(codecs.quantize(e.decode()[:, order], f"int{bits}-g64-{'a' * (version == 'gptq_v2')}sym"), order)
            encoded[name] = e
    files = {f: (MODEL / f).read_bytes() for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
    header = Header(config, {k: Stored(e.codec, e.shape) for k, e in encoded.items()}, files, Gptq(version))
    with formats.get("safetensors").create(directory, header) as sink:
        for name, e in encoded.items():
            sink.write(name, e.parts)
        sink.commit()
    return {name: e.decode() for name, e in encoded.items()}


@pytest.mark.parametrize("version", [None, "gptq_v2"])
def test_act_order(version: str | None, tmp_path: Path) -> None:
    expected = act_order(tmp_path / "m", version)
    assert json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]["desc_act"] is True
    with qf.open(tmp_path / "m") as source:
        assert source.weights[LAYER].codec.name.endswith("-act")
        for name, w in expected.items():
            np.testing.assert_array_equal(source.read(name).decode(), w)
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F32", threads=2)
    with qf.open(tmp_path / "m.gguf") as gguf:
        np.testing.assert_array_equal(gguf.read("blk.1.ffn_down.weight").decode(), expected[LAYER])
    with pytest.raises(qf.RecipeError, match="already quantized"):  # groups of strangers fit no block
        qf.convert(tmp_path / "m", tmp_path / "q.gguf", "Q4_0")


def test_shards_have_an_index(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m", format="gptq", max_shard_size=1_000_000)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    qf.convert(MODEL, tmp_path / "whole", format="gptq")
    with qf.open(tmp_path / "m") as a, qf.open(tmp_path / "whole") as b:
        for name in b.weights:
            np.testing.assert_array_equal(a.read(name).decode(), b.read(name).decode())


# ---- traps


def edit(directory: Path, change: Any = None, **settings: Any) -> Path:
    """Change a written checkpoint: its arrays by a function, its quantization_config by settings."""
    if change is not None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(settings)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_gptq_zeros_of_both_versions(tmp_path: Path) -> None:
    """v1 holds zero − 1: symmetric 4 bits are 0x77777777, in v2 0x88888888."""
    for version, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888)):
        qf.convert(MODEL, tmp_path / version, format="gptq", version=version)
        tensors = load_file(tmp_path / version / "model.safetensors")
        assert (tensors[LAYER.replace("weight", "qzeros")].view(np.uint32) == word).all()
        config = json.loads((tmp_path / version / "config.json").read_text())["quantization_config"]
        assert config["checkpoint_format"] == version and config["meta"] == {"quantizer": [f"quantforge:{qf.__version__}"]}
        named = json.loads((tmp_path / version / "quantize_config.json").read_text())
        assert named.items() >= config.items()
    a, b = (load_file(tmp_path / v / "model.safetensors") for v in ("gptq", "gptq_v2"))
    np.testing.assert_array_equal(*(t[LAYER.replace("weight", "qweight")] for t in (a, b)))


def test_gptq_asymmetric_is_v2_and_v1_is_refused(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m", format="gptq", symmetric=False)
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert (config["sym"], config["checkpoint_format"]) == (False, "gptq_v2")
    with pytest.raises(qf.UnsupportedError, match=r"v1 layout.*gptq_v2, or --sym"):
        qf.convert(MODEL, tmp_path / "v1", format="gptq", symmetric=False, version="gptq")
    assert not (tmp_path / "v1").exists()


def test_gptq_v1_zero_of_zero_survives_reading(tmp_path: Path) -> None:
    """A stored 15 is a zero of 0, as readers that mask have it."""
    qf.convert(MODEL, tmp_path / "m", format="gptq", symmetric=False)
    with qf.open(tmp_path / "m") as source:
        expected = source.read(LAYER).decode()

    def to_v1(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith("qzeros")]:
            zeros = unpack_bits(tensors[name].view(np.uint8), 4, tensors[name].shape[1] * 8)
            tensors[name] = pack_bits((zeros - 1) & 15, 4).view(np.int32)

    edit(tmp_path / "m", to_v1, checkpoint_format="gptq")
    with qf.open(tmp_path / "m") as source:
        np.testing.assert_array_equal(source.read(LAYER).decode(), expected)


def test_gptq_biases_of_zero(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias; a Llama has no place for them."""
    qf.convert(MODEL, tmp_path / "m", format="gptq")

    def add(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.endswith("scales")]:
            tensors[name.replace("scales", "bias")] = np.zeros(tensors[name].shape[1], np.float16)

    edit(tmp_path / "m", add)
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F16")
    edit(tmp_path / "m", lambda t: t[LAYER.replace("weight", "bias")].__setitem__(3, 1))
    with pytest.raises(qf.ShapeError, match=r"down_proj\.bias"):
        qf.convert(tmp_path / "m", tmp_path / "n.gguf", "F16")


def _absmax_after_a_forward(tensors: dict[str, np.ndarray]) -> None:
    name = LAYER + ".absmax"
    tensors[name] = np.zeros((12, 256), np.float16)


REFUSED = [
    ("gptq", {}, {"checkpoint_format": "marlin"}, None, "gptq and gptq_v2 are read"),
    ("gptq", {}, {"is_marlin_format": True}, None, "marlin"),
    ("gptq", {}, {}, lambda t: t.pop(LAYER.replace("weight", "scales")), "scales missing"),
    ("gptq", {}, {}, lambda t: t.update({LAYER.replace("weight", "g_idx"): np.zeros(77, np.int32)}), "no GPTQ weights"),
    ("awq", {}, {"version": "gemv"}, None, "gemm with 4 bits is read"),
    ("awq", {}, {}, lambda t: t.pop(LAYER.replace("weight", "qzeros")), "missing"),
    ("bitsandbytes", {}, {}, _absmax_after_a_forward, "before any forward pass"),
    ("bitsandbytes", {}, {}, lambda t: t.pop(LAYER + ".quant_state.bitsandbytes__nf4"), "quant_state"),
    ("bitsandbytes", {}, {}, lambda t: t[LAYER + ".quant_map"].__setitem__(3, 0), "quant_map is not nf4's"),
    ("compressed-tensors", {}, {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, None, "dense stream"),
    ("compressed-tensors", {}, {}, lambda t: t.pop(LAYER + "_shape"), "weight_shape is missing"),
]


@pytest.mark.parametrize(("format", "options", "settings", "change", "message"), REFUSED, ids=lambda x: str(x)[:24])
def test_unfit_checkpoints_are_named(format: str, options: Any, settings: Any, change: Any, message: str, tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m", format=format, **options)
    edit(tmp_path / "m", change, **settings)
    with pytest.raises(qf.errors.FormatError, match=message):
        qf.open(tmp_path / "m")


UNFIT = [
    ({"format": "gptq", "bits": 5}, "2, 3, 4 or 8 bits"),
    ({"format": "gptq", "recipe": "nf4"}, "cannot hold nf4"),
    ({"format": "awq", "group_size": 96}, "group size 96"),
    ({"format": "awq", "bits": 8}, "have 4 bits"),
    ({"format": "awq", "recipe": "int8-g128-sym"}, "cannot hold int8"),
    ({"format": "compressed-tensors", "bits": 3}, "other widths are packed differently"),
    ({"format": "compressed-tensors", "recipe": "W4A4"}, "schemes: W4A16"),
    ({"format": "bitsandbytes", "bits": 3}, "nf4-dq"),
    ({"format": "bitsandbytes", "recipe": "Q4_K"}, "not Q4_K"),
    ({"format": "gqtp"}, "did you mean gptq"),
    ({"format": "gguf"}, r"named \*\.gguf"),
    ({"bits": 4, "recipe": "Q4_0"}, "exclude each other"),
    ({"group_size": 64}, "go with --bits"),
    ({"format": "awq", "version": "gptq"}, "has no option version"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT, ids=str)
def test_unfit_options_are_one_line_and_write_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(qf.QuantForgeError, match=message) as e:
        qf.convert(MODEL, tmp_path / "m", **options)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_nvfp4_has_one_global_scale_for_layers_that_vllm_joins(method: str, tmp_path: Path, weights: Any) -> None:
    qf.convert(MODEL, tmp_path / "m", "NVFP4A16", format="compressed-tensors", method=method, calibration_chunks=4)
    block = "model.layers.1."
    with safe_open(tmp_path / "m/model.safetensors", "np") as file:
        names = [k for k in file.keys() if k.startswith(block) and k.endswith("global_scale")]  # noqa: SIM118 - no mapping
        scale = {k.split(".")[-2]: float(file.get_tensor(k)[0]) for k in names}
    assert scale["q_proj"] == scale["k_proj"] == scale["v_proj"] and scale["gate_proj"] == scale["up_proj"]
    assert len(set(scale.values())) == 4
    if method == "rtn":
        largest = max(np.abs(weights[f"{block}self_attn.{n}.weight"]).max() for n in ("q_proj", "k_proj", "v_proj"))
        np.testing.assert_allclose(scale["q_proj"], 448 * 6 / largest, rtol=1e-6)
        with qf.open(tmp_path / "m") as source:
            for name, w in weights.items():
                if "_proj" in name:
                    error = np.linalg.norm(source.read(name).decode() - w) / np.linalg.norm(w)
                    alone = codecs.quantize(w, "NVFP4").decode()
                    assert error < 1.02 * np.linalg.norm(alone - w) / np.linalg.norm(w)


def test_asymmetric_pack_quantized_warns(tmp_path: Path) -> None:
    plan = qf.plan(MODEL, tmp_path / "m", "W4A16_ASYM", format="compressed-tensors")
    assert any("transformers 5.23.0" in w for w in plan.warnings)


def test_directories_keep_what_from_pretrained_wants(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "in")
    qf.convert(tmp_path / "in", tmp_path / "m", format="awq")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    with open(tmp_path / "m/model.safetensors", "rb") as f:
        head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    assert head["__metadata__"] == {"format": "pt"}
    qf.convert(tmp_path / "m", tmp_path / "plain", "BF16")  # decoded again: no trace of AWQ
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
