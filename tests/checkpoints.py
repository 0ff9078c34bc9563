"""Small random checkpoints for tests: models by transformers, tokenizers trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantforge import tokenizer

TEXT = Path(__file__).parents[1] / "quantforge" / "data" / "text" / "calibration.txt"

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def isolated(*regexes: str) -> dict[str, Any]:
    """A pre-tokenizer that splits by each regex in turn and maps bytes to their alphabet."""
    splits = [{"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False} for r in regexes]
    return {"type": "Sequence", "pretokenizers": [*splits, BYTE_LEVEL]}


NASTY = (
    "Hello  world\t\ttabs\n\n\nnewlines \r\n crlf   \n   I'm you've WE'RE it's 'tis o'clock'd\n"
    "1 12 123 1234 12345 3.14 1,000,000 0x1F ½ Ⅳ ٣٤ "
    "héllo e\u0301 n\u0303 ﬁ ﬀ straße ПРИВЕТ мир γειά "
    "我想在apple工作1314151天～ 日本語のテキスト 한국어 ไทย "
    "🚀 😶‍🌫️ 👨‍👩‍👧 ✅🦙 "
    "a\u200bb\ufeffc\u00a0d\u2028e\u3000f \x00\x01\x7f "
    "------======= ''''''```\"\"\"......!!!!!!?????? {[(<>)]} @#$%^&*_+|\\/~ <|x|> </s> [INST]"
    "\ufffd\ue000\U0010ffff \u0300\u0301 \u0e33 नमस्ते مرحبا שלום "
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


def byte_level(directory: Path, size: int = 600, pre_tokenizer: dict[str, Any] | None = None, **parts: Any) -> Path:
    """A byte-level BPE tokenizer.json with GPT-2's or the given pre-tokenizer; `parts` change its top-level parts."""
    import tokenizers as t

    content = {
        "pre_tokenizer": pre_tokenizer or BYTE_LEVEL | {"use_regex": True},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    trained = t.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **content}))
    trainer = t.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT.read_text()[:20_000], NASTY * 3], trainer)
    content = json.loads(trained.to_str()) | {"decoder": BYTE_LEVEL}
    for key, value in parts.items():
        content[key] = {**content[key], **value} if key == "model" else value
    save(directory, "tokenizer.json", content)
    save(directory, "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    return directory


def save(directory: Path, name: str, content: Any) -> None:
    (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def sentencepiece(directory: Path, size: int = 600, **options: Any) -> Path:
    """A tokenizer.model trained like Llama's: BPE, byte fallback, no normalization."""
    import sentencepiece as sp

    sp.SentencePieceTrainer.Train(
        sentence_iterator=iter([*TEXT.read_text()[:20_000].splitlines(), *NASTY.replace("\0", "").splitlines() * 3]),
        model_prefix=str(directory / "tokenizer"),
        minloglevel=9,
        **{
            "vocab_size": size,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "num_threads": 1,
        }
        | options,
    )
    (directory / "tokenizer.vocab").unlink()
    return directory


def llama_json(directory: Path, size: int = 600, metaspace: str | None = None) -> Path:
    """The same kind of tokenizer as tokenizer.json alone: ▁ by normalizer (Llama 2) or by Metaspace with that scheme."""
    import tokenizers as t

    trained = t.Tokenizer(t.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace is None:
        trained.normalizer = t.normalizers.Sequence([t.normalizers.Prepend("▁"), t.normalizers.Replace(" ", "▁")])
    else:
        trained.pre_tokenizer = t.pre_tokenizers.Metaspace("▁", metaspace, split=False)
    named = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = t.trainers.BpeTrainer(
        vocab_size=size, special_tokens=named + octets, limit_alphabet=120, max_token_length=12, show_progress=False
    )
    trained.train_from_iterator([TEXT.read_text()[:20_000]], trainer)
    content = json.loads(trained.to_str())
    content["added_tokens"] = [a for a in content["added_tokens"] if a["content"] in named]
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    content["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    template = {"type_id": 0}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": template | {"id": "<s>"}}, {"Sequence": template | {"id": "A"}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    save(directory, "tokenizer.json", content)
    save(directory, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return directory


def unigram_json(directory: Path, size: int = 500, *, tidy: bool = True, symbols: tuple[str, ...] = ()) -> Path:
    """T5's kind as tokenizer.json alone, with SentencePiece's compiled normalizer; tidy: extra spaces removed."""
    import tokenizers as t

    from quantforge.tokenizer.spm_file import SentencePieceModel

    sentencepiece(directory, size, model_type="unigram", byte_fallback=False, **T5, user_defined_symbols=list(symbols))
    model = SentencePieceModel.read(directory / "tokenizer.model")
    (directory / "tokenizer.model").unlink()
    metaspace = t.pre_tokenizers.Metaspace("▁", "always")
    made = t.Tokenizer(t.models.Unigram([(piece, score) for piece, score, _ in model.pieces], 2, False))
    made.normalizer = t.normalizers.Precompiled(model.charsmap)
    made.pre_tokenizer = t.pre_tokenizers.Sequence([t.pre_tokenizers.WhitespaceSplit(), metaspace]) if tidy else metaspace
    made.decoder = t.decoders.Metaspace("▁", "always")
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.add_tokens(list(symbols))
    made.post_processor = t.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    made.save(str(directory / "tokenizer.json"))
    save(directory, "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    return directory


# Trained as T5's are.
T5 = {
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "allow_whitespace_only_pieces": False,
    "split_digits": False,
}


def wordpiece(directory: Path, size: int = 500, **normalizer: Any) -> Path:
    """BERT's kind."""
    import tokenizers as t

    made = t.Tokenizer(t.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = t.normalizers.BertNormalizer(**normalizer)
    made.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = t.trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, limit_alphabet=120, show_progress=False)
    made.train_from_iterator([TEXT.read_text()[:20_000], NASTY], trainer)
    made.decoder = t.decoders.WordPiece()
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = t.processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    made.save(str(directory / "tokenizer.json"))
    save(directory, "tokenizer_config.json", {f"{t[1:-1].lower()}_token": t for t in special})
    return directory


def gemma_json(directory: Path, size: int = 600, *, words: bool = False, bos: bool = True) -> Path:
    """Gemma's kind as tokenizer.json alone: BPE on text whose spaces are ▁; words: split at ▁ first (mmBERT)."""
    import tokenizers as t

    made = t.Tokenizer(t.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if words:
        made.pre_tokenizer = t.pre_tokenizers.Metaspace("▁", "always", split=True)
    else:
        made.normalizer = t.normalizers.Replace(" ", "▁")
        made.pre_tokenizer = t.pre_tokenizers.Split(" ", "merged_with_previous")
    named = ["<pad>", "<eos>", "<bos>", "<unk>"]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = t.trainers.BpeTrainer(
        vocab_size=size, special_tokens=named + octets, limit_alphabet=120, max_token_length=12, show_progress=False
    )
    made.train_from_iterator(TEXT.read_text()[:20_000].splitlines(), trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = [a for a in content["added_tokens"] if a["content"] in named]
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    save(directory, "tokenizer.json", content)
    save(
        directory, "tokenizer_config.json", {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"bos_token": "<bos>"} if bos else {})
    )
    return directory


def vocab_gguf(directory: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """A GGUF file, by gguf-py, with the tokenizer of `directory` and no tensors."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    writer = gguf.GGUFWriter(directory / "vocab.gguf", "llama")
    for key, value in tokenizer.metadata(directory, config or {}, **options).items():
        if isinstance(value, (list, np.ndarray)):
            octets = isinstance(value, np.ndarray) and value.dtype == np.uint8
            writer.add_array(key, value.tobytes() if octets else np.asarray(value).tolist())
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return directory / "vocab.gguf"
