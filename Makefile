# Every target makes what it needs: `make demo` and `make test` are all that a newcomer has to know.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(wildcard $(BIN)/python) python3)
WORKERS ?= 2
MODEL ?=
SINCE ?=
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo -n)
PYTEST := $(BIN)/python -m pytest
ENVIRONMENT := $(BIN)/python tools/environment.py
VLLM := build/vllm
VLLM_TESTS ?= parts fused engine static learning serve
VLLM_ALL := parts fused engine static learning adapters compiled parallel processes serve ray emphasis_families second_runner
OLDEST_TESTS := tests/properties $(patsubst %,tests/engines/test_%.py,arguments compat decode images load prefixes transformers)

.PHONY: setup demo check lint types typed test test-all test-upgraded test-newest test-newest-all test-newest-torch \
  test-oldest test-oldest-all test-vllm test-vllm-all test-vllm-oldest peers browser tmux lock bench site api wheel clean

# Environments are made from the locks in requirements/, and kept until a lock changes.
setup:
	@$(PYTHON) tools/environment.py main $(VENV)

demo: setup
	$(BIN)/trimtab demo $(if $(MODEL),--model $(MODEL))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src docs examples benchmarks tools *.md
	$(BIN)/python tools/prose.py
	$(BIN)/python -m benchmarks results --check

types: setup
	$(BIN)/mypy

# How complete the types are that users' editors and type checkers see, as Pyright counts them.
typed: setup
	@$(PYTHON) -m venv build/pyright
	@build/pyright/bin/python -m pip install -qq 'pyright[nodejs]==1.1.414'
	$(BIN)/python tools/typed.py build/pyright/bin/pyright

# While you work: no weights, no processes of their own, the properties on two families of models.
check: lint types
	$(PYTEST) -n $(WORKERS) -m "not real and not slow and not long" --families llama,gemma3

# Before you push. The parts run side by side, and what they print is in build/logs.
test: setup browser
	@$(BIN)/python tools/parts.py test-newest test-vllm types lint test-oldest

# At night: the long forms as well.
test-all: setup browser tmux
	@$(BIN)/python tools/parts.py test-newest-all test-vllm-all lint types test-oldest-all test-newest-torch test-vllm-oldest

test-newest: setup peers
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not long" --durations=80 --durations-min=2

test-newest-all: setup peers
	$(PYTEST) -n $(WORKERS) --dist loadfile

# The other end of the range of transformers that is supported, laid over the same environment.
test-oldest test-oldest-all: export PYTHONPATH = build/oldest-transformers
test-oldest: setup
	@PYTHONPATH= $(ENVIRONMENT) oldest-transformers build/oldest-transformers
	$(PYTEST) -n 1 $(OLDEST_TESTS) $(foreach name,gpu_costs two_gpus,--ignore tests/properties/test_$(name).py) \
	  -m "not slow and not long" --families llama,gemma3

test-oldest-all: setup
	@PYTHONPATH= $(ENVIRONMENT) oldest-transformers build/oldest-transformers
	$(PYTEST) -n $(WORKERS) tests/properties tests/engines tests/learn tests/methods -m "not slow"

# The newest torch, which is what pip installs for users, laid over the same environment.
test-newest-torch: export PYTHONPATH = $(CURDIR)/build/newest-torch
test-newest-torch: setup
	@PYTHONPATH= $(ENVIRONMENT) newest-torch build/newest-torch
	$(PYTEST) -n $(WORKERS) tests/properties tests/engines tests/learn tests/methods -m "not slow and not long"

# vLLM pins its own torch and transformers, so it stands in an environment of its own. One engine at a time.
test-vllm: setup
	@$(ENVIRONMENT) vllm $(VLLM)
	for module in $(VLLM_TESTS); do \
	  $(VLLM)/bin/python -m pytest -p no:xdist -m "not slow and not long" tests/engines/vllm/test_$$module.py || exit 1; \
	done

test-vllm-all: setup
	@$(ENVIRONMENT) vllm $(VLLM)
	for module in $(VLLM_ALL); do $(VLLM)/bin/python -m pytest -p no:xdist tests/engines/vllm/test_$$module.py || exit 1; done

# The oldest vLLM that is supported: whether the places inside of it are the same, and whether an engine steers.
test-vllm-oldest: setup
	@$(ENVIRONMENT) vllm-oldest $(VLLM)-oldest
	$(VLLM)-oldest/bin/python -m pytest -p no:xdist -m "not slow" tests/engines/vllm/test_parts.py
	$(VLLM)-oldest/bin/python -m pytest -p no:xdist -m smoke tests/engines/vllm/test_engine.py

# All but torch at its newest, beyond what pyproject.toml allows: what the next release of a dependency will break.
# Torch has a test of its own (test-newest-torch).
test-upgraded: setup browser
	@$(ENVIRONMENT) upgraded build/upgraded
	build/upgraded/bin/python tools/upgraded.py differences
	build/upgraded/bin/python -m pytest -n $(WORKERS) tests/properties -m "not long"
	build/upgraded/bin/python -m pytest -m smoke

# Other steering libraries, whose files the tests exchange.
peers: setup
	@$(ENVIRONMENT) peers build/peers

# The tests of the playground drive a Chromium. Where there is none they are skipped; CI, as root, installs it.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { [ -n "$$CI" ] && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
	  echo "there is no Chromium here, so the playground's tests in a browser are skipped (Debian: apt-get install chromium)"

# The long tests of the chat type into a tmux. Where there is none they are skipped, except in CI, which installs it.
tmux:
	@command -v tmux >/dev/null || \
	  { [ -n "$$CI" ] && $(AS_ROOT) apt-get update -qq && $(AS_ROOT) apt-get install -qq -y tmux >/dev/null; } || \
	  echo "there is no tmux here, so the tests of the chat in a terminal are skipped, or fail in CI (apt-get install tmux)"

# The documentation site, with warnings as errors, into build/site.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

# What changed in the public API since the last tag, and whether the changelog says so; or since a commit: make api
# SINCE=v0.1.0. Without a tag it is since the commit that last changed the version.
api: setup
	$(BIN)/python tools/api.py $(SINCE)

# The wheel, built twice: the same bytes, or it fails.
wheel: setup
	rm -rf dist build/again
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/again .
	cmp dist/*.whl build/again/*.whl

# Renew the locks within pyproject.toml's ranges, and say what moved.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq --upgrade uv
	PATH="build/lock/bin:$$PATH" $(PYTHON) tools/lock.py

bench: setup
	$(BIN)/python -m benchmarks static --json build/static.json
	$(BIN)/python -m benchmarks extract --json build/extract.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
