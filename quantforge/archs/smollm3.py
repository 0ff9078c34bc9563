"""SmolLM3: Llama of which every fourth layer has no rotary embedding."""

from .base import Arch
from .decoder import DECODER, DECODER_SCALE_GROUPS
from .keys import PAIRED_METADATA
from .llama import PAIRED
from .tensors import Config


def _no_rope_layers(h: Config) -> list[int]:
    """1 for layers with rotary embedding, as the graph has them: every fourth has none."""
    return [int((i + 1) % 4 != 0) for i in range(h["num_hidden_layers"])]


ARCH = Arch(
    hf=("SmolLM3ForCausalLM",),
    name="smollm3",
    tensors=DECODER | PAIRED,
    scale_groups=DECODER_SCALE_GROUPS,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "pad_token_id": None,  # transformers' own default is a row that only the released vocabulary has
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    metadata_keys=PAIRED_METADATA,
    implied={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        # a period beside a list is nothing to transformers
        "no_rope_layer_interval": lambda h: h.get("no_rope_layer_interval", 4) if h.get("no_rope_layers") else 4,
        "no_rope_layers": _no_rope_layers,
    },
    samples={
        "": {"head_dim": 32, "num_hidden_layers": 9},
        "tied": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5000.0,
            },
        },
    },
)
