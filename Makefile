# make demo         fine-tune a tiny MoE end to end (installs what it needs first)
# make test         lint and all tests that need no GPU
# make lint         ruff and mypy
# make test-gpu     tests/gpu with the Python at hand (GPU_PYTHON=...)
# make test-compile the full kernel compile matrix
# make test-latest  tests against the newest and the oldest supported transformers and peft
# make venv         create .venv with everything in it
# make clean        remove environments, caches and runs

PYTHON ?= python3
GPU_PYTHON ?= python3
# Where to take torch from, for example: --extra-index-url https://download.pytorch.org/whl/cpu
TORCH_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
INPUTS := pyproject.toml constraints.txt
TORCH_PIN := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
TORCH_PINS_TRITON := import importlib.metadata as m, sys; sys.exit(not any(r.startswith('triton') for r in m.requires('torch')))
HF_FAMILY := transformers|peft|accelerate|tokenizers|safetensors|huggingface-hub|kernels|datasets|trl

# One thread per worker: the tensors in the tests are small. At most eight workers.
PYTEST := -m pytest -n logical --maxprocesses 8 $(PYTEST_ARGS)
TEST_ENV := OMP_NUM_THREADS=1
CPU_TESTS := tests --ignore=tests/gpu --ignore=tests/compile --ignore=tests/interpret

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv demo test lint test-gpu test-compile test-latest clean
.DELETE_ON_ERROR:

# $(call install,VENV,REQUIREMENTS,CONSTRAINTS): a new environment in VENV.
# torch comes first and alone, so that pip takes the build this machine offers (a CPU wheel, if there is one).
# CUDA builds of torch pin their own triton; that pin then wins over ours.
define install
$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and "Python is " + v + "; turnout needs 3.10 or newer. Run: make PYTHON=python3.12 ...")'
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install $(TORCH_ARGS) "$(TORCH_PIN)"
if $(1)/bin/python -c "$(TORCH_PINS_TRITON)"; then $(3) | grep -v '^triton=='; else $(3); fi > $(1)/constraints.txt
$(1)/bin/python -m pip install -e '.[dev]' $(2) -c $(1)/constraints.txt
touch $(1)/.ready
endef

venv: $(READY)

$(READY): $(INPUTS)
	$(call install,$(VENV),,cat constraints.txt)

demo: $(READY)
	$(PY) -m turnout train --overwrite --out runs/demo

test: lint
	TRITON_INTERPRET=1 $(TEST_ENV) $(PY) $(PYTEST) tests/interpret
	$(TEST_ENV) $(PY) $(PYTEST) $(CPU_TESTS)
	$(TEST_ENV) $(PY) $(PYTEST) tests/compile -m "not slow"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/gpu $(PYTEST_ARGS)

test-compile: $(READY)
	$(TEST_ENV) $(PY) $(PYTEST) tests/compile

# The newest releases are looked for at every run; the oldest supported ones never change.
test-latest: .venv-floor/.ready
	rm -f .venv-latest/.ready
	$(MAKE) .venv-latest/.ready
	$(TEST_ENV) .venv-floor/bin/python $(PYTEST) tests/integrations tests/cpu
	$(TEST_ENV) .venv-latest/bin/python $(PYTEST) tests/integrations tests/cpu

.venv-latest/.ready: $(INPUTS)
	$(call install,.venv-latest,--upgrade transformers peft,sed -E '/^($(HF_FAMILY))==/d' constraints.txt)

.venv-floor/.ready: $(INPUTS)
	$(call install,.venv-floor,transformers==5.16.1 peft==0.20.0 kernels==0.16.0,sed -E '/^($(HF_FAMILY))==/d' constraints.txt)

clean:
	rm -rf .venv .venv-latest .venv-floor .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
