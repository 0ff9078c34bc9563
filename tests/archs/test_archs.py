"""Names, shapes, transforms and metadata of every architecture, and what is said about checkpoints that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantforge import archs
from quantforge.errors import QuantForgeError, ShapeError, UnsupportedError
from tests.checkpoints import TEXT

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
DENSE = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
"""What is said below of one config is said of these; every architecture is proven by its logits in test_logits.py."""


def config(name: str = "LlamaForCausalLM", **changes):
    return CONFIG | {"architectures": [name]} | changes


def tensors(c) -> dict[str, tuple[int, ...]]:
    """What transformers would save for this config."""
    head = c.get("head_dim") or (128 if "Qwen3" in c["architectures"][0] else c["hidden_size"] // c["num_attention_heads"])
    q, kv, d, ff = c["num_attention_heads"] * head, c["num_key_value_heads"] * head, c["hidden_size"], c["intermediate_size"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    if not c.get("tie_word_embeddings"):
        found["lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        if "Qwen3" in c["architectures"][0]:
            layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        found |= {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
        biased = [n for n in "qkv" if "Qwen2" in c["architectures"][0] or c.get("attention_bias")]
        biased += ["o"] if c.get("attention_bias") else []
        found |= {f"model.layers.{i}.self_attn.{n}_proj.bias": layer[f"self_attn.{n}_proj"][:1] for n in biased}
    return found


def weights(c, t=None):
    return archs.find(c).weights(c, tensors(c) if t is None else t)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_mapped_once_in_order(name, tied):
    c = config(name, tie_word_embeddings=tied)
    found = weights(c)
    t = tensors(c)
    assert [w.sources[0] for w in found] == list(t)
    assert all(w.shape == t[w.sources[0]] and len(w.sources) == 1 and w.constant is None for w in found)
    names = [w.name for w in found]
    assert len(set(names)) == len(names)
    assert ("output.weight" in names) is not tied
    arch = archs.find(c)
    assert {w.role for w in found} | ({"output"} if tied else set()) == set(arch.tensors)
    assert {w.layer for w in found} == {None, 0, 1}


def test_shipped_model_has_the_names_that_llama_cpp_wrote():
    directory = TEXT.parents[1] / "demo-model"
    c = json.loads((directory / "config.json").read_text())
    theirs = json.loads((directory / "llama.cpp.json").read_text())["presets"]["Q4_0"]["plain"]
    assert {w.name for w in weights(c, tensors(c)) if len(w.shape) == 2} == set(theirs)


def permuted_as_llama_cpp_does(w, heads):
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_rope_permutation_and_its_inverse(name):
    c = config(name, head_dim=8, attention_bias=name.startswith("Llama"))
    rng = np.random.default_rng(0)
    seen = 0
    for w in weights(c):
        if w.role not in ("attn_q", "attn_k"):
            assert w.plain
            continue
        value = rng.standard_normal(w.shape).astype(np.float32)
        heads = 4 if w.role == "attn_q" else 2
        np.testing.assert_array_equal(value[w.pieces[0].rows], permuted_as_llama_cpp_does(value, heads))
        seen += 1
    assert seen == (8 if c["attention_bias"] else 4)


GENERATIONS = [
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    (
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ),
    ({"rope_scaling": None, "head_dim": None}, {"rope_parameters": None}),
]


@pytest.mark.parametrize(("old", "new"), GENERATIONS, ids=range(len(GENERATIONS)))
def test_both_config_generations_say_the_same(old, new):
    old, new = config(torch_dtype="bfloat16", **old), config(dtype="bfloat16", rope_theta=None, **new)
    arch = archs.find(old)
    assert arch.metadata(old) == arch.metadata(new)
    for a, b in zip(weights(old), weights(new), strict=True):
        assert a.name == b.name
        np.testing.assert_array_equal(a.constant, b.constant)


_PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
_BY_KIND = {"full_attention": _PLAIN, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("name", "parameters", "scaling", "theta"),
    [
        ("LlamaForCausalLM", _PLAIN, _YARN, 7000.0),
        ("LlamaForCausalLM", _PLAIN, _YARN, None),
        ("Qwen3ForCausalLM", _PLAIN, {"type": "linear", "factor": 2.0}, None),
        ("Qwen2ForCausalLM", _PLAIN, {**_YARN, "rope_theta": 900.0}, 7000.0),
        ("GPTNeoXForCausalLM", _PLAIN, {"type": "linear", "factor": 2.0}, None),
        ("Gemma3ForCausalLM", _BY_KIND, {"rope_type": "linear", "factor": 2.0}, 7000.0),
        ("Olmo3ForCausalLM", _BY_KIND, _YARN, None),
    ],
)
def test_rope_said_twice_means_what_transformers_makes_of_it(name, parameters, scaling, theta):
    import transformers

    said = {"rope_parameters": parameters, "rope_scaling": scaling} | ({} if theta is None else {"rope_theta": theta})
    c = {k: v for k, v in config(name).items() if k != "rope_theta"} | said
    theirs = getattr(transformers, name).config_class(**json.loads(json.dumps(c))).rope_parameters
    theirs = theirs.get("full_attention", theirs)
    ours = archs.find(c).hyperparameters(c)["rope"]
    keys = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
    assert {k: ours.get(k) for k in keys} == {k: theirs.get(k) for k in keys}


def test_rope_around_a_text_config_is_not_the_texts():
    c = {"architectures": ["LlamaForCausalLM"], "text_config": {**CONFIG, "rope_parameters": _PLAIN}, "rope_scaling": _YARN}
    assert archs.find(c).hyperparameters(c)["rope"]["rope_type"] == "default"


def test_llama3_scaling_divides_as_transformers_does():
    import torch
    import transformers

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    c = config(rope_parameters=rope, head_dim=128)
    (freqs, *_) = weights(c)
    assert (freqs.name, freqs.shape, freqs.sources) == ("rope_freqs.weight", (64,), ())
    assert freqs.constant.dtype == np.float32
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(**{k: v for k, v in c.items() if k != "rope_theta"}), "cpu"
    )[0]
    plain = 1.0 / (5e5 ** (torch.arange(0, 128, 2) / 128))
    np.testing.assert_allclose(freqs.constant, (plain / theirs).numpy(), rtol=1e-5)
    assert freqs.constant[0] == 1 and freqs.constant[-1] == 32 and 1 < freqs.constant[32] < 32


def test_metadata_is_what_llama_cpp_writes():
    c = config(
        head_dim=8,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1000000, "factor": 4, "original_max_position_embeddings": 16},
    )
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 1, "do_sample": True, "eos_token_id": [1, 2]}
    found = archs.find(c).metadata(c, generation | {"repetition_penalty": 1.05})
    assert found == {
        "general.architecture": "llama",
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 1.0,
        "general.sampling.temp": 0.6,
        "general.sampling.penalty_repeat": 1.05,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
        "llama.rope.freq_base": 1000000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.vocab_size": 40,
        "llama.rope.dimension_count": 8,
    }
    floats = {k for k, v in found.items() if isinstance(v, float)}
    assert {"llama.rope.freq_base", "llama.rope.scaling.factor", "general.sampling.top_p"} <= floats
    assert type(found["general.sampling.top_k"]) is np.int32


@pytest.mark.parametrize(
    ("name", "absent", "key", "value"),
    [
        ("LlamaForCausalLM", "num_key_value_heads", "llama.attention.head_count_kv", 4),
        ("LlamaForCausalLM", "max_position_embeddings", "llama.context_length", 2048),
        ("LlamaForCausalLM", "rms_norm_eps", "llama.attention.layer_norm_rms_epsilon", 1e-6),
        ("LlamaForCausalLM", "rope_theta", "llama.rope.freq_base", 10000.0),
        ("Qwen3ForCausalLM", "head_dim", "qwen3.attention.key_length", 128),
        ("Qwen2ForCausalLM", "max_position_embeddings", "qwen2.context_length", 32768),
        ("MistralForCausalLM", "max_position_embeddings", "llama.context_length", 131072),
    ],
)
def test_absent_keys_mean_what_transformers_makes_of_them(name, absent, key, value):
    c = config(name)
    c.pop(absent, None)
    assert archs.find(c).metadata(c)[key] == value


@pytest.mark.parametrize(
    "absent", ["head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters"]
)
@pytest.mark.parametrize("kind", ["Voxtral", "Mistral3"])
def test_a_text_part_has_the_defaults_of_its_model(kind, absent):
    import transformers

    cls = getattr(transformers, f"{kind}Config")
    text = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {"num_attention_heads": 8, "hidden_size": 64, "head_dim": 8}
    del (text := text | {"model_type": "llama" if kind == "Voxtral" else "mistral", "rope_parameters": _PLAIN})[absent]
    c = {"text_config": text, "architectures": [f"{kind}ForConditionalGeneration"]}
    full = cls(**json.loads(json.dumps(c))).to_dict()
    arch = archs.find(c)
    assert arch.metadata(c) == arch.metadata({**c, "text_config": full["text_config"]})


def test_qwen2_has_head_sizes_only_if_the_config_states_them():
    assert "qwen2.attention.key_length" not in archs.find(c := config("Qwen2ForCausalLM")).metadata(c)
    assert archs.find(c).metadata(c | {"head_dim": 8})["qwen2.attention.key_length"] == 8


def test_nested_text_config():
    c = {"architectures": ["LlamaForCausalLM"], "text_config": CONFIG, "vocab_size": 7}
    assert archs.find(c).metadata(c)["llama.vocab_size"] == 40


def test_without_architectures_the_model_type_says_what_it_is():
    import transformers

    for name, arch in archs.supported().items():
        if (cls := getattr(transformers, name, None)) is not None and (name == arch.hf[0] and not name.endswith("Model")):
            kind = cls.config_class.model_type
            assert archs.known({"model_type": kind}) in (arch, None), name
            assert archs.known({"model_type": kind, "architectures": None}) in (arch, None), name
    c = {k: v for k, v in config().items() if k != "architectures"} | {"model_type": "llama"}
    for named in ({}, {"architectures": []}):
        assert archs.find(c | named) is archs.supported()["LlamaForCausalLM"]
    assert archs.known({"model_type": "llama", "architectures": ["MyOwnForCausalLM"]}) is None


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "Qwen2ForTokenClassification", "LlamaForRewardModel"])
def test_classifiers_are_named(name):
    with pytest.raises(UnsupportedError, match=f"{name}: a model that rates texts"):
        archs.find(config(name, model_type="llama"))


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_wrappers_inside_of_names(wrapper):
    c = config()
    t = {n.replace(".self_attn.", f".{wrapper}self_attn.").replace("model.layers.1.", f"model.layers.1.{wrapper}"): s
         for n, s in tensors(c).items()}  # fmt: skip
    assert [w.name for w in weights(c, t)] == [w.name for w in weights(c)]


def test_names_of_meta_are_named():
    t = tensors(config()) | {"layers.0.attention.wq.weight": (16, 16)}
    with pytest.raises(ShapeError, match=r"layers\.0\.attention\.wq\.weight: the names that Meta and Mistral use"):
        weights(config(), t)


def test_heads_that_rate_texts_are_left_out(caplog):
    c = config()
    t = tensors(c) | {"v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,)}
    assert [w.name for w in weights(c, t)] == [w.name for w in weights(c)]
    assert "v_head.summary.weight" in caplog.text


def test_find_lists_what_there_is():
    with pytest.raises(UnsupportedError, match=r"Qwen4ForCausalLM is not supported \(did you mean Qwen3ForCausalLM"):
        archs.find({"architectures": ["Qwen4ForCausalLM"]})
    with pytest.raises(UnsupportedError, match=r"no config\.json beside the weights"):
        archs.find({})
    for c in ({"architectures": None}, {"architectures": []}, {"architectures": "LlamaForCausalLM"}):
        with pytest.raises(UnsupportedError, match=r"supported: .*LlamaForCausalLM"):
            archs.find(c)


def without(*names):
    return lambda t: [t.pop(n) for n in names]


def having(name, shape):
    return lambda t: t.update({name: shape})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.norm.weight"), r"lacks .*model\.norm\.weight"),
        (without("lm_head.weight"), r"lacks .*lm_head\.weight"),
        (without("model.layers.1.mlp.up_proj.weight"), r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"),
        (having("model.layers.0.extra.weight", (3,)), r"has not: model\.layers\.0\.extra\.weight"),
        (having("model.layers.2.mlp.up_proj.weight", (24, 16)), r"has not: model\.layers\.2"),
        (having("model.layers.0.self_attn.q_proj.bias", (16,)), r"has not: .*q_proj\.bias"),
        (having("model.norm.weight", (15,)), r"model\.norm\.weight: shape \[15\], but config\.json makes it \[16\]"),
        (having("model.layers.0.self_attn.k_proj.weight", (16, 16)), r"k_proj.weight: shape \[16, 16\].*\[8, 16\]"),
        (having("output.weight", (40, 16)), r"has not: output\.weight"),
        (having("layers.0.attention.wq.weight", (16, 16)), "names that Meta and Mistral use"),
        (having("model.layers.0.attention.wq.weight", (16, 16)), "names that Meta and Mistral use"),
    ],
)
def test_checkpoints_that_do_not_fit_their_config(change, said):
    t = tensors(config())
    change(t)
    with pytest.raises(ShapeError, match=said) as e:
        weights(config(), t)
    assert "\n" not in str(e.value)


def test_buffers_and_tied_copies_are_left_out():
    c = config(tie_word_embeddings=True)
    t = tensors(c)
    extra = {"lm_head.weight": (40, 16), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,), "model.rotary_emb.inv_freq": (2,)}
    assert [w.name for w in weights(c, extra | t)] == [w.name for w in weights(c, t)]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "16"},
        {"hidden_size": 16.0},
        {"hidden_size": True},
        {"hidden_size": 15},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2**40},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": -4},
        {"num_key_value_heads": 3},
        {"head_dim": 3},
        {"rms_norm_eps": "small"},
        {"max_position_embeddings": 0},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        {"rope_theta": "10000"},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_configs_that_cannot_be(change):
    c = config(**change)

    def plan():
        return weights(c, tensors(config())), archs.find(c).metadata(c)

    with pytest.raises(QuantForgeError) as e:
        plan()
    assert "config.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Qwen3ForCausalLM", {"attention_bias": True}),
        ("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("MistralForCausalLM", {"hidden_act": "gelu"}),
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}),
        ("Qwen3ForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 2.0}}),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 224, "head_dim": 256}),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 256, "final_logit_softcapping": None}),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(name, change):
    c = config(name, **change)
    with pytest.raises(UnsupportedError, match=r"config\.json.*llama\.cpp runs"):
        archs.find(c).hyperparameters(c)


def test_sampling_values_of_the_wrong_type():
    with pytest.raises(UnsupportedError, match=r"generation_config\.json: top_k"):
        archs.find(c := config()).metadata(c, {"top_k": "many"})


def test_epsilons_that_one_key_cannot_say(caplog):
    h = config("FalconMambaForCausalLM", intermediate_size=32, state_size=16, conv_kernel=4, layer_norm_epsilon=1e-5)
    arch = archs.find(h)
    arch.metadata(h | {"mixer_rms_eps": 1e-5})
    assert not caplog.text
    arch.metadata(h | {"mixer_rms_eps": 1e-6})  # as released
    assert "takes the first for both" in caplog.text
    with pytest.raises(UnsupportedError, match="mixer_rms_eps"):
        arch.metadata(h | {"mixer_rms_eps": 1e-3})
