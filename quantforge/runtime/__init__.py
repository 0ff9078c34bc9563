"""Forward passes of stored models through transformers' own modules, one decoder block at a time.

A `Model` is transformers' module with its weights on the meta device: blocks, embeddings and head
are decoded when they run and dropped afterwards. `advance` takes several models through their
blocks side by side, so that peak memory is about one block of each plus the hidden states.
No code of a model repository runs: classes come from transformers, by config.json's model_type.
"""

from .head import SLICE_BYTES, Head, rows_at_once
from .model import Model
from .passes import TOKENS_AT_ONCE, Observer, advance, embed, finish, generate
from .stored import expert_of

__all__ = [
    "SLICE_BYTES",
    "TOKENS_AT_ONCE",
    "Head",
    "Model",
    "Observer",
    "advance",
    "embed",
    "expert_of",
    "finish",
    "generate",
    "rows_at_once",
]
