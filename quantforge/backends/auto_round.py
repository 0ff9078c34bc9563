"""AutoRound: Signed gradient descent on the rounding, or round to nearest; GPTQ, AWQ or compressed-tensors layout."""

from __future__ import annotations

from typing import Any

from .worker import BATCH, Backend, Job


class _Tokens:
    """Stands in for a tokenizer where the library wants to save one: rows are token ids already."""

    pad_token_id = None
    pad_token = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The tokenizer's files are the checkpoint's own."""


def quantize(job: Job) -> None:
    """See `Backend.quantize`."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    layout = {"gptq": "auto_gptq", "awq": "auto_awq", "compressed-tensors": "llm_compressor"}[job["layout"]]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", trust_remote_code=False)
    rows: Any = torch.tensor(job["rows"])
    settings = {"iters": 0} if job["method"] == "rtn" else {}
    made = AutoRound(
        model,
        tokenizer=_Tokens(),
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


BACKEND = Backend(
    name="auto-round",
    package="auto-round",
    module="auto_round",
    works="auto-round 0.16.1 with transformers 5.22.2 and gptqmodel 7.6.0",
    methods={"auto-round": ("gptq", "awq", "compressed-tensors"), "rtn": ("gptq", "awq", "compressed-tensors")},
    quantize=quantize,
)
