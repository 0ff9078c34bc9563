"""Run by another Python: `python worker.py JOB.json` quantizes a checkpoint directory with one library.

Imports nothing of quantforge and nothing beside the library's own dependencies, and works on Python 3.8.
The job: library, model, out (directories), rows (windows of token ids), method, layout, scheme or bits,
group_size and symmetric, act_order, device, threads, result (where to say what happened, as JSON).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

if __name__ == "__main__":  # what lies beside this file must not shadow anything
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]

BATCH = 4  # windows at once


def auto_gptq(job: dict[str, Any]) -> None:
    """GPTQ, v1 layout; only with CUDA."""
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    config = BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        model_file_base_name="model",
        **given(job, act_order="desc_act", static_groups="static_groups", damping="damp_percent"),
    )
    model = AutoGPTQForCausalLM.from_pretrained(job["model"], config, torch_dtype=torch.float16)
    model.quantize(examples(job), batch_size=BATCH)
    model.save_quantized(job["out"], use_safetensors=True)
    # today's readers look for model.safetensors and refuse is_marlin_format
    for name in os.listdir(job["out"]):
        path = os.path.join(job["out"], name)
        if name.endswith(".safetensors"):
            os.rename(path, os.path.join(job["out"], "model.safetensors"))
        elif name.endswith("config.json"):
            found = read(path)
            for part in (found, found.get("quantization_config", {})):
                part.pop("is_marlin_format", None)
            write(path, found)


def autoawq(job: dict[str, Any]) -> None:
    """AWQ, gemm version."""
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    # Its search keeps the weights aside by state_dict() and .cpu(), which on a CPU copies nothing: every trial would
    # multiply the original. Clones keep it.
    search = AwqQuantizer._compute_best_scale

    def search_on_clones(self: Any, x: Any, w_mean: Any, x_mean: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        own = module.state_dict
        module.state_dict = lambda *a, **k: {name: t.clone() for name, t in own(*a, **k).items()}
        try:
            return search(self, x, w_mean, x_mean, module, *args, **kwargs)
        finally:
            del module.state_dict

    AwqQuantizer._compute_best_scale = search_on_clones
    # f16 whatever the checkpoint is in: its packed scales are f16
    model = AutoAWQForCausalLM.from_pretrained(
        job["model"], device_map=job["device"], torch_dtype=torch.float16, trust_remote_code=False
    )
    settings = {"w_bit": job["bits"], "q_group_size": job["group_size"], "zero_point": not job["symmetric"], "version": "GEMM"}
    model.quantize(
        None,
        quant_config=settings,
        calib_data=job["rows"],
        max_calib_samples=len(job["rows"]),
        max_calib_seq_len=len(job["rows"][0]),
    )
    model.save_quantized(job["out"])


def gptqmodel(job: dict[str, Any]) -> None:
    """GPTQ (v1 where symmetric, else v2) or AWQ (gemm)."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    awq = job["layout"] == "awq"
    settings = {"bits": job["bits"], "group_size": job["group_size"], "sym": job["symmetric"]}
    if awq:
        settings.update(quant_method="awq", format="gemm")
    else:
        settings["format"] = "gptq" if job["symmetric"] else "gptq_v2"
        settings.update(given(job, act_order="desc_act", static_groups="static_groups", damping="damp_percent"))
    model = GPTQModel.load(job["model"], QuantizeConfig(**settings), device=job["device"], trust_remote_code=False)
    cpu_awq = awq and job["device"] == "cpu"
    model.quantize(examples(job), batch_size=BATCH, **({"backend": BACKEND.AWQ_TORCH} if cpu_awq else {}))
    model.save(job["out"])


def llm_compressor(job: dict[str, Any]) -> None:
    """compressed-tensors; GPTQ, AWQ or round to nearest."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers import quantization
    from transformers import AutoModelForCausalLM

    if job["scheme"]:
        what = {"scheme": job["scheme"]}
    else:
        grouped = job["group_size"] != -1
        weights = {"num_bits": job["bits"], "type": "int", "symmetric": job["symmetric"]}
        weights.update({"strategy": "group", "group_size": job["group_size"]} if grouped else {"strategy": "channel"})
        what = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    what["ignore"] = ["lm_head"]
    if job["method"] == "gptq":
        what.update(given(job, damping="dampening_frac"))
        if job["act_order"] is not None:
            what["actorder"] = "static" if job["act_order"] else None
        recipe = [quantization.GPTQModifier(targets="Linear", **what)]
    else:
        recipe = [quantization.QuantizationModifier(targets="Linear", **what)]
    if job["method"] == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        recipe.insert(0, AWQModifier())
        if not torch.accelerator.is_available():  # pinned memory is for devices; asked for, it raises where there is none
            setattr(torch.Tensor, "pin_memory", lambda self, *a: self)  # noqa: B010
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", trust_remote_code=False)
    rows: Any = torch.utils.data.DataLoader([{k: torch.tensor(v) for k, v in e.items()} for e in examples(job)], batch_size=1)  # type: ignore[arg-type]
    oneshot(
        model=model, dataset=rows, recipe=recipe, num_calibration_samples=len(job["rows"]), max_seq_length=len(job["rows"][0])
    )
    model.save_pretrained(job["out"], save_compressed=True)


def auto_round(job: dict[str, Any]) -> None:
    """Signed gradient descent on the rounding, or round to nearest; GPTQ, AWQ or compressed-tensors layout."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    layout = {"gptq": "auto_gptq", "awq": "auto_awq", "compressed-tensors": "llm_compressor"}[job["layout"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", trust_remote_code=False)
    rows: Any = torch.tensor(job["rows"])
    settings = {"iters": 0} if job["method"] == "rtn" else {}
    made = AutoRound(
        model,
        tokenizer=Tokens(),
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        dataset=[{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows.split(BATCH)],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=BATCH,
        device_map=job["device"],
        **settings,
    )
    made.quantize_and_save(job["out"], format=layout)


LIBRARIES = {
    "auto-gptq": ("auto_gptq", auto_gptq),
    "autoawq": ("awq", autoawq),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "llm-compressor": ("llmcompressor", llm_compressor),
    "auto-round": ("auto_round", auto_round),
}
"""Name -> module, what to do."""


class Tokens:
    """Stands in for a tokenizer where the library wants to save one: rows are token ids already."""

    pad_token_id = None
    pad_token = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The tokenizer's files are the checkpoint's own."""


# ---- what is the same for all


def examples(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Rows as tokenizers give them."""
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]


def given(job: dict[str, Any], **names: str) -> dict[str, Any]:
    """Options that were given, under the library's names."""
    return {theirs: job[ours] for ours, theirs in names.items() if job[ours] is not None}


def read(path: str) -> Any:
    """A JSON file."""
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write(path: str, value: Any) -> None:
    """A JSON file."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)


def versions() -> dict[str, str]:
    """Versions that explain most failures."""
    from importlib import metadata

    found = {"python": sys.version.split()[0]}
    for package in ("auto-gptq", "autoawq", "gptqmodel", "llmcompressor", "auto-round", "transformers", "torch"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def old_names(path: str, transformers: str) -> None:
    """Give a configuration of transformers 5 the names that older ones know; they would take defaults, silently."""
    config = read(path)
    rope = config.get("rope_parameters")
    if int(transformers.split(".")[0]) >= 5:
        return
    if isinstance(rope, dict) and "rope_theta" not in config:
        config["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write(path, config)


def flatten(out: str) -> None:
    """Some libraries make a directory in the directory."""
    inside = [os.path.join(out, name) for name in os.listdir(out)]
    if len(inside) == 1 and os.path.isdir(inside[0]):
        for name in os.listdir(inside[0]):
            os.rename(os.path.join(inside[0], name), os.path.join(out, name))
        os.rmdir(inside[0])


def end_with_parent() -> None:
    """Whoever started this keeps stdin open; when it is gone, so is this process and what it started."""
    while sys.stdin.buffer.read(4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def last_line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def main(path: str) -> int:
    """Do the job. 0, or 1 with the error in the result file."""
    job = read(path)
    module, run = LIBRARIES[job["library"]]
    told: dict[str, Any] = {"versions": versions(), "stage": "import"}
    began = time.time()
    try:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            told["missing"] = e.name == module
            raise
        told["stage"] = "run"
        old_names(os.path.join(job["model"], "config.json"), told["versions"].get("transformers", "5"))
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(0)
        run(job)
        flatten(job["out"])
        told["stage"] = "done"
    except BaseException as e:  # libraries also exit
        traceback.print_exc()
        told["error"] = last_line(e)
    told["seconds"] = time.time() - began
    write(job["result"], told)
    return int("error" in told)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a library must not hold up a finished job
