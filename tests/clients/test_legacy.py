"""GPTQ v1 files of ours in AutoGPTQ 0.7.1, in an interpreter of its own: `make test-legacy`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import quantforge as qf
from quantforge.demo import MODEL
from tests.clients.interpreters import python_of

DUMP = """
import json, sys
import numpy as np, torch
from auto_gptq import AutoGPTQForCausalLM

for path in sys.argv[1:]:
    model = AutoGPTQForCausalLM.from_quantized(path, device="cpu", use_triton=False, use_safetensors=True,
        disable_exllama=True, disable_exllamav2=True, torch_dtype=torch.float32)
    found = {}
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if hasattr(module, "qweight"):
                module.bias = None
                module.scales = module.scales.float()
                found[name + ".weight"] = module(torch.eye(module.infeatures)).T.contiguous().numpy()
                kernel = type(module).__module__
        np.savez(path + ".npz", **found)
    with open(path + ".json", "w") as f:
        json.dump({"kernel": kernel}, f)
"""

CASES = [
    *({"bits": b, "group_size": 64} for b in (2, 3, 4, 8)),
    {"bits": 4, "group_size": 32},
    {"bits": 3, "group_size": 128},
    {"bits": 4, "group_size": -1},
    {"bits": 4, "group_size": 64, "method": "gptq", "calibration_chunks": 8},
    {"bits": 4, "group_size": 64, "method": "gptq", "act_order": True, "calibration_chunks": 8},
    {"bits": 3, "group_size": 64, "method": "gptq", "act_order": True, "calibration_chunks": 8},
    {"bits": 4, "group_size": 64, "method": "gptq", "act_order": True, "static_groups": True, "calibration_chunks": 8},
]


def label(options: dict) -> str:
    return "-".join(map(str, options.values()))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints, loaded one after the other by one AutoGPTQ."""
    python, directory = python_of("auto-gptq"), tmp_path_factory.mktemp("legacy")
    for options in CASES:
        qf.convert(MODEL, directory / label(options), format="gptq", **options)
    command = [python, "-c", DUMP, *(str(directory / label(o)) for o in CASES)]
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(directory)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


@pytest.mark.parametrize("options", CASES, ids=label)
def test_autogptq_computes_with_exactly_our_weights(options: dict, loaded: Path) -> None:
    path = loaded / label(options)
    told, theirs = json.loads(Path(f"{path}.json").read_text()), np.load(f"{path}.npz")
    worst = 0.0
    with qf.open(path) as source:
        quantized = [k for k, s in source.weights.items() if s.codec.name.startswith("int")]
        assert sorted(theirs.files) == sorted(quantized) and len(quantized) == 42
        # where rtn was kept, groups are in order
        acts = sum(source.weights[k].codec.name.endswith("-act") for k in quantized)
        assert (acts > 20) == (bool(options.get("act_order")) and not options.get("static_groups"))
        for name in quantized:
            worst = max(worst, float(np.abs(theirs[name] - source.read(name).decode()).max()))
    print(f"AutoGPTQ {options}: {told['kernel']}, largest difference {worst}")
    assert worst == 0
