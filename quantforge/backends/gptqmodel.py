"""GPTQModel: GPTQ (v1 where symmetric, else v2) or AWQ (gemm)."""

from __future__ import annotations

from .worker import BATCH, Backend, Job, examples, given


def quantize(job: Job) -> None:
    """See `Backend.quantize`."""
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


BACKEND = Backend(
    name="gptqmodel",
    package="gptqmodel",
    module="gptqmodel",
    works="gptqmodel 7.6.0 with transformers 5.22.2 and numpy 2.2.6",
    methods={"gptq": ("gptq",), "awq": ("awq",)},
    gptq_options=frozenset({"act_order", "static_groups", "damping"}),
    quantize=quantize,
)
