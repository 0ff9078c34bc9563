"""Adapters of PEFT merged into a model: by PEFT's formulas, and by PEFT itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge import formats
from quantforge.archs.weight import Weight
from quantforge.errors import FormatError, NonFiniteError, QuantForgeError, RecipeError, ShapeError, UnsupportedError
from quantforge.formats.rows import decoded, read_rows
from tests import adapters
from tests.adapters import HIDDEN, INTER, VOCAB, llama, low_rank, random, save

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


def read(model: Path, *lora: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a model with adapters."""
    with formats.merged(formats.open_path(model), lora) as source:
        return {n: source.read(n).decode() for n in source.weights}


def check(have: dict[str, Any], base: dict[str, Any], **changed: Any) -> None:
    """These tensors are near what they should be, all others are the base's own."""
    want = base | {k.replace("__", "."): v for k, v in changed.items()}
    assert have.keys() == want.keys()
    for name, w in want.items():
        np.testing.assert_allclose(have[name], w, rtol=0, atol=4e-7 * np.abs(w).max(), err_msg=name)
        assert (have[name] == base.get(name)).all() == (w is base.get(name)), name


def product(tensors: dict[str, Any], module: str) -> Any:
    a, b = (tensors[f"{module}.lora_{k}.weight"].astype(np.float64) for k in "AB")
    return b @ a


def test_low_rank_changes(tmp_path: Path) -> None:
    base = llama(tmp_path / "m")
    lora = low_rank(Q, HIDDEN, HIDDEN) | low_rank(UP, INTER, HIDDEN, seed=7)
    have = read(tmp_path / "m", save(tmp_path / "a", lora))
    q, up = f"{Q}.weight", f"{UP}.weight"
    check(have, base, **{q: base[q] + 2 * product(lora, Q), up: base[up] + 2 * product(lora, UP)})


@pytest.mark.parametrize(
    ("config", "q", "up"),
    [
        ({"use_rslora": True}, 8 / 4**0.5, 8 / 6**0.5),
        ({"alpha_pattern": {"up_proj": 3}}, 8 / 4, 3 / 6),
        ({"alpha_pattern": {r"layers\.[0-9]+\.self_attn\..*": 12, "q_proj": 5}}, 12 / 4, 8 / 6),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "proj": 1, "_proj": 2}}, 5 / 4, 8 / 6),
    ],
)
def test_ranks_and_alphas_of_single_modules(tmp_path: Path, config: dict[str, Any], q: float, up: float) -> None:
    base = llama(tmp_path / "m")
    lora = low_rank(Q, HIDDEN, HIDDEN) | low_rank(UP, INTER, HIDDEN, 6)
    have = read(tmp_path / "m", save(tmp_path / "a", lora, rank_pattern={"up_proj": 6}, **config))
    names = f"{Q}.weight", f"{UP}.weight"
    check(have, base, **{n: base[n] + s * product(lora, n.removesuffix(".weight")) for n, s in zip(names, (q, up), strict=True)})


def test_several_adapters_in_order_with_scales(tmp_path: Path) -> None:
    """The second one's magnitudes are those of what the first one made."""
    base = llama(tmp_path / "m")
    first, second = low_rank(Q, HIDDEN, HIDDEN), low_rank(Q, HIDDEN, HIDDEN, seed=5)
    save(tmp_path / "1", first)
    magnitude = np.abs(random(HIDDEN)) + 1
    save(tmp_path / "2", second | {f"{Q}.lora_magnitude_vector": magnitude}, use_dora=True)
    w = base[f"{Q}.weight"] - 0.25 * 2 * product(first, Q) + 2 * product(second, Q)
    want = w * (magnitude / np.linalg.norm(w, axis=1))[:, None]
    for given in ([f"{tmp_path}/1:-0.25", tmp_path / "2"], [(tmp_path / "1", -0.25), (tmp_path / "2", 1.0)]):
        check(read(tmp_path / "m", *given), base, **{f"{Q}.weight": want})


def test_an_embedding_and_its_magnitudes(tmp_path: Path) -> None:
    base = llama(tmp_path / "m")
    a, b = random(4, VOCAB), random(HIDDEN, 4)
    lora = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    name = f"{EMBED}.weight"
    w = base[name] + 2 * (b.astype(np.float64) @ a).T
    check(read(tmp_path / "m", save(tmp_path / "a", lora)), base, **{name: w})
    magnitude = np.abs(random(HIDDEN)) + 1
    dora = save(tmp_path / "d", lora | {f"{EMBED}.lora_magnitude_vector": magnitude}, use_dora=True)
    check(read(tmp_path / "m", dora), base, **{name: w * (magnitude / np.linalg.norm(w, axis=0))})


@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_are_stored_crosswise(tmp_path: Path, dora: bool) -> None:
    """transformers' Conv1D, of which the square one tells nothing by its shape."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 16,
        "n_head": 2,
        "n_layer": 1,
        "vocab_size": 20,
        "n_positions": 32,
    }
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (20, 16), "wpe.weight": (32, 16)}
    for name, shape in {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16)}.items():
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    shapes |= {f"{n}.{k}": (16,) for n in ("h.0.ln_1", "h.0.ln_2", "ln_f") for k in ("weight", "bias")}
    base = adapters.checkpoint(tmp_path / "m", config, shapes)
    modules = {"h.0.attn.c_attn": (48, 16), "h.0.attn.c_proj": (16, 16)}
    lora: dict[str, Any] = {}
    want = {}
    for i, (m, (out, n)) in enumerate(modules.items()):
        lora |= low_rank(f"transformer.{m}", out, n, seed=10 * i)
        w = base[f"{m}.weight"] + 2 * product(lora, f"transformer.{m}").T
        if dora:
            magnitude = lora[f"transformer.{m}.lora_magnitude_vector"] = np.abs(random(out)) + 1
            w = w * (magnitude / np.linalg.norm(w, axis=0))
        want[f"{m}.weight"] = w
    check(read(tmp_path / "m", save(tmp_path / "a", lora, fan_in_fan_out=False, use_dora=dora)), base, **want)


def test_what_is_stored_whole(tmp_path: Path) -> None:
    """modules_to_save, trained biases and tokens, and a bias of lora_B."""
    config = {**adapters.LLAMA, "attention_bias": True}
    base = llama(tmp_path / "plain")
    biased = base | {f"{Q}.bias": random(HIDDEN, seed=3)}
    (tmp_path / "m").mkdir()
    save_file(biased, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    norm, rows = "model.layers.1.input_layernorm.weight", random(2, HIDDEN, seed=5)
    lora = low_rank(Q, HIDDEN, HIDDEN) | {
        f"{Q}.lora_B.bias": random(HIDDEN, seed=6),
        norm: random(HIDDEN, seed=4),
        f"{EMBED}.token_adapter.trainable_tokens_delta": rows,
    }
    a = save(tmp_path / "a", lora, lora_bias=True, modules_to_save=["input_layernorm"], trainable_token_indices=[7, 2])
    embedding = base[f"{EMBED}.weight"].copy()
    embedding[[7, 2]] = rows
    want = {
        f"{Q}.weight": base[f"{Q}.weight"] + 2 * product(lora, Q),
        f"{Q}.bias": biased[f"{Q}.bias"] + 2 * lora[f"{Q}.lora_B.bias"],
        norm: lora[norm],
        f"{EMBED}.weight": embedding,
    }
    check(read(tmp_path / "m", a), biased, **want)


NEW, NEWER = random(VOCAB, HIDDEN, seed=8), random(VOCAB, HIDDEN, seed=9)
GROWN = random(VOCAB + 8, HIDDEN, seed=8)
_E = {f"{EMBED}.lora_embedding_A": random(4, VOCAB), f"{EMBED}.lora_embedding_B": random(HIDDEN, 4)}
_DELTA = 2 * (_E[f"{EMBED}.lora_embedding_B"] @ _E[f"{EMBED}.lora_embedding_A"]).T
_TIED_TOO = {
    f"{HEAD}.lora_A.weight": _E[f"{EMBED}.lora_embedding_B"].T,
    f"{HEAD}.lora_B.weight": _E[f"{EMBED}.lora_embedding_A"].T,
}
TIED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any], Callable[[Any], Any] | None]] = {
    "nothing of both": (low_rank(Q, HIDDEN, HIDDEN), {}, lambda w: w, None),
    "a head trained": ({f"{HEAD}.weight": NEW}, {"modules_to_save": ["lm_head"]}, lambda w: w, lambda w: NEW),
    "an embedding trained": ({f"{EMBED}.weight": NEW}, {"modules_to_save": ["embed_tokens"]}, lambda w: NEW, lambda w: w),
    "both trained": (
        {f"{EMBED}.weight": NEW, f"{HEAD}.weight": NEWER},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda w: NEW,
        lambda w: NEWER,
    ),
    "both trained as one": (
        {f"{EMBED}.weight": NEW, f"{HEAD}.weight": NEW},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        lambda w: NEW,
        None,
    ),
    "grown": ({f"{EMBED}.weight": GROWN, f"{HEAD}.weight": GROWN}, {}, lambda w: GROWN, None),
    "grown, the embedding alone": ({f"{EMBED}.weight": GROWN}, {}, lambda w: GROWN, None),
    "low rank on the embedding": (_E, {}, lambda w: w + _DELTA, lambda w: w),
    "low rank on both, as one": (_E | _TIED_TOO, {"ensure_weight_tying": True}, lambda w: w + _DELTA, None),
    "a stored base under it": (_E | {f"{EMBED}.base_layer.weight": NEW}, {}, lambda w: NEW + _DELTA, lambda w: NEW),
    "tokens": (
        {f"{EMBED}.token_adapter.trainable_tokens_delta": NEW[:3]},
        {"trainable_token_indices": [0, 1, 2]},
        lambda w: np.concatenate([NEW[:3], w[3:]]),
        None,
    ),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_head_that_is_the_embedding(tmp_path: Path, kind: str) -> None:
    """It stays so unless the adapter makes two of them, as the model that was trained has it."""
    tensors, settings, embedding, head = TIED[kind]
    base = llama(tmp_path / "m", tie_word_embeddings=True)
    a = save(tmp_path / "a", tensors, **settings)
    with formats.merged(formats.open_path(tmp_path / "m"), [a]) as source:
        w = base[f"{EMBED}.weight"]
        np.testing.assert_allclose(source.read(f"{EMBED}.weight").decode(), embedding(w), atol=1e-6)
        config = source.checkpoint_config()
        assert config["tie_word_embeddings"] is (head is None)
        assert config["vocab_size"] == len(embedding(w))
        assert (f"{HEAD}.weight" in source.weights) is (head is not None)
        if head is not None:
            np.testing.assert_allclose(source.read(f"{HEAD}.weight").decode(), head(w), atol=1e-6)


def moe(directory: Path, joined: bool) -> dict[str, Any]:
    """One layer of Qwen3's experts, stored one by one or stacked."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "vocab_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "intermediate_size": 12,
        "norm_topk_prob": True,
    }
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (20, 16),
        "lm_head.weight": (20, 16),
        "model.norm.weight": (16,),
    }
    shapes |= {f"{layer}self_attn.{k}_proj.weight": (16, 16) for k in "qkvo"} | {
        f"{layer}self_attn.{k}_norm.weight": (8,) for k in "qk"
    }
    shapes |= {f"{layer}{k}_layernorm.weight": (16,) for k in ("input", "post_attention")} | {f"{layer}mlp.gate.weight": (3, 16)}
    if joined:
        shapes |= {f"{layer}mlp.experts.gate_up_proj": (3, 24, 16), f"{layer}mlp.experts.down_proj": (3, 16, 12)}
    else:
        one = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
        shapes |= {f"{layer}mlp.experts.{e}.{k}.weight": s for e in range(3) for k, s in one.items()}
    return adapters.checkpoint(directory, config, shapes)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("flipped", [False, True])
def test_experts_that_are_one_parameter(tmp_path: Path, joined: bool, flipped: bool) -> None:
    """target_parameters: transformers has the experts stacked, many releases do not; older versions of PEFT take the first
    axis of each for its inputs."""
    base, module, r = moe(tmp_path / "m", joined), "model.layers.0.mlp.experts", 2
    lora, want = {}, {}
    for part, key, (out, n) in (("gate_up_proj", f"{module}.base_layer", (24, 16)), ("down_proj", module, (16, 12))):
        wide, high = (out, n) if flipped else (n, out)
        a, b = random(3 * r, wide, seed=1), random(high, 3 * r, seed=2)
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        delta = 4 * np.einsum("ore,eri->eoi", b.reshape(high, r, 3).astype(np.float64), a.reshape(3, r, wide))
        want[part] = delta.swapaxes(1, 2) if flipped else delta
    a = save(tmp_path / "a", lora, r=r, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    if joined:
        changed = {f"{module}.{k}": base[f"{module}.{k}"] + d for k, d in want.items()}
    else:
        gate_up = np.split(want["gate_up_proj"], 2, axis=1)
        parts = {"gate_proj": gate_up[0], "up_proj": gate_up[1], "down_proj": want["down_proj"]}
        names = {f"{module}.{e}.{k}.weight": d[e] for k, d in parts.items() for e in range(3)}
        changed = {n: base[n] + d for n, d in names.items()}
    check(read(tmp_path / "m", a), base, **changed)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model._orig_mod.", "module.base_model.model."])
def test_prefixes_and_adapter_names(tmp_path: Path, prefix: str) -> None:
    base = llama(tmp_path / "m")
    lora = low_rank(Q, HIDDEN, HIDDEN)
    named = {k.replace(".weight", ".default.weight"): v for k, v in lora.items()}
    for i, tensors in enumerate((lora, named)):
        have = read(tmp_path / "m", save(tmp_path / str(i), tensors, prefix))
        check(have, base, **{f"{Q}.weight": base[f"{Q}.weight"] + 2 * product(lora, Q)})


def test_any_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    lora = low_rank(UP, INTER, HIDDEN) | {f"{UP}.lora_magnitude_vector": np.abs(random(INTER))}
    with formats.merged(formats.open_path(tmp_path / "m"), save(tmp_path / "a", lora, use_dora=True)) as source:
        name = f"{UP}.weight"
        whole = source.read(name).decode()
        plain = Weight.of(name, whole.shape)
        assert (decoded(read_rows(source, plain, 5, 17)) == whole[5:17]).all()
        order = np.random.default_rng(0).permutation(INTER)
        mixed = Weight(name, whole.shape, plain.pieces, order)
        assert (decoded(read_rows(source, mixed, 3, 20)) == whole[order[3:20]]).all()
        source.release(name)
        assert (source.read(name).decode() == whole).all()


def test_a_gguf_file_becomes_what_its_checkpoint_becomes(tmp_path: Path) -> None:
    """q and k have their rows in another order there."""
    llama(tmp_path / "m", tie_word_embeddings=True)
    tokenizer(tmp_path / "m")
    lora = low_rank(Q, HIDDEN, HIDDEN) | _E | {f"{Q}.lora_magnitude_vector": np.abs(random(HIDDEN)) + 1}
    lora |= {f"{EMBED}.lora_magnitude_vector": np.abs(random(HIDDEN)) + 1, "model.norm.weight": random(HIDDEN)}
    a = save(tmp_path / "a", lora, use_dora=True)
    qf.convert(tmp_path / "m", tmp_path / "base.gguf", "F32")
    qf.convert(tmp_path / "m", tmp_path / "want.gguf", "F32", lora=a)
    qf.convert(tmp_path / "base.gguf", tmp_path / "have.gguf", "F32", lora=[a])
    want, have = read(tmp_path / "want.gguf"), read(tmp_path / "have.gguf")
    assert want.keys() == have.keys() and "output.weight" in want
    assert all((want[n] == have[n]).all() for n in want)


def tokenizer(directory: Path) -> None:
    """One of as many tokens as the model has."""
    vocab = {chr(33 + i): i for i in range(VOCAB - 1)} | {"AB": VOCAB - 1}
    model = {"type": "BPE", "vocab": vocab, "merges": [["A", "B"]]}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (directory / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": split, "model": model})
    )


def test_quantized_bases_are_decoded_and_want_the_flag(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    tokenizer(tmp_path / "m")
    lora = low_rank(Q, HIDDEN, HIDDEN)
    a = save(tmp_path / "a", lora)
    qf.convert(tmp_path / "m", tmp_path / "q.gguf", "Q4_0")
    with pytest.raises(RecipeError, match=r"already quantized \(Q4_0 \+ adapter\).*--allow-requantize"):
        qf.convert(tmp_path / "q.gguf", tmp_path / "o.gguf", "Q4_0", lora=a)
    qf.convert(tmp_path / "q.gguf", tmp_path / "o.gguf", "Q4_0", lora=a, allow_requantize=True)
    report = qf.convert(tmp_path / "q.gguf", tmp_path / "o", lora=a)
    assert {t.type for t in report.tensors if t.name == f"{Q}.weight"} == {"BF16"}
    base = read(tmp_path / "q.gguf")["blk.0.attn_q.weight"]
    with formats.merged(formats.open_path(tmp_path / "q.gguf"), a) as source:
        have = source.read("blk.0.attn_q.weight").decode()
    rows = np.arange(HIDDEN).reshape(4, 2, 4).swapaxes(1, 2).reshape(-1)
    np.testing.assert_allclose(have, base + (2 * product(lora, Q))[rows], atol=1e-6)


def test_the_adapters_tokenizer_is_the_models(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    tokenizer(tmp_path / "m")
    a = save(tmp_path / "a", low_rank(Q, HIDDEN, HIDDEN))
    with formats.merged(formats.open_path(tmp_path / "m"), a) as source:
        assert source.tokenizer_directory == tmp_path / "m"
    (a / "tokenizer.json").write_text((tmp_path / "m" / "tokenizer.json").read_text().replace('"!": 0', '"\\u0120": 0'))
    (a / "chat_template.jinja").write_text("theirs")
    qf.convert(tmp_path / "m", tmp_path / "o.gguf", "F32", lora=a)
    qf.convert(tmp_path / "m", tmp_path / "o", "F32", format="safetensors", lora=a)
    with qf.open(tmp_path / "o.gguf") as source:
        assert source.config["tokenizer.ggml.tokens"][0] == "Ġ"
        assert source.config["tokenizer.chat_template"] == "theirs"
    assert (tmp_path / "o" / "tokenizer.json").read_text() == (a / "tokenizer.json").read_text()
    assert not (tmp_path / "o" / "adapter_config.json").exists()


SMALL = low_rank(Q, HIDDEN, HIDDEN)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[QuantForgeError], str]] = {
    "another method": (SMALL, {"peft_type": "IA3"}, UnsupportedError, "peft_type 'IA3'.*LoRA and DoRA"),
    "a variant": (SMALL, {"use_qalora": True}, UnsupportedError, "use_qalora"),
    "a changed base": (SMALL, {"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa.*path_initial_model"),
    "aLoRA": (SMALL, {"alora_invocation_tokens": [1, 2]}, UnsupportedError, "cannot be merged.*--base"),
    "another architecture": (
        SMALL,
        {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
        UnsupportedError,
        "Qwen2ForCausalLM.*LlamaForCausalLM",
    ),
    "another size": (low_rank(Q, 2 * HIDDEN, 2 * HIDDEN), {}, ShapeError, r"q_proj.*\[4, 64\].*\[32, 32\].*org/base"),
    "inputs for outputs": (low_rank(UP, HIDDEN, INTER), {}, ShapeError, "up_proj.*do not fit"),
    "another rank": (SMALL, {"r": 8}, ShapeError, "of rank 8"),
    "names that are not there": (
        low_rank("model.layers.7.mlp.up_proj", INTER, HIDDEN),
        {},
        ShapeError,
        "layers.7.*which the model has not.*org/base",
    ),
    "a shape": ({"model.norm.weight": random(5)}, {}, ShapeError, r"model.norm.weight is \[5\].*\[32\]"),
    "one half": ({k: v for k, v in SMALL.items() if "lora_A" in k}, {}, FormatError, "only one is there"),
    "no magnitudes": (SMALL, {"use_dora": True}, FormatError, "lacks its lora_magnitude_vector"),
    "magnitudes of what is not DoRA": (
        SMALL | {f"{Q}.lora_magnitude_vector": random(HIDDEN)},
        {},
        FormatError,
        "use_dora is False",
    ),
    "unknown parts": (SMALL | {f"{Q}.lora_diag.weight": random(4)}, {}, UnsupportedError, "lora_diag"),
    "bad patterns": (SMALL, {"rank_pattern": {"(": 3}}, FormatError, "rank_pattern"),
    "no number": (SMALL, {"lora_alpha": "8"}, FormatError, "lora_alpha"),
    "tokens beyond the end": (
        {f"{EMBED}.token_adapter.trainable_tokens_delta": NEW[:1]},
        {"trainable_token_indices": [VOCAB]},
        ShapeError,
        "does not fit",
    ),
    "nothing": ({}, {}, FormatError, "no change|empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_named(tmp_path: Path, kind: str) -> None:
    tensors, config, error, message = REFUSED[kind]
    llama(tmp_path / "m")
    a = save(tmp_path / "adapter", tensors, **config)
    with pytest.raises(error, match=message) as e:
        read(tmp_path / "m", a)
    assert str(a) in str(e.value) and "\n" not in str(e.value)


def test_the_base_that_an_adapter_names(tmp_path: Path) -> None:
    """Shapes and names may fit a model of another architecture."""
    llama(tmp_path / "m")
    llama(tmp_path / "other", architectures=["Qwen2ForCausalLM"])
    a = save(tmp_path / "a", SMALL, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(
        UnsupportedError, match=rf"an adapter of a Qwen2ForCausalLM \({tmp_path}/other\); {tmp_path}/m is a Llama"
    ):
        read(tmp_path / "m", a)


def test_scales_that_have_no_meaning(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    dora = save(tmp_path / "a", SMALL | {f"{Q}.lora_magnitude_vector": random(HIDDEN)}, use_dora=True)
    with pytest.raises(UnsupportedError, match=r"DoRA .*0\.5"):
        read(tmp_path / "m", f"{dora}:0.5")
    with pytest.raises(RecipeError, match="a scale of nan"):
        read(tmp_path / "m", f"{dora}:nan")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    llama(tmp_path / "m")
    tensors = {k: v.copy() for k, v in SMALL.items()}
    tensors[f"{Q}.lora_A.weight"][1, 2] = np.nan
    a = save(tmp_path / "a", tensors)
    with pytest.raises(NonFiniteError, match=rf"{a}: .*lora_A.weight: number \[1, 2\] is nan"):
        read(tmp_path / "m", a)


@pytest.mark.parametrize("what", ["missing", "model", "pickle"])
def test_what_is_no_adapter(tmp_path: Path, what: str) -> None:
    llama(tmp_path / "m")
    given = {"missing": tmp_path / "nix", "model": tmp_path / "m"}.get(what)
    if given is None:
        given = save(tmp_path / "a", SMALL)
        (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    with pytest.raises(FormatError, match={"missing": "no such directory", "model": "not an adapter", "pickle": "pickle"}[what]):
        read(tmp_path / "m", given)


def test_other_libraries_read_the_model_alone(tmp_path: Path) -> None:
    from quantforge.conversion.library import decide_with
    from quantforge.conversion.options import Options

    class Fitting:
        def check(self, device: str) -> None: ...

    llama(tmp_path / "m")
    with (
        formats.merged(formats.open_path(tmp_path / "m"), save(tmp_path / "a", SMALL)) as source,
        pytest.raises(UnsupportedError, match="--backend reads MODEL itself"),
    ):
        decide_with(Fitting(), source, Options(out="o"))  # type: ignore[arg-type]


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "LlamaForCausalLM",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {r"layers\.1\..*": 3},
        },
    ),
    "dora": ("LlamaForCausalLM", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_dora": True}),
    "trained": ("LlamaForCausalLM", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "conv1d": ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": (
        "Qwen3MoeForCausalLM",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_makes_the_same(tmp_path: Path, kind: str) -> None:
    """merge_and_unload, tensor by tensor."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    import torch
    import transformers

    from tests.archs import models

    name, settings = PEFT[kind]
    models.make(tmp_path / "m", name)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = peft.get_peft_model(load(tmp_path / "m"), peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for key, p in model.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            p.data = p.data * 1.1 + torch.randn_like(p) * 0.05
    model.save_pretrained(tmp_path / "a")
    peft.PeftModel.from_pretrained(load(tmp_path / "m"), tmp_path / "a").merge_and_unload().save_pretrained(tmp_path / "want")
    want, have = load_file(tmp_path / "want" / "model.safetensors"), read(tmp_path / "m", tmp_path / "a")
    assert want.keys() == have.keys()
    for key, w in want.items():
        np.testing.assert_allclose(have[key], w, rtol=0, atol=1e-6 * np.abs(w).max(), err_msg=key)
