"""Models that run on what the file holds, beside transformers on the decoded weights."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_model, save_model

import quantforge as qf
from quantforge.cli import group
from quantforge.demo import MODEL
from quantforge.errors import FormatError, RecipeError, ShapeError, UnsupportedError
from quantforge.evaluation import run as evaluation
from quantforge.nn import QuantEmbedding, QuantExperts, QuantLinear
from quantforge.runtime import Model, advance, finish, loading
from quantforge.tokenizer import Tokenizer
from tests import adapters, checkpoints

IDS = torch.tensor([[0, 5, 900, 77, 1234, 42, 8, 300, 2500, 11], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])


pytestmark = pytest.mark.usefixtures("one_thread")


def decoded(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with all weights decoded."""
    with qf.open(path) as source:
        model = Model(source, "decoded", dtype=dtype)
        model.load(model.module, "")
        return model.module


def in_memory(module: torch.nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


def compare(path: Path, ids: torch.Tensor = IDS, tolerance: float = 2e-5, **options: Any) -> Any:
    """The loaded model, its logits checked."""
    model, want = qf.load(path, **options), decoded(path)
    with torch.no_grad():
        ours, theirs = model(ids).logits, want(ids).logits
    assert float((ours - theirs).abs().max()) < tolerance * float(theirs.abs().max())
    return model


def speak(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    mask = torch.ones_like(ids[:1, :4])
    made = model.generate(ids[:1, :4], attention_mask=mask, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 24)
    return made


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "IQ3_XXS", "Q4_0", "IQ2_XXS"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", kind, importance=MODEL / "llama.cpp-imatrix.gguf")
    model = compare(tmp_path / "m.gguf")
    with qf.open(tmp_path / "m.gguf") as source:
        stored = sum(s.nbytes for s in source.weights.values())
    assert stored <= in_memory(model) < 1.03 * stored  # the head is the embedding
    linears = [m for k, m in model.named_modules() if k.endswith("_proj")]
    assert len(linears) == 42 and all(isinstance(m, QuantLinear) for m in linears)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert torch.equal(speak(model), speak(decoded(tmp_path / "m.gguf")))
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        half = copy.deepcopy(model).bfloat16()
        assert half(IDS).logits.dtype == torch.bfloat16 and in_memory(half) < in_memory(model)
    text = model.tokenizer("To open a file", return_tensors="pt").input_ids
    assert model.tokenizer.decode(text[0]).endswith("To open a file")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("gptq", {}),
        ("gptq", {"bits": 8}),
        ("gptq", {"bits": 3, "version": "gptq_v2"}),
        ("gptq", {"bits": 2, "group_size": 32}),
        ("awq", {}),
        ("compressed-tensors", {}),
        ("compressed-tensors", {"type": "W8A8"}),
        ("compressed-tensors", {"type": "FP8_DYNAMIC"}),
        ("compressed-tensors", {"type": "FP8_BLOCK"}),
        ("compressed-tensors", {"type": "NVFP4A16"}),
        ("bitsandbytes", {}),
        ("bitsandbytes", {"type": "nf4-dq"}),
        ("bitsandbytes", {"type": "fp4"}),
        ("bitsandbytes", {"bits": 8}),
        ("safetensors", {"type": "Q5_K_S", "max_shard_size": 1_500_000}),
    ],
)
def test_checkpoints_of_other_libraries(tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    kind = (options.pop("type"),) if "type" in options else ()
    qf.convert(MODEL, tmp_path / "m", *kind, format=format, **options)
    model = compare(tmp_path / "m")
    assert torch.equal(speak(model), speak(decoded(tmp_path / "m")))
    with qf.open(tmp_path / "m") as source:
        stored = sum(s.nbytes for s in source.weights.values())
    assert 0.97 * stored < in_memory(model) < 1.03 * stored
    assert model.generation_config.eos_token_id == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_checkpoint(dtype: str) -> None:
    model = qf.load(MODEL, dtype=dtype)
    head = type(model.model.layers[0].mlp.up_proj)
    assert head is (torch.nn.Linear if dtype == "bfloat16" else QuantLinear)  # the same bytes, where those are its dtype
    assert in_memory(model) < 1.01 * (MODEL / "model.safetensors").stat().st_size
    if dtype == "float32":
        compare(MODEL)
    else:
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, decoded(MODEL, torch.bfloat16)(IDS).logits)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"num_key_value_heads": 2, "attention_bias": True}),  # rows of q and k have another order in GGUF
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("Qwen3Moe", MOE),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_architectures(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    checkpoints.model(tmp_path, kind, **changes)
    ids = IDS % 300
    found = [tmp_path]
    qf.convert(tmp_path, tmp_path / "q8.safetensors.d", recipe="int8-channel-sym")
    found.append(tmp_path / "q8.safetensors.d")
    if kind not in ("Mixtral", "Qwen3Moe"):
        qf.convert(tmp_path, tmp_path / "m.gguf", "Q8_0")
        found.append(tmp_path / "m.gguf")
    for path in found:
        model = compare(path, ids, dtype="float32")
        assert torch.equal(speak(model, ids), speak(decoded(path), ids))
        packed = [m for m in model.modules() if isinstance(m, QuantExperts)]
        if kind in ("Qwen3Moe", "Mixtral"):
            assert len(packed) == (0 if path == tmp_path else 4)
    with torch.no_grad():
        made = qf.load(found[-1])
        (near,) = {float((made(ids).logits - qf.load(tmp_path)(ids).logits).norm() / qf.load(tmp_path)(ids).logits.norm())}
    assert near < 0.2  # and the rows are where they belong


def test_blocks_of_stored_tensors_in_the_evaluators_passes(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M")
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 4000, (3, 64)))
    with qf.open(tmp_path / "m.gguf") as source:
        models = [Model(source, "decoded"), Model(source, "packed", packed=True)]
        seen: list[set[type]] = []
        hidden = advance(models, ids, before=lambda i, blocks, _: seen.append({type(m) for m in blocks[1].modules()}))
        assert all(QuantLinear in kinds for kinds in seen) and len(seen) == 6
        assert float((hidden[0] - hidden[1]).norm() / hidden[0].norm()) < 1e-5
        with torch.inference_mode():
            logits = []
            for m, states in zip(models, finish(models, hidden, torch.arange(64).expand(3, 64) >= 10), strict=True):
                with m.head() as head:
                    head.take(slice(0, head.vocabulary))
                    logits.append(head(states).log_softmax(-1))
        assert float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).max()) < 1e-6
        # and nothing stays behind
        assert not any(isinstance(m, QuantLinear) for m in models[1].layers.modules())
        assert all(p.is_meta for p in models[1].layers.parameters())


def test_evaluation_of_stored_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on CUDA, on the CPU: the same figures as with decoded blocks."""
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M")
    options: dict[str, Any] = {"reference": MODEL, "chunks": 2, "metrics": ["kld"], "noise_floor": False}
    (want,) = qf.evaluate(tmp_path / "m.gguf", **options).models
    monkeypatch.setattr(evaluation, "_PACKED_ON", {"cpu"})
    (ours,) = qf.evaluate(tmp_path / "m.gguf", **options).models
    assert ours.ppl == pytest.approx(want.ppl, rel=1e-5) and ours.kld_mean == pytest.approx(want.kld_mean, rel=1e-4)
    assert [t.name for t in ours.tensors] == [t.name for t in want.tensors]
    assert [t.rel_rmse for t in ours.tensors] == pytest.approx([t.rel_rmse for t in want.tensors], rel=1e-5)


def test_activations_of_8_bits(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M")
    with torch.no_grad():
        want, ours = (qf.load(tmp_path / "m.gguf", activations=a)(IDS).logits for a in ("float", "int8"))
    assert 1e-4 < float((ours - want).norm() / want.norm()) < 0.03


def test_command_line(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q8_0")
    options = ["generate", str(tmp_path / "m.gguf"), "--prompt", "To open a file", "--max-tokens", "12"]
    done = CliRunner().invoke(group, [*options, "--activations", "float"])
    assert done.exit_code == 0
    model = decoded(tmp_path / "m.gguf")
    with qf.open(tmp_path / "m.gguf") as source:
        tokenizer = Tokenizer(tmp_path / "m.gguf", source.config, gguf_metadata=True)
    ids = torch.tensor([[*([tokenizer.bos] if tokenizer.adds_bos else []), *tokenizer.encode("To open a file")[0]]])
    mask = torch.ones_like(ids)  # this model's BOS is 0, which would be taken for padding
    made = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert done.output.rstrip("\n") == tokenizer.decode(made.tolist()).rstrip("\n")
    assert CliRunner().invoke(group, options).exit_code == 0
    empty = CliRunner().invoke(group, ["generate", str(tmp_path / "none"), "--prompt", "x"])
    assert isinstance(empty.exception, FormatError)


def test_generate_as_a_user_would(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_0")
    run = ["generate", str(tmp_path / "m.gguf"), "--max-new-tokens", "8"]
    invoke = CliRunner().invoke
    said = invoke(group, [*run, "--prompt", "To open a file"]).output
    assert invoke(group, run, input="To open a file\n").output == said
    assert invoke(group, [*run, "--temperature", "0.9", "--top-k", "1"], input="To open a file").output == said
    drawn = [
        invoke(group, [*run, "--temperature", "3", "--top-p", "0.99", "--seed", seed], input="To open a file").output
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] and len({*drawn, said}) == 3
    assert invoke(group, [*run, "--temperature", "-1"], input="x").exit_code == 2
    assert isinstance(invoke(group, [*run, "--device", "tpu"], input="x").exception, RecipeError)
    assert isinstance(invoke(group, ["generate", str(tmp_path / "none.gguf")], input="x").exception, FormatError)


class Letters:
    """A tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_characters_come_whole() -> None:
    text = "aé€😀 z"
    pieces = list(loading._pieces(Letters(), iter(text.encode())))  # type: ignore[arg-type]
    assert pieces == list(text)
    assert list(loading._pieces(Letters(), iter("né".encode()[:-1]))) == ["n", "\ufffd"]  # type: ignore[arg-type]
    assert list(loading._pieces(Letters(), iter(()))) == []  # type: ignore[arg-type]


def test_what_transformers_does_to_models(tmp_path: Path) -> None:
    qf.convert(MODEL, tmp_path / "m.gguf", "Q4_K_M")
    model = qf.load(tmp_path / "m.gguf")
    assert model.generation_config.eos_token_id == 1
    assert model.get_memory_footprint() == in_memory(model)
    with pytest.raises(UnsupportedError, match="`quantforge convert`") as raised:
        model.save_pretrained(tmp_path / "copy")
    assert "\n" not in str(raised.value) and not (tmp_path / "copy").exists()
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    save_model(model, tmp_path / "state")
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in (*again.parameters(), *again.buffers()):
            p.zero_()
    again = pickle.loads(pickle.dumps(again))
    assert load_model(again, tmp_path / "state") == (set(), [])
    for name, buffer in model.named_buffers():  # what no state holds
        again.get_buffer(name).copy_(buffer)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    # a prompt that is learned, through all layers
    prompt = model.get_input_embeddings()(IDS[:1]).requires_grad_()
    model(inputs_embeds=prompt, labels=IDS[:1]).loss.backward()
    want = decoded(tmp_path / "m.gguf")
    other = prompt.detach().clone().requires_grad_()
    want(inputs_embeds=other, labels=IDS[:1]).loss.backward()
    assert prompt.grad is not None and (prompt.grad - other.grad).norm() < 1e-4 * other.grad.norm()
    plain = qf.load(MODEL, dtype="bfloat16")  # nothing is packed: an ordinary model
    plain.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(qf.load(tmp_path / "plain", dtype="bfloat16")(IDS).logits, plain(IDS).logits)


def test_what_does_not_load_says_so_in_a_line(tmp_path: Path) -> None:
    def changed(name: str, **changes: Any) -> Path:
        shutil.copytree(MODEL, tmp_path / name)
        config = json.loads((MODEL / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return tmp_path / name

    cut = changed("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100_000])
    vision = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}}
    for path, error, message in (
        (changed("unknown", architectures=["FooForCausalLM"]), UnsupportedError, r"\['FooForCausalLM'\]: not a model class"),
        (changed("nothing", architectures=None, model_type=None), UnsupportedError, "no architectures in config.json"),
        (changed("vision", **vision), ShapeError, r"config says \[32000, 4096\]"),
        (changed("bert", architectures=["BertModel"]), UnsupportedError, "BertModel"),
        (changed("layers", num_hidden_layers=8), FormatError, r"tensor model.layers.6.* is missing"),
        (changed("width", hidden_size=128), ShapeError, r"shape \[4096, 256\], config says \[4096, 128\]"),
        (cut, FormatError, "truncated"),
    ):
        with pytest.raises(error, match=message) as raised:
            qf.load(path)
        assert "\n" not in str(raised.value)
    mute = changed("mute")
    for file in mute.glob("*token*"):
        file.unlink()
    assert qf.load(mute).tokenizer is None
    with pytest.raises(RecipeError, match="no tokenizer"):
        loading.answer(mute, "x")


def test_errors(tmp_path: Path) -> None:
    for path, options, error, message in (
        (MODEL, {"device": "tpu"}, RecipeError, "device tpu"),
        (MODEL, {"dtype": "int8"}, RecipeError, "dtype int8"),
        (MODEL, {"activations": "int4"}, RecipeError, "activations int4"),
        (tmp_path, {}, FormatError, "not a model"),
    ):
        with pytest.raises(error, match=message) as raised:
            qf.load(path, **options)
        assert "\n" not in str(raised.value)


def test_adapters_are_merged(tmp_path: Path) -> None:
    adapters.llama(tmp_path / "m")
    q = "model.layers.1.self_attn.q_proj"
    dora = adapters.low_rank(q, 32, 32) | {f"{q}.lora_magnitude_vector": abs(adapters.random(32))}
    a = adapters.save(tmp_path / "a", dora, use_dora=True)
    qf.convert(tmp_path / "m", tmp_path / "merged", "F32", format="safetensors", lora=a)
    ids = torch.arange(3, 20)[None]
    want = qf.load(tmp_path / "merged")(ids).logits
    assert torch.equal(qf.load(tmp_path / "m", lora=[(a, 1.0)])(ids).logits, want)
    assert not torch.equal(qf.load(tmp_path / "m")(ids).logits, want)
