"""Models that hear or see, and whose text part is a Llama: that part goes to GGUF, and back as a Llama."""

import re
from dataclasses import replace

from .llama import ARCH as LLAMA

_vision = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_audio = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_mel_bins": 16,
    "max_source_positions": 64,
}

ARCH = (
    replace(
        LLAMA,
        hf=("LlavaForConditionalGeneration",),
        model_type="llava",
        told_by=lambda get: False,
        others=re.compile(r"(vision_tower|multi_modal_projector|image_newline)\b"),
        samples={"": {"head_dim": 32, "vision_config": _vision}},
    ),
    replace(
        LLAMA,
        hf=("VoxtralForConditionalGeneration",),
        model_type="voxtral",
        told_by=lambda get: False,
        defaults={
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e8,
        },
        others=re.compile(r"(audio_tower|multi_modal_projector)\."),
        samples={"": {"head_dim": 32, "audio_config": _audio}},
    ),
)
