# Everything a developer types. Each target makes and reuses .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PROTOS := protos/peer.proto protos/expert.proto protos/head.proto protos/lender.proto \
	protos/maestrale.proto

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

# One line that counts, instead of pip's hundreds.
COUNTED := awk '/^Collecting /{printf "\r  %3d packages, now %-40s", ++n, $$2; fflush()} \
	/^Installing collected/{printf "\r  %3d packages, installing them %-30s\n", n, ""; fflush()}'

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-unit test-clients test-soak test-cluster check wheel protos bench bench-peers clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

demo: $(VENV)/.server  ## Start everything on this machine, tell a story, stop everything
	@$(BIN)/maestrale demo

serve: $(VENV)/.server  ## Serve the embedded model at http://127.0.0.1:8000/v1
	@$(BIN)/maestrale serve

test: check  ## Checks, unit tests, integration tests
	$(BIN)/python -m pytest -q -n 2 tests/unit
	$(BIN)/python -m pytest tests/integration

test-unit: $(VENV)/.dev  ## Unit tests alone: no network, no Ray
	$(BIN)/python -m pytest -q -n 2 tests/unit

test-clients: $(VENV)/.clients  ## Other people's clients and tools against our API: minutes
	$(BIN)/python -m pytest -q -s tests/clients

test-soak: $(VENV)/.dev  ## Minutes-long runs, for tests/bench/RESULTS.md
	$(BIN)/python -m pytest -q -s tests/soak

test-cluster: $(VENV)/.dev  ## ray up, serve deploy on five hosts of this machine: root, iproute2, openssh-server, rsync
	$(BIN)/python -m pytest -q -s tests/cluster

check: $(VENV)/.dev  ## Lint, format, types, import layers, deploy files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/unit/test_deploy.py

wheel: $(VENV)/.dev  ## Build what deploy/ installs on every node, into deploy/dist
	@rm -rf build deploy/dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir deploy/dist .
	@cp deploy/constraints.txt deploy/dist/

protos: $(VENV)/.dev  ## Generate the code of protos/*.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: $(VENV)/.server  ## Cost of the split: beside one process, by part, and of one round trip
	$(BIN)/maestrale bench engine --workers 0,2 --dtype float32 --profile
	$(BIN)/maestrale bench dispatch

bench-peers: $(VENV)/.dev  ## Maestrale beside llama.cpp, vLLM, transformers: hours; goes on where it stopped
	@$(BIN)/python -m tests.bench.peers

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

# The stamps make an installation happen once, and again when pyproject.toml changes.
$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: set PYTHON=python3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module is missing: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.server: pyproject.toml | $(VENV)/bin/python
	@test -e $(VENV)/.dev -a ! pyproject.toml -nt $(VENV)/.dev || { \
		echo "installing maestrale[server] into $(VENV): minutes the first time"; \
		$(BIN)/pip install --progress-bar off -e '.[server]' | $(COUNTED); }
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing maestrale[dev] into $(VENV): minutes the first time"
	@$(BIN)/pip install --progress-bar off -e '.[dev]' | $(COUNTED)
	@touch $@

$(VENV)/.clients: $(VENV)/.dev
	@echo "installing maestrale[clients] into $(VENV)"
	@$(BIN)/pip install --progress-bar off -e '.[clients]' | $(COUNTED)
	@touch $@
