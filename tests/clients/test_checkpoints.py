"""Checkpoints that we write in the libraries they are for: every layer's weight is our own decode of the
same file, and generation works. GPTQ and AWQ need an environment of their own: `make test-clients`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.arrays import BF16 as BFLOAT16
from quantforge.demo import MODEL
from tests import checkpoints

LIBRARIES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed_tensors",),
    "bitsandbytes": ("bitsandbytes",),
}
# half a unit in the last place of bf16, once for the scale and once for the weight
TOLERANCE = 2 * 2.0**-8


def needs(format: str) -> None:
    for module in LIBRARIES[format]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed here: make test-clients")


def dense(module: Any) -> np.ndarray:
    """The weight [out, in] that a client's layer computes with."""
    import torch

    if (
        isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.is_floating_point()
        and module.weight.ndim == 2
    ):
        return module.weight.detach().float().numpy()
    if hasattr(module.weight if hasattr(module, "weight") else None, "quant_state"):  # bitsandbytes
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()
    with torch.no_grad():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        return module(torch.eye(module.in_features, dtype=torch.bfloat16)).float().T.numpy()


def weight_of(modules: dict[str, Any], name: str) -> np.ndarray:
    """The client's weight of a module; transformers 5 keeps experts stacked, gate and up in one, under newer names."""
    match = re.fullmatch(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)", name)
    if match is None or name in modules:
        return dense(modules[name])
    part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
    experts = modules[f"{match[1]}.mlp.experts"]
    if part == "down_proj":
        return experts.down_proj[int(match[2])].detach().float().numpy()
    halves = experts.gate_up_proj[int(match[2])].detach().float().numpy()
    return np.split(halves, 2)[part == "up_proj"]


def compare(path: Path, model: Any, near_zero: float = 2.0**-8) -> tuple[int, float]:
    """Layers that are quantized, and the largest relative error of the client's weights beside ours."""
    worst, n = 0.0, 0
    modules = dict(model.named_modules())
    with qf.open(path) as source:
        for name, stored in source.weights.items():
            if stored.codec.name in ("BF16", "F16", "F32"):
                continue
            ours = source.read(name).decode()
            theirs = weight_of(modules, name.removesuffix(".weight"))
            assert theirs.shape == ours.shape
            error = np.abs(theirs - ours) / (np.abs(ours) + np.abs(ours).max() * near_zero)
            worst, n = max(worst, float(error.max())), n + 1
    return n, worst


def speak(model: Any) -> None:
    import torch

    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
        made = model.generate(torch.tensor([[5, 7, 9, 11]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.isfinite(logits.float()).all()
    assert made.shape == (1, 9)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases of attention, and tied embeddings."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    directory = checkpoints.model(tmp_path_factory.mktemp("qwen"), "Qwen2", **sizes)
    tensors = {k: v.astype(BFLOAT16) for k, v in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    checkpoints.save(directory, "config.json", config | {"dtype": "bfloat16"})
    return directory


GPTQ = [
    *({"bits": b, "group_size": 64} for b in (2, 3, 4, 8)),
    {"bits": 8, "group_size": -1},
    {"bits": 4, "group_size": 32, "version": "gptq_v2"},
    {"bits": 4, "group_size": 128, "symmetric": False},
    {"bits": 3, "group_size": 128, "symmetric": False},
    {"bits": 8, "group_size": 128, "symmetric": False},
]
AWQ = [{"group_size": g} for g in (32, 64, 128)] + [{"group_size": 64, "symmetric": False}]
COMPRESSED = [
    {"bits": 4, "symmetric": False},
    *({"recipe": r} for r in ("W4A16", "W8A16", "W8A8", "FP8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")),
    *({"recipe": r} for r in ("fp8-tensor", "int8-tensor", "int4-channel")),
    {"bits": 8, "group_size": 128},
    {"bits": 4, "group_size": 32, "max_shard_size": 400_000},
]
BITSANDBYTES = [{"recipe": r} for r in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")]
CASES = [
    *(("gptq", o) for o in GPTQ),
    *(("awq", o) for o in AWQ),
    *(("compressed-tensors", o) for o in COMPRESSED),
    *(("bitsandbytes", o) for o in BITSANDBYTES),
]


@pytest.mark.parametrize("which", ["demo", "qwen"])
@pytest.mark.parametrize(("format", "options"), CASES, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x)
def test_transformers_computes_with_our_weights(format: str, options: dict, which: str, tmp_path: Path, qwen: Path) -> None:
    needs(format)
    import transformers

    path = tmp_path / "model"
    qf.convert(MODEL if which == "demo" else qwen, path, format=format, **options)
    if format == "compressed-tensors" and options.get("symmetric") is False and transformers.__version__ == "5.23.0":
        with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):  # what our warning says of this version
            transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    if format == "compressed-tensors":
        speak(model)  # it decompresses at the first forward pass
        n, worst = compare(path, model)
    else:
        # the kernel that transformers takes for 4 bits with zeros adds zero · scale in bf16: its error is the largest weight's
        zeros = format == "awq" or (options.get("symmetric") is False and options["bits"] == 4)
        n, worst = compare(path, model, 1.0 if zeros else 2.0**-8)
        speak(transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu"))
    print(f"{format} {options} {which}: {n} layers, {worst:.2e}")
    assert n == 7 * (6 if which == "demo" else 2)
    assert worst <= TOLERANCE


@pytest.mark.parametrize("static_groups", [False, True])
def test_act_order(static_groups: bool, tmp_path: Path) -> None:
    """desc_act: g_idx in any order, or as it always was."""
    needs("gptq")
    import transformers
    from gptqmodel import BACKEND, GPTQModel

    path = tmp_path / "model"
    options = {"method": "gptq", "act_order": True, "static_groups": static_groups, "damping": 0.02, "calibration_chunks": 16}
    qf.convert(MODEL, path, format="gptq", bits=4, group_size=64, **options)
    with qf.open(path) as source:
        shuffled = sum(s.codec.name.endswith("-act") for s in source.weights.values())
    assert (shuffled == 0) == static_groups
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu"),
        GPTQModel.load(path, device="cpu", backend=BACKEND.TORCH).model,
    ):
        n, worst = compare(path, model)
        assert n == 42
        assert worst <= TOLERANCE


MIXED = [
    ("gptq", {"bits": 4, "group_size": 64}, ["down_proj=BF16", "blk.0.attn_q=BF16"], 35),
    ("awq", {"group_size": 64}, ["down_proj=BF16", "blk.0.attn_q=BF16"], 35),
    ("compressed-tensors", {"recipe": "W4A16"}, ["down_proj=W8A16", "blk.0.attn_q=BF16"], 41),
    ("compressed-tensors", {"recipe": "W8A8"}, ["down_proj=FP8_DYNAMIC", "o_proj=NVFP4A16", "blk.0.attn_q=BF16"], 41),
    ("bitsandbytes", {"recipe": "nf4"}, ["down_proj=BF16", "blk.0.attn_q=BF16"], 35),
    ("bitsandbytes", {"recipe": "int8"}, ["down_proj=BF16", "blk.0.attn_q=BF16"], 35),
]


def kept_as_it_is(path: Path, model: Any) -> None:
    """Layers in floats are bit-equal in the client."""
    modules = dict(model.named_modules())
    with qf.open(path) as source:
        for name in [k for k, s in source.weights.items() if s.codec.name == "BF16" and k.endswith("weight")]:
            theirs = modules[name.removesuffix(".weight")].weight.detach().float().numpy()
            np.testing.assert_array_equal(theirs, source.read(name).decode(), err_msg=name)


@pytest.mark.parametrize(("format", "options", "types", "layers"), MIXED, ids=str)
def test_mixed_types_in_transformers(format: str, options: dict, types: list[str], layers: int, tmp_path: Path) -> None:
    needs(format)
    import transformers

    path = tmp_path / "model"
    qf.convert(MODEL, path, format=format, tensor_types=types, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    kept_as_it_is(path, model)
    if format == "compressed-tensors":
        speak(model)
    n, worst = compare(path, model, 1.0 if format == "awq" else 2.0**-8)
    assert n == layers
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("format", "options", "types", "layers"),
    [*MIXED[:2], *(("gptq", {"bits": 4, "group_size": 64}, [f"down_proj={t}"], 42) for t in ("int8-g32-sym", "int4-g64-asym"))],
    ids=str,
)
def test_mixed_types_in_gptqmodel(format: str, options: dict, types: list[str], layers: int, tmp_path: Path) -> None:
    needs(format)
    from gptqmodel import BACKEND, GPTQModel

    path = tmp_path / "model"
    qf.convert(MODEL, path, format=format, tensor_types=types, **options)
    model = GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH).model
    kept_as_it_is(path, model)
    n, worst = compare(path, model)
    assert n == layers
    assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "format", "options"),
    [
        ("Q4_0", "gptq", {"bits": 4, "group_size": 32}),
        ("Q4_0", "awq", {"group_size": 32}),
        ("Q8_0", "compressed-tensors", {"bits": 8, "group_size": 32}),
        ("BF16", "compressed-tensors", {"recipe": "W8A8"}),
        ("BF16", "bitsandbytes", {"recipe": "nf4-dq"}),
        ("Q4_K_M", "bitsandbytes", {"recipe": "int8", "allow_requantize": True}),
    ],
    ids=str,
)
def test_gguf_as_a_checkpoint_in_transformers(kind: str, format: str, options: dict, tmp_path: Path, qwen: Path) -> None:
    """With no hand edits: config, tokenizer and generation settings are the GGUF file's."""
    needs(format)
    import transformers

    original = MODEL if kind == "Q4_K_M" else qwen  # its rows are multiples of 256
    qf.convert(original, tmp_path / "m.gguf", kind)
    qf.convert(tmp_path / "m.gguf", tmp_path / "m", format=format, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="cpu")
    if format == "compressed-tensors":
        speak(model)
    n, worst = compare(tmp_path / "m", model, 1.0 if format == "awq" else 2.0**-8)
    assert n == 7 * (6 if original == MODEL else 2)
    assert worst <= TOLERANCE
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(d) for d in (tmp_path / "m", original))
    assert ours(checkpoints.NASTY)["input_ids"] == theirs(checkpoints.NASTY)["input_ids"]


GPTQMODEL = [
    *(("gptq", o) for o in (GPTQ[1], GPTQ[2], {"bits": 4, "group_size": -1}, {"bits": 4, "group_size": 128, "symmetric": False})),
    *(("awq", o) for o in AWQ),
]


@pytest.mark.parametrize(("format", "options"), GPTQMODEL, ids=str)
def test_gptqmodel_computes_with_our_weights(format: str, options: dict, tmp_path: Path) -> None:
    needs(format)
    from gptqmodel import BACKEND, GPTQModel

    path = tmp_path / "model"
    qf.convert(MODEL, path, format=format, **options)
    model = GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH).model
    speak(model)
    n, worst = compare(path, model)
    print(f"gptqmodel {format} {options}: {n} layers, {worst:.2e}")
    assert n == 42
    assert worst <= TOLERANCE


@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_llm_int8_product(threshold: float) -> None:
    """Our statement of LLM.int8()'s product is what bitsandbytes computes, outlier columns and all."""
    needs("bitsandbytes")
    import bitsandbytes as bnb
    import torch

    from quantforge import codecs

    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (20, 256)).astype(np.float32)
    x[:, [3, 77, 200]] *= 20
    w = rng.normal(0, 0.05, (64, 256)).astype(np.float16).astype(np.float32)
    x = x.astype(np.float16).astype(np.float32)
    layer = bnb.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(torch.from_numpy(w).half(), requires_grad=False, has_fp16_weights=False).to("cpu")
    with torch.no_grad():  # in training it multiplies by decoded weights
        theirs = layer.eval()(torch.from_numpy(x).half()).float().numpy()
    codec = codecs.get("int8-row")
    parts = codec.encode(w)
    ours = codec.mixed_product(x, parts, w.shape, threshold)
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() < 6e-3 * scale, "f16 results of values up to its size, and ties of a code here and there"
    # without outliers apart, the product is far off: the test would tell
    plain = x @ codec.decode(parts, w.shape).T
    errors = {t: np.abs(codec.mixed_product(x, parts, w.shape, t) - plain).max() for t in (0.0, 6.0)}
    assert errors[0.0] > 3 * errors[6.0]


# ---- mixtures of experts


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small bf16 models with four experts."""
    found = {}
    for kind, settings in (
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}),
    ):
        directory = checkpoints.model(tmp_path_factory.mktemp(kind), kind, hidden_size=128, intermediate_size=128, **settings)
        tensors = {k: v.astype(BFLOAT16) for k, v in load_file(directory / "model.safetensors").items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        checkpoints.save(directory, "config.json", config | {"dtype": "bfloat16"})
        found[kind] = directory
    return found


EXPERTS = [
    ("compressed-tensors", {"recipe": "W4A16"}, []),
    ("compressed-tensors", {"recipe": "int8-g128-sym"}, []),
    ("compressed-tensors", {"recipe": "FP8_DYNAMIC"}, []),
    ("compressed-tensors", {"recipe": "W8A8"}, ["experts=W4A16"]),
    ("bitsandbytes", {"recipe": "nf4"}, ["experts=BF16"]),
    ("bitsandbytes", {"recipe": "int8"}, ["experts=BF16"]),
    ("awq", {"group_size": 64}, ["experts=BF16"]),
    ("gptq", {"group_size": 64}, ["experts=BF16"]),
]


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize(("format", "options", "types"), EXPERTS, ids=str)
def test_experts_in_transformers(
    format: str, options: dict, types: list[str], kind: str, tmp_path: Path, mixtures: dict[str, Path]
) -> None:
    needs(format)
    import transformers

    path = tmp_path / "model"
    report = qf.convert(mixtures[kind], path, format=format, tensor_types=types, **options)
    assert not report.warnings
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    if format == "compressed-tensors":
        speak(model)
    n, worst = compare(path, model, 1.0 if format == "awq" else 2.0**-8)
    assert n == 2 * (4 if types == ["experts=BF16"] else 4 + 4 * 3)
    assert worst <= TOLERANCE
    if types == ["experts=BF16"]:
        with qf.open(path) as source:
            name = next(k for k in source.weights if ".1." in k and ".experts.3." in k)
            theirs = weight_of(dict(model.named_modules()), name.removesuffix(".weight"))
            np.testing.assert_array_equal(theirs, source.read(name).decode())


@pytest.mark.parametrize(("format", "options"), [("gptq", {"bits": 4, "group_size": 64}), ("awq", {"group_size": 64})])
def test_experts_in_gptqmodel(format: str, options: dict, tmp_path: Path, mixtures: dict[str, Path]) -> None:
    needs(format)
    from gptqmodel import BACKEND, GPTQModel

    path = tmp_path / "model"
    qf.convert(mixtures["Qwen3Moe"], path, format=format, **options)
    model = GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH).model
    n, worst = compare(path, model, 1.0 if format == "awq" else 2.0**-8)
    assert n == 2 * (4 + 4 * 3)
    assert worst <= TOLERANCE


def test_experts_that_no_client_here_loads(tmp_path: Path, mixtures: dict[str, Path]) -> None:
    for kind, format, recipe in (
        ("Qwen3Moe", "compressed-tensors", "NVFP4A16"),
        ("Mixtral", "compressed-tensors", "W8A8"),
        ("Qwen3Moe", "compressed-tensors", "FP8_BLOCK"),
        ("Qwen3Moe", "compressed-tensors", "W4A16_ASYM"),
        ("Mixtral", "gptq", None),
        ("Qwen3Moe", "awq", None),
    ):
        plan = qf.plan(mixtures[kind], tmp_path / "m", recipe, format=format)
        assert any("vLLM" in w for w in plan.warnings)
    with pytest.raises(qf.UnsupportedError, match="add --tensor-type experts=BF16"):
        qf.convert(mixtures["Mixtral"], tmp_path / "m", "nf4", format="bitsandbytes")
    assert not (tmp_path / "m").exists()


# ---- reading what the libraries write themselves


def near(path: Path, expected: dict[str, np.ndarray], codec: str) -> None:
    """Our decode of a library's file is what the library computes with, to bf16 rounding."""
    with qf.open(path) as source:
        found = {
            k.removesuffix(".weight"): s.codec.name
            for k, s in source.weights.items()
            if s.codec.name not in ("BF16", "F16", "F32")
        }
        assert found == dict.fromkeys(expected, codec)
        for name, theirs in expected.items():
            ours = source.read(f"{name}.weight").decode()
            np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=np.abs(theirs).max() * 2.0**-16, err_msg=name)


@pytest.mark.parametrize("codec", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8-row"])
def test_bitsandbytes_own_files(codec: str, tmp_path: Path) -> None:
    needs("bitsandbytes")
    import bitsandbytes.functional as bnb
    import torch
    import transformers

    settings: dict[str, Any] = {"load_in_8bit": True}
    if codec != "int8-row":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": codec[:3], "bnb_4bit_use_double_quant": codec.endswith("dq")}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=transformers.BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "m")
    expected = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            expected[name] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()
        elif type(module).__name__ == "Linear8bitLt":
            expected[name] = (module.weight.data.float() * module.weight.SCB[:, None] / 127).numpy()
    assert len(expected) == 42
    near(tmp_path / "m", expected, codec)
    same = total = 0  # and our encoder chooses what bitsandbytes does
    with qf.open(tmp_path / "m") as theirs, qf.open(MODEL) as weights:
        for name in expected:
            codes = qf.quantize(weights.read(f"{name}.weight").decode(), codec).parts["codes"]
            same += int((codes == theirs.read(f"{name}.weight").parts["codes"]).sum())
            total += codes.size
    print(f"bitsandbytes {codec}: {same / total:.5f} of the codes' bytes are ours")
    assert same / total > 0.998


@pytest.mark.parametrize(
    ("preset", "codec"),
    [
        ("W4A16", "int4-g128-sym-bf16"),
        ("W4A16_ASYM", "int4-g128-asym-bf16"),
        ("W8A16", "int8-g128-sym-bf16"),
        ("W8A8", "int8-channel-sym-bf16"),
        ("FP8_DYNAMIC", "fp8-channel-bf16"),
        ("FP8_BLOCK", "fp8-block128-bf16"),
        ("NVFP4A16", "NVFP4"),
        ("MXFP4A16", "MXFP4"),
    ],
)
def test_compressed_tensors_own_files(preset: str, codec: str, tmp_path: Path) -> None:
    """Written by compressed-tensors' own compressor, with scales of its own making."""
    needs("compressed-tensors")
    import compressed_tensors.quantization as ct
    import torch
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    scheme = ct.preset_name_to_scheme(preset, ["Linear"])
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    expected = {}
    for name, module in model.named_modules():
        a = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if a is None:
            continue
        w = module.weight.data.float()
        shared: Any = 1
        if a.strategy in ("group", "tensor_group"):
            w, shared = w.reshape(len(w), -1, a.group_size), -1
        elif a.strategy == "block":
            rows, columns = a.block_structure
            w, shared = w.reshape(len(w) // rows, rows, w.shape[1] // columns, columns), (1, 3)
        low, high = w.amin(shared, keepdim=a.strategy == "channel"), w.amax(shared, keepdim=a.strategy == "channel")
        overall = None
        if hasattr(module, "weight_global_scale"):
            overall = module.weight_global_scale.data = generate_gparam(w.amin(), w.amax()).reshape(1)
        scale, zero = calculate_qparams(low, high, a, overall)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        zero = getattr(module, "weight_zero_point", None)
        fake = ct.fake_quantize(module.weight.data, module.weight_scale.data, zero, a, global_scale=overall)
        expected[name] = fake.float().numpy()
    assert len(expected) == 42
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "m")
    compressor.update_config(str(tmp_path / "m"))
    near(tmp_path / "m", expected, codec)


@pytest.mark.parametrize(
    ("settings", "codec"),
    [
        ({"bits": 4, "group_size": 32, "desc_act": True}, "int4-g32-sym-act"),
        ({"bits": 3, "group_size": 64, "desc_act": False, "sym": False}, "int3-g64-asym"),
        ({"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"}, "int4-g32-sym"),
        ({"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm", "sym": False}, "int4-g32-asym"),
    ],
    ids=str,
)
def test_gptqmodel_own_files(settings: dict, codec: str, tmp_path: Path, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized by GPTQModel, act-order among them."""
    needs("gptq")
    monkeypatch.chdir(tmp_path)  # it logs to ./logs
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rng = np.random.default_rng(1)
    calibration = [{"input_ids": rng.integers(2, 300, 64).tolist(), "attention_mask": [1] * 64} for _ in range(8)]
    awq = settings.get("quant_method") == "awq"
    made = GPTQModel.load(str(qwen), QuantizeConfig(**settings), device="cpu")
    made.quantize(calibration, batch_size=4, **({"backend": BACKEND.AWQ_TORCH} if awq else {}))
    made.save(str(tmp_path / "m"))
    model = GPTQModel.load(str(tmp_path / "m"), device="cpu", backend=BACKEND.AWQ_TORCH if awq else BACKEND.TORCH).model
    with qf.open(tmp_path / "m") as source:
        kinds = {s.codec.name.removesuffix("-bf16") for s in source.weights.values()} - {"BF16", "F16", "F32"}
    n, worst = compare(tmp_path / "m", model)
    print(f"gptqmodel's own {settings}: {n} layers, {worst:.2e}")
    assert (kinds, n) == ({codec}, 14)
    assert worst <= TOLERANCE
    qf.convert(tmp_path / "m", tmp_path / "m.gguf", "F16")
