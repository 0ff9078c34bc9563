"""AutoGPTQ: GPTQ, v1 layout; only with CUDA."""

from __future__ import annotations

import os

from .worker import BATCH, Backend, Job, examples, given, read, write


def quantize(job: Job) -> None:
    """See `Backend.quantize`."""
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
            settings = read(path)
            for part in (settings, settings.get("quantization_config", {})):
                part.pop("is_marlin_format", None)
            write(path, settings)


BACKEND = Backend(
    name="auto-gptq",
    package="auto-gptq",
    module="auto_gptq",
    works="auto-gptq 0.7.1 with transformers 4.47 to 4.57",
    methods={"gptq": ("gptq",)},
    gptq_options=frozenset({"act_order", "static_groups", "damping"}),
    cpu=False,
    quantize=quantize,
)
