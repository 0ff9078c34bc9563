"""LLM Compressor: compressed-tensors; GPTQ, AWQ or round to nearest."""

from __future__ import annotations

from typing import Any

from .worker import Backend, Job, examples, given


def quantize(job: Job) -> None:
    """See `Backend.quantize`."""
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


BACKEND = Backend(
    name="llm-compressor",
    package="llmcompressor",
    module="llmcompressor",
    works="llmcompressor 0.14.0.1 with compressed-tensors 0.19.0 and transformers up to 5.17",
    methods={"gptq": ("compressed-tensors",), "awq": ("compressed-tensors",), "rtn": ("compressed-tensors",)},
    schemes={
        "W4A16": "W4A16",
        "W4A16_ASYM": "W4A16_ASYM",
        "W8A16": "W8A16",
        "W8A8": "W8A8",
        "FP8": "fp8-tensor",
        "FP8_DYNAMIC": "FP8_DYNAMIC",
        "FP8_BLOCK": "FP8_BLOCK",
        "NVFP4A16": "NVFP4A16",
        "NVFP4": "NVFP4A16",
        "MXFP4A16": "MXFP4A16",
        "MXFP4": "MXFP4A16",
    },
    gptq_options=frozenset({"act_order", "damping"}),
    quantize=quantize,
)
