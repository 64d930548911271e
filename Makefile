# `make demo` and `make test` are all a person needs; each makes .venv first.
# `make check` is what a change must pass; `.ci/run` is check, test and test-long.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --progress-bar off --retries 5 --use-pep517
# A venv of its own: cwt reads our signed objects and must not share our CBOR library.
CWT := cwt==3.3.0
# Another: kuksa-client needs a protobuf that libp2p does not allow.
KUKSA := kuksa-client==0.6.0
# For python -m tests.bench, e.g. make bench BENCH="overhead --quick"
BENCH ?= overhead minilm footprint validator warm kernels

.PHONY: help venv demo test check bench test-long clean-room kernels docs fuzz-artifacts clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## the environment, installed from constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@python=$$(.ci/needs); echo "making $(VENV) with $$python: about two minutes"; \
	  [ -x $(PY) ] || "$$python" -m venv $(VENV)
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.installed
	@echo "installing what we are measured against: Ray, Dask, onnxruntime, PyTorch"
	@$(PIP) --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

.venv-cwt/.installed: Makefile
	@python=$$(.ci/needs); [ -x .venv-cwt/bin/python ] || "$$python" -m venv .venv-cwt
	@.venv-cwt/bin/python -m pip --disable-pip-version-check install --quiet $(CWT)
	@touch $@

.venv-kuksa/.installed: Makefile
	@python=$$(.ci/needs); [ -x .venv-kuksa/bin/python ] || "$$python" -m venv .venv-kuksa
	@.venv-kuksa/bin/python -m pip --disable-pip-version-check install --quiet $(KUKSA)
	@touch $@

.PHONY: node
node:
	@command -v node >/dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -q && apt-get install -q -y --no-install-recommends nodejs; \
	else echo "Missing: node. Install it with: sudo apt-get install nodejs" >&2; exit 1; fi

demo: venv  ## six cars embed a text; one is killed, one drives away; the answer is right
	@$(PY) -m testnet.demo

test: venv  ## everything a user needs to trust this build: at most ten minutes
	@$(PY) -m tests

check: venv  ## style, types, import contracts, documents
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) -m tests.reference --check
	$(PY) -m pytest -q -m 'long or not long' tests/unit/test_tidy.py tests/unit/test_tidy_docs.py

bench: $(VENV)/.peers  ## the numbers of docs/explanation/performance.md
	@for name in $(filter-out -%,$(BENCH)); do \
	  $(PY) -m tests.bench $$name $(filter -%,$(BENCH)); done

test-long: $(VENV)/.peers .venv-cwt/.installed .venv-kuksa/.installed node  ## fuzz, fault seeds, interop: at most an hour, skips nothing
	@$(PY) -m tests --long

clean-room:  ## a fresh clone with an empty home: demo, then test
	@room=$$(mktemp -d); trap 'chmod -R u+w "$$room"; rm -rf "$$room"' EXIT; \
	git clone --quiet . "$$room/meshnode"; mkdir "$$room/home"; \
	unset MESH_HOME XDG_DATA_HOME XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME VIRTUAL_ENV; \
	export HOME="$$room/home"; \
	$(MAKE) -C "$$room/meshnode" demo; $(MAKE) -C "$$room/meshnode" test

kernels: venv  ## rebuild the committed kernel artifacts, and say what drifted
	@$(PY) -m jaxkernels.build --check || $(PY) -m jaxkernels.build

docs: venv  ## the generated pages of docs
	@$(PY) -m tests.reference

N ?= 20000
SEED ?= 1
fuzz-artifacts: venv  ## N mutants of artifacts, each judged in a process of its own
	@$(PY) -m tests.fuzz artifacts --count $(N) --seed $(SEED)

clean:  ## remove what make made
	rm -rf .venv .venv-cwt .venv-kuksa build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
