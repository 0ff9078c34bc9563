"""EuroBERT: Llama's blocks that look both ways."""

import gguf

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS
from .keys import METADATA

_att, _rope = gguf.Keys.Attention, gguf.Keys.Rope

ARCH = Arch(
    hf=("EuroBertModel",),
    name="eurobert",
    tensors={role: t for role, t in DECODER.items() if role != "output"},
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    metadata_keys={k: v for k, v in METADATA.items() if v[0] != "head_dim"},
    computed=lambda h: {_att.CAUSAL: False, _rope.SCALING_TYPE: gguf.RopeScalingType.NONE.value},
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": lambda h: h["hidden_size"] // h["num_attention_heads"],
    },
    rope_types=frozenset({"default"}),
    pooled=True,
    samples={"": {"hidden_size": 96, "pad_token_id": 0}},
)
