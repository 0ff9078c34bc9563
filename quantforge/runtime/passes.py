"""What models are run for: hidden states of several side by side, a block at a time; answers; embeddings of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..arrays import F32
from .model import Model

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
"""Tokens that go through a block together: enough for full speed, few enough for small activations."""

Observer = Callable[[int, Sequence[nn.Module], Sequence[torch.Tensor]], None]


@torch.inference_mode()
def advance(
    models: Sequence[Model],
    ids: torch.Tensor,
    *,
    before: Observer | None = None,
    after: Observer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Take windows of tokens through all blocks of all models, block by block.

    ids: int[windows, ctx]. Returns hidden states in front of the final norm, [windows, ctx, hidden] each.
    before, after: called with (block index, blocks, hidden states) around every block that all models have;
    progress: (blocks done, of). Raises NonFiniteError naming the layer.
    """
    device = models[0].device
    ids = ids.to(device)
    batch = max(1, TOKENS_AT_ONCE[device.type] // ids.shape[1])
    hidden = [m.enter(ids, batch) for m in models]
    depth = max(len(m.layers) for m in models)
    for i in range(depth):
        at = [k for k, m in enumerate(models) if i < len(m.layers)]
        shared = len(at) == len(models)
        blocks = []
        for k in at:
            m = models[k]
            m.load(m.layers[i], f"{m.prefix}.{i}")
            blocks.append(m.layers[i])
        if before and shared:
            before(i, blocks, hidden)
        for k, block in zip(at, blocks, strict=True):
            models[k].run_block(i, block, hidden[k], batch)
        if after and shared:
            after(i, blocks, hidden)
        for block in blocks:
            Model.unload(block)
        if progress:
            progress(i + 1, depth)
    return hidden


@torch.inference_mode()
def finish(models: Sequence[Model], hidden: list[torch.Tensor], chosen: torch.Tensor) -> list[torch.Tensor]:
    """What heads see at chosen positions (bool[windows, ctx]): [chosen, hidden] each, in the memory of `hidden`."""
    chosen = chosen.to(hidden[0].device)
    batch = max(1, TOKENS_AT_ONCE[chosen.device.type] // chosen.shape[1])
    return [m.finish(h, chosen, batch) for m, h in zip(models, hidden, strict=True)]


@torch.inference_mode()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], tokens: int, eos: Sequence[int], memory: int | None = None
) -> list[list[int]]:
    """Greedy answers to prompts (token ids), up to `tokens` each, cut in front of an end-of-sequence token.

    memory: bytes for weights and the KV cache; default: as `Model.resident`, all prompts at once.
    """
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: answers start at one column
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    cache = (width + tokens) * model.shape()["kv_bytes_per_token"] // 2 * model.dtype.itemsize
    at_once = len(prompts) if memory is None else max(1, memory // 4 // cache)
    answers: list[list[int]] = []
    with model.resident(None if memory is None else memory - memory // 4) as module:
        for some, shown in zip(torch.split(ids, at_once), torch.split(mask, at_once), strict=True):
            out = module.generate(  # type: ignore[operator]
                input_ids=some.to(model.device),
                attention_mask=shown.to(model.device),
                max_new_tokens=tokens,
                min_new_tokens=None,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(eos) or None,
                pad_token_id=eos[0] if eos else 0,
                use_cache=True,
            )
            answers += out[:, width:].tolist()
    ends = set(eos)
    return [a[: next((i for i, t in enumerate(a) if t in ends), len(a))] for a in answers]


@torch.inference_mode()
def embed(model: Model, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> F32:
    """Mean of the final hidden states over the tokens of each answer, read after its prompt: f32[texts, hidden]."""
    ids = torch.zeros(len(texts), max(1, *(len(p) + len(a) for p, a in texts)), dtype=torch.int64)
    answered = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):  # padded on the right: what follows a token does not change it
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        answered[row, len(prompt) : len(prompt) + len(answer)] = True
    (states,) = finish([model], advance([model], ids), answered)
    owner = answered.nonzero()[:, 0].to(states.device)
    sums = states.new_zeros(len(texts), states.shape[-1], dtype=torch.float32).index_add_(0, owner, states.float())
    return np.asarray((sums / answered.sum(1, keepdim=True).clamp_min(1).to(sums)).cpu().numpy(), np.float32)
