"""Models of many kinds, a block at a time, beside transformers' plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quantforge as qf
from quantforge.runtime import Model, advance, finish
from tests import checkpoints
from tests.archs.models import USUAL

pytestmark = pytest.mark.usefixtures("one_thread")

MOE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GptOssForCausalLM": {
        "head_dim": 16, "sliding_window": 8, **MOE, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "GraniteMoeHybridForCausalLM": {
        **MOE, "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2,
        "mamba_n_groups": 1, "mamba_d_state": 16, "shared_intermediate_size": 48,
    },
    "Qwen3NextForCausalLM": {
        **MOE, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32,
    },
    "MixtralForCausalLM": MOE,
    "Gemma3nForCausalLM": {
        "head_dim": 16, "num_hidden_layers": 4, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 96,
    },
    "MambaForCausalLM": {"state_size": 8},
    "DeepseekV3ForCausalLM": {
        **MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "Llama4ForCausalLM": {**MOE, "head_dim": 16, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_at_a_time_give_the_same_logits(kind: str, tmp_path: Path) -> None:
    cls = getattr(transformers, kind)
    torch.manual_seed(3)
    cls(cls.config_class(**USUAL | KINDS[kind])).save_pretrained(tmp_path)
    checkpoints.byte_level(tmp_path, 300)
    whole = cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(2, 300, (70, 40), generator=torch.Generator().manual_seed(0))  # two batches
    with qf.open(tmp_path) as source, torch.inference_mode():
        ours = Model(source, kind)
        assert ours.shape()["layers"] == len(ours.layers)
        (states,) = finish([ours], advance([ours], ids), torch.ones_like(ids, dtype=torch.bool))
        with ours.head() as head:
            head.take(slice(0, head.vocabulary))
            got = head(states)
        want = whole(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 * float(want.abs().max()))
