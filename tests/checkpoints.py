"""Small random checkpoints for tests: models by transformers, tokenizers trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from quantforge import archs, tokenizer

TEXT = Path(__file__).parents[1] / "quantforge" / "data" / "text" / "calibration.txt"

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")

NASTY = (
    "Hello  world\t\ttabs\n\n\nnewlines \r\n crlf   \n   I'm you've WE'RE it's 'tis o'clock'd\n"
    "1 12 123 1234 12345 3.14 1,000,000 0x1F ½ Ⅳ ٣٤ "
    "héllo e\u0301 n\u0303 ﬁ ﬀ straße ПРИВЕТ мир γειά "
    "我想在apple工作1314151天～ 日本語のテキスト 한국어 ไทย "
    "🚀 😶‍🌫️ 👨‍👩‍👧 ✅🦙 "
    "a\u200bb\ufeffc\u00a0d\u2028e\u3000f \x00\x01\x7f "
    "------======= ''''''```\"\"\"......!!!!!!?????? {[(<>)]} @#$%^&*_+|\\/~ <|x|> </s> [INST]"
    "   trailing   "
)


def model(directory: Path, kind: str, **changes: Any) -> Path:
    """A random model with a byte-level tokenizer: kind is transformers' prefix, "Llama"."""
    import torch
    import transformers

    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    } | changes
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**settings)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases and norms start as zeros and ones: make them matter
        for name, p in made.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name else 0.0))
    made.save_pretrained(directory)
    byte_level(directory, 300)
    return directory


def byte_level(directory: Path, size: int = 700, regex: str | None = None, **parts: Any) -> Path:
    """A byte-level BPE tokenizer.json: GPT-2's pre-tokenizer or a Split by `regex`; `parts` replace top-level parts."""
    import tokenizers as t

    trained = t.Tokenizer(t.models.BPE())
    first = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is not None:
        split = t.pre_tokenizers.Split(t.Regex(regex), "isolated")
        first = t.pre_tokenizers.Sequence([split, first])
    trained.pre_tokenizer = first
    trainer = t.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT.read_text()[:100_000], NASTY * 3], trainer)
    trained.decoder = t.decoders.ByteLevel()
    trained.save(str(directory / "tokenizer.json"))
    if parts:
        content = json.loads((directory / "tokenizer.json").read_text())
        for key, value in parts.items():
            content[key] = {**content[key], **value} if key == "model" else value
        (directory / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A GGUF file by gguf-py, with values typed as archs and tokenizer state them."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    kinds |= {str: gguf.GGUFValueType.STRING, np.int32: gguf.GGUFValueType.INT32}
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, (list, np.ndarray)):
            writer.add_array(key, list(value) if isinstance(value, list) else value.tolist())
        else:
            writer.add_key_value(key, value.item() if isinstance(value, np.generic) else value, kinds[type(value)])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocab_gguf(directory: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """A GGUF file with the tokenizer of `directory` and no tensors."""
    keys = tokenizer.metadata(directory, config or {}, **options)
    return write_gguf(directory / "vocab.gguf", {"general.architecture": "llama", **keys}, {})


def gguf_f32(directory: Path, path: Path) -> Path:
    """The checkpoint as an F32 GGUF, tensor by tensor through archs."""
    config = json.loads((directory / "config.json").read_text())
    arch = archs.find(config)
    source = load_file(directory / "model.safetensors")
    tensors = {}
    for weight in arch.weights(config, {k: v.shape for k, v in source.items()}):
        if weight.constant is not None:
            tensors[weight.name] = weight.constant
            continue
        rows = [source[s].astype(np.float32).reshape(-1, *source[s].shape[-1:] * (source[s].ndim > 1)) for s in weight.sources]
        value = np.concatenate(rows)
        t = weight.transform
        value = value if t.rows is None else value[t.rows]
        value = value if t.value is None else t.value(value)
        tensors[weight.name] = np.ascontiguousarray(value.reshape(weight.shape))
    metadata = arch.metadata(config) | tokenizer.metadata(directory, config)
    return write_gguf(path, metadata, tensors)
