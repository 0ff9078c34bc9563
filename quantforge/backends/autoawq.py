"""AutoAWQ: AWQ, gemm version."""

from __future__ import annotations

from typing import Any

from .worker import Backend, Job


def quantize(job: Job) -> None:
    """See `Backend.quantize`."""
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


BACKEND = Backend(
    name="autoawq",
    package="autoawq",
    module="awq",
    works="autoawq 0.2.9 with transformers 4.51.3 to 4.56.2",
    methods={"awq": ("awq",)},
    quantize=quantize,
)
