"""Makes llama_quantize.json: the types that llama-quantize chooses for small models of many kinds.

    python tests/data/llama_quantize.py path/to/llama-quantize

Each model is written as a GGUF file of zeros (its matrices have two rows) and planned with
`llama-quantize --dry-run` for every preset, without and with an importance file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HERE = Path(__file__).parent
IMATRIX = HERE.parents[1] / "quantforge" / "data" / "demo-model" / "llama.cpp-imatrix.gguf"
# fmt: off
PRESETS = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q1_0", "F16", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M",
    "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS",
]
# fmt: on
NORMS = {"attn_norm": [256], "ffn_norm": [256]}
ATTENTION = {"attn_q": [2, 256], "attn_k": [2, 256], "attn_v": [2, 256], "attn_output": [2, 256]}
DENSE = {"ffn_gate": [2, 256], "ffn_up": [2, 256], "ffn_down": [2, 768]}
FUSED = {"attn_qkv": [2, 256], "attn_output": [2, 256], "ffn_up": [2, 256], "ffn_down": [2, 1024], **NORMS}


def experts(n: int) -> dict[str, list[int]]:
    """A mixture-of-experts feed-forward."""
    return {
        "ffn_gate_inp": [n, 256],
        "ffn_gate_exps": [n, 2, 256],
        "ffn_up_exps": [n, 2, 256],
        "ffn_down_exps": [n, 2, 512],
    }


def rows(n_in: int, n_ff: int) -> dict[str, list[int]]:
    """A dense block whose rows are these."""
    return {k: [2, n_ff if k == "ffn_down" else n_in] for k in (*ATTENTION, *DENSE)} | {k: [n_in] for k in NORMS}


def model(
    arch: str,
    layers: int,
    heads: int,
    kv: int | list[int],
    block: dict[str, Any],
    *,
    n: int = 256,
    tied: bool = False,
    more: Any = None,
    **keys: Any,
) -> dict[str, Any]:
    """A model: metadata, tensors outside the blocks (`more`: others), tensors of each block ([shape] or [shape, layers])."""
    outside = {"token_embd": [2, n], "output_norm": [n]} | ({} if tied else {"output": [2, n]}) | (more or {})
    metadata = {"block_count": layers, "attention.head_count": heads, "attention.head_count_kv": kv} | keys
    return {"arch": arch, "metadata": metadata, "outside": outside, "block": block}


LLAMA = ATTENTION | DENSE | NORMS
MODELS = {
    "llama, 32 layers, 4 query heads per kv head": model("llama", 32, 32, 8, LLAMA),
    "llama, 16 layers, 4 per, tied": model("llama", 16, 32, 8, LLAMA, tied=True),
    "llama, 1 layer": model("llama", 1, 8, 8, LLAMA),
    "llama, 13 layers": model("llama", 13, 8, 4, LLAMA, tied=True),
    "llama, 40 layers": model("llama", 40, 40, 40, LLAMA),
    "llama, 80 layers, 8 per: 70B": model("llama", 80, 64, 8, LLAMA),
    "llama, 80 layers, 1 per: 65B": model("llama", 80, 64, 64, LLAMA),
    "qwen2, 80 layers": model("qwen2", 80, 64, 8, LLAMA | {"attn_q.bias": [256], "attn_v.bias": [256]}),
    "qwen3, 28 layers, tied": model("qwen3", 28, 16, 8, LLAMA | {"attn_q_norm": [128], "attn_k_norm": [128]}, tied=True),
    "llama, 32 layers of 8 experts": model(
        "llama", 32, 32, 8, ATTENTION | NORMS | experts(8), expert_count=8, expert_used_count=2
    ),
    "llama, 10 layers of 4 experts": model(
        "llama", 10, 8, 4, ATTENTION | NORMS | experts(4), expert_count=4, expert_used_count=2
    ),
    "llama, 80 layers of 8 experts": model(
        "llama", 80, 64, 8, ATTENTION | NORMS | experts(8), expert_count=8, expert_used_count=2
    ),
    "qwen2moe, 24 layers of 60 experts and shared": model(
        "qwen2moe",
        24,
        16,
        16,
        ATTENTION
        | NORMS
        | experts(60)
        | {"ffn_gate_inp_shexp": [256], "ffn_gate_shexp": [2, 256], "ffn_up_shexp": [2, 256], "ffn_down_shexp": [2, 512]},
        expert_count=60,
        expert_used_count=4,
    ),
    "qwen3moe, 48 layers of 128 experts": model(
        "qwen3moe", 48, 32, 4, ATTENTION | NORMS | experts(128), expert_count=128, expert_used_count=8
    ),
    "deepseek2, latent attention, dense first layer": model(
        "deepseek2",
        27,
        16,
        16,
        NORMS
        | {"attn_q": [2, 256], "attn_kv_a_mqa": [2, 256], "attn_kv_a_norm": [256], "attn_kv_b": [2, 512], "attn_output": [2, 256]}
        | {k: [v, "0"] for k, v in DENSE.items()}
        | {k: [v, "1-26"] for k, v in experts(64).items()}
        | {k: [[2, 256], "1-26"] for k in ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")},
        expert_count=64,
        expert_used_count=6,
        leading_dense_block_count=1,
        expert_shared_count=2,
        expert_feed_forward_length=512,
        **{"attention.kv_lora_rank": 512, "attention.q_lora_rank": 0, "expert_weights_scale": 1.0},
    ),
    "falcon, 32 layers": model("falcon", 32, 71, 1, FUSED),
    "falcon, 60 layers": model("falcon", 60, 128, 8, FUSED),
    "falcon, 32 layers, split attention": model("falcon", 32, 64, 32, LLAMA),
    "gpt2, 12 layers, tied": model("gpt2", 12, 12, 12, FUSED, tied=True),
    "phi3, 32 layers": model("phi3", 32, 32, 32, FUSED),
    "mamba, 24 layers": model(
        "mamba",
        24,
        0,
        0,
        {
            "attn_norm": [256],
            "ssm_in": [4, 256],
            "ssm_conv1d": [256, 4],
            "ssm_x": [2, 512],
            "ssm_dt": [512, 16],
            "ssm_a": [512, 16],
            "ssm_out": [2, 512],
        },
        **{"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 16},
    ),
    "bert, 12 layers": model(
        "bert",
        12,
        12,
        12,
        ATTENTION | {"ffn_up": [2, 256], "ffn_down": [2, 1024], "attn_output_norm": [256], "layer_output_norm": [256]},
        tied=True,
        more={"position_embd": [512, 256], "token_types": [2, 256], "token_embd_norm": [256]},
        **{"attention.causal": False},
    ),
    "rwkv7, 12 layers": model(
        "rwkv7",
        12,
        0,
        0,
        {
            f"time_mix_{k}": [4, 256]
            for k in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "key", "value", "receptance", "output")
        }
        | {f"time_mix_{k}": [256] for k in ("w0", "a0", "v0", "k_k", "k_a", "r_k")}
        | {"time_mix_lerp_fused": [6, 1, 256], "channel_mix_key": [2, 256], "channel_mix_value": [2, 1024], "attn_norm": [256]},
        **{
            "wkv.head_size": 64,
            "attention.decay_lora_rank": 64,
            "attention.iclr_lora_rank": 64,
            "attention.value_residual_mix_lora_rank": 32,
            "attention.gate_lora_rank": 128,
        },
    ),
    "lfm2, attention in every fourth layer": model(
        "lfm2",
        16,
        32,
        [0, 0, 0, 8] * 4,
        DENSE
        | NORMS
        | {k: [v, "3,7,11,15"] for k, v in ATTENTION.items()}
        | {k: [[2, 256], "0-2,4-6,8-10,12-14"] for k in ("shortconv.in_proj", "shortconv.out_proj")}
        | {"shortconv.conv": [[256, 3], "0-2,4-6,8-10,12-14"]},
        tied=True,
        **{"shortconv.l_cache": 3},
    ),
    "llama, rows of 384 and 1024": model("llama", 9, 6, 3, rows(384, 1024), n=384),
    "llama, rows of 384, tied": model("llama", 9, 6, 6, rows(384, 1024), n=384, tied=True),
    "llama, rows of 896 and 4864 (Qwen2 0.5B)": model("qwen2", 24, 14, 2, rows(896, 4864), n=896, tied=True),
    "llama, rows of 576 and 1536 (SmolLM)": model("llama", 30, 9, 3, rows(576, 1536), n=576),
    "llama, down rows of 1000": model("llama", 8, 8, 2, rows(512, 1000), n=512),
    "llama, rows of 512 and 1376": model("llama", 8, 8, 2, rows(512, 1376), n=512),
}
OPTIONS = {
    "--pure": ["--pure"],
    "--leave-output-tensor": ["--leave-output-tensor"],
    "--output-tensor-type": ["--output-tensor-type", "Q8_0"],
    "--token-embedding-type": ["--token-embedding-type", "Q5_1"],
    "--tensor-type": ["--tensor-type", "blk.[01].attn_v=Q8_0", "--tensor-type", "ffn_down=Q5_K", "--tensor-type", "attn_v=Q4_0"],
}
OPTION_MODELS = ("llama, 32 layers, 4 query heads per kv head", "llama, 13 layers", "llama, rows of 576 and 1536 (SmolLM)")
OPTION_PRESETS = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_M")


def numbers(text: str) -> Iterator[int]:
    """1-3,7 is 1, 2, 3, 7."""
    for part in text.split(","):
        a, _, b = part.partition("-")
        yield from range(int(a), int(b or a) + 1)


def ranges(layers: Iterable[int]) -> str:
    """Inverse of `numbers`."""
    spans: list[list[int]] = []
    for i in layers:
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def tensors(spec: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in no special order."""
    for role, shape in spec["outside"].items():
        yield f"{role}.weight", tuple(shape)
    for role, entry in spec["block"].items():
        shape, where = entry if isinstance(entry[-1], str) else (entry, None)
        for i in range(spec["metadata"]["block_count"]) if where is None else numbers(where):
            yield f"blk.{i}.{role}" + ("" if role.endswith(".bias") or role == "ssm_a" else ".weight"), tuple(shape)


# Matrices that convert_hf_to_gguf writes in F32.
F32 = (
    "ffn_gate_inp",
    "ssm_conv1d",
    "ssm_a",
    "position_embd",
    "token_types",
    "shortconv.conv",
    "time_mix_w",
    "time_mix_lerp_fused",
)


def floats(name: str, shape: tuple[int, ...]) -> str:
    """The type that convert_hf_to_gguf --outtype bf16 writes."""
    return "F32" if len(shape) == 1 or any(part in name for part in F32) else "BF16"


def expand(roles: dict[str, Any], spec: dict[str, Any]) -> dict[str, str]:
    """The stored form of a table back to tensor name -> type; "*" is what the other matrices get."""
    found = {}
    for name, shape in tensors(spec):
        role = name.split(".", 2)[2] if name.startswith("blk.") else name
        default = roles["*"] if floats(name, shape) == "BF16" else "F32"
        entry = roles.get(role.removesuffix(".weight"), default)
        main, others = entry if isinstance(entry, list) else (entry, {})
        found[name] = main
        for kind, where in others.items():
            if int(name.split(".")[1]) in numbers(where):
                found[name] = kind
    return found


def compress(types: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """Types by role: the commonest, and the layers of the others."""
    shapes = dict(tensors(spec))
    by_role: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        if floats(name, shapes[name]) == "F32" and kind == "F32":
            continue
        _, layer, role = name.split(".", 2) if name.startswith("blk.") else ("", "0", name)
        by_role.setdefault(role.removesuffix(".weight"), {})[int(layer)] = kind
    table: dict[str, Any] = {"*": Counter(k for layers in by_role.values() for k in layers.values()).most_common(1)[0][0]}
    for role, layers in sorted(by_role.items()):
        main = Counter(layers.values()).most_common(1)[0][0]
        others = {k: ranges(i for i in sorted(layers) if layers[i] == k) for k in sorted(set(layers.values()) - {main})}
        if others or main != table["*"]:
            table[role] = [main, others] if others else main
    assert expand(table, spec) == types
    return table


def write(path: Path, spec: dict[str, Any]) -> None:
    """The model as a GGUF file of zeros."""
    w = gguf.GGUFWriter(path, spec["arch"])
    defaults = {"context_length": 256, "embedding_length": 256, "feed_forward_length": 768, "vocab_size": 2}
    epsilons = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5}
    for key, value in (defaults | epsilons | spec["metadata"]).items():
        add = {float: w.add_float32, bool: w.add_bool, list: w.add_array}.get(type(value), w.add_uint32)
        add(f"{spec['arch']}.{key}", value)
    for name, shape in tensors(spec):
        if floats(name, shape) == "F32":
            w.add_tensor(name, np.zeros(shape, np.float32))
        else:
            w.add_tensor(name, np.zeros((*shape[:-1], 2 * shape[-1]), np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def plan(program: str, path: Path, preset: str, options: list[str]) -> dict[str, str] | str:
    """llama-quantize's dry run: type by tensor, or its error."""
    done = subprocess.run([program, "--dry-run", *options, path, preset], capture_output=True, text=True)
    text = done.stdout + done.stderr
    found = {}
    for m in re.finditer(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), (.*)$", text, re.MULTILINE):
        to = re.search(r"\((\w+)\)$", m[3])
        found[m[1]] = (to[1] if to else m[2]).upper()
    error = re.search(r"failed to quantize: (.*)", text)
    return error[1] if error else found


def main(program: str) -> None:
    """Plan everything and write the table."""
    out: dict[str, Any] = {"models": MODELS, "types": {}, "options": {}}
    with tempfile.TemporaryDirectory() as tmp:
        for title, spec in MODELS.items():
            path = Path(tmp) / "model.gguf"
            write(path, spec)
            table: dict[str, Any] = {}
            for preset in PRESETS:
                for key, options in {"plain": [], "imatrix": ["--imatrix", str(IMATRIX)]}.items():
                    types = plan(program, path, preset, options)
                    entry = types if isinstance(types, str) else compress(types, spec)
                    if key == "plain":
                        table[preset] = [entry]
                    elif entry != table[preset][0]:
                        table[preset].append(entry)
            out["types"][title] = table
            for option, arguments in OPTIONS.items() if title in OPTION_MODELS else ():
                if option == "--pure" and "rows" in title:
                    continue  # this llama-quantize then forgets that the rows are no multiple of the block
                for preset in OPTION_PRESETS:
                    types = plan(program, path, preset, arguments)
                    entry = types if isinstance(types, str) else compress(types, spec)
                    out["options"].setdefault(option, {}).setdefault(title, {})[preset] = entry
            print(title, file=sys.stderr)
    text = json.dumps(out, indent=None, separators=(",", ":"))
    (HERE / "llama_quantize.json").write_text(
        re.sub(r'("(?:models|types|options)":\{|\},(?="[a-z0-9]+, |"--))', r"\1\n", text) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1])
