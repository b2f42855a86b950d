# One virtual environment, .venv, made and kept up to date by whatever needs it (and one beside it for
# the clients that `make test` tries).
#
#   make serve                     serve the default model of this machine
#   make serve ARGS="--port 8123"  ... with flags for `synthia-vllm serve`
#   make test                      run the tests (and set up what they need)
#   make check                     lint and type-check
#   make check-config              check config/: needs kubectl, prometheus and promtool
#   make check-image               build the Dockerfile's CPU image and try it: as root, on Debian
#   make config                    write what in config/ is made from other files
#   make bench                     a few minutes of load on the demo model, measured
#   make bench ARGS="--url ..."    ... or on another server: flags for benchmarks/load.py
#
# ENGINE=cpu or ENGINE=gpu overrides the choice by the machine; PYTHON=... the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test test-unit check check-config check-image config format bench clean

BIN := .venv/bin
ENGINE ?= $(shell for d in /dev/nvidiactl /dev/nvidia0 /dev/dxg; do [ -e $$d ] && echo gpu && exit; done; echo cpu)
ARGS ?=

# vLLM runs on Python 3.11 to 3.13.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$p && exit; done)

# One line for each package that is fetched; pip's own output is hundreds of lines.
PIP := $(BIN)/python -m pip --disable-pip-version-check
FETCHED := sed -unE 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^ ]+) \((.*)\).*/    \3 \4/p'

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

serve: .venv/.engine-$(ENGINE)
	@exec $(BIN)/synthia-vllm serve $(ARGS)

test: .venv/.dev .venv/.json-schema-suite .venv-clients/.clients .venv-clients/.node
	@$(BIN)/python -m pytest $(ARGS)

test-unit: .venv/.dev .venv/.json-schema-suite
	@$(BIN)/python -m pytest tests/unit $(ARGS)

check: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check-config: .venv/.dev
	@for tool in kubectl prometheus promtool; do command -v $$tool >/dev/null || { echo \
		"$$tool is not on this machine, and config/ is checked with it. kubectl comes from" \
		"Kubernetes (1.27 or later); on Debian the other two are in the package prometheus." >&2; \
		exit 1; }; done
	@$(BIN)/python -m pytest tests/config $(ARGS)

check-image: .venv/.dev
	@$(BIN)/python tests/image.py $(ARGS)

config: .venv/.python
	@$(BIN)/python config/kubernetes/generate.py

format: .venv/.dev
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

# Numbers of a machine that does something else at the same time mean little.
bench: .venv/.bench
	@echo "[bench] what users see: load.py"
	@$(BIN)/python benchmarks/load.py --exact-length --goodput ttft:500 itl:50 $(ARGS)
	@echo "[bench] what the serving layer costs: edge.py"
	@$(BIN)/python benchmarks/edge.py --rounds 1

clean:
	rm -rf .venv .venv-clients tests/clients/node/node_modules build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/.python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11, 3.12 or 3.13 with the venv module was found. Install one (on Debian:" \
		"apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; fi
	@echo "[setup] making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# torchvision, torchaudio and torchcodec come as dependencies of vLLM; text needs none of them, and
# beside a CPU build of torch their wheels break the import of transformers.
.venv/.engine-cpu: .venv/.python pyproject.toml
	@echo "[setup] installing PyTorch for the CPU (0.2 GB)"
	@# That build is on PyTorch's own index; where pip already knows of one, that one is taken.
	@$(PIP) install -q 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(PIP) install --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' | $(FETCHED)
	@echo "[setup] installing vLLM for the CPU and what it needs (0.5 GB, a few minutes)"
	@$(PIP) install -e '.[cpu]' | $(FETCHED)
	@$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv/.engine-gpu: .venv/.python pyproject.toml
	@echo "[setup] installing vLLM for NVIDIA GPUs and what it needs (several GB)"
	@$(PIP) install -e '.[gpu]' | $(FETCHED)
	@touch $@

.venv/.dev: .venv/.engine-$(ENGINE)
	@echo "[setup] installing the tools for tests and checks"
	@$(PIP) install -e '.[dev]' | $(FETCHED)
	@touch $@

# The official JSON Schema Test Suite, as the source package of `jsonschema` ships it.
.venv/.json-schema-suite: .venv/.dev
	@echo "[setup] fetching the JSON Schema Test Suite"
	@rm -rf .venv/json-schema-suite && mkdir .venv/json-schema-suite
	@$(PIP) download -q --no-deps --no-binary jsonschema -d .venv/json-schema-suite 'jsonschema==4.26.0'
	@tar -xzf .venv/json-schema-suite/jsonschema-4.26.0.tar.gz -C .venv/json-schema-suite \
		--strip-components=2 --wildcards '*/json/tests'
	@touch $@

# Clients that the tests try. Some want older versions of what vLLM needs, so they have an
# environment of their own, which finds the large packages in the first one.
.venv-clients/.clients: .venv/.dev tests/clients/requirements.txt
	@echo "[setup] installing clients of the API for the tests"
	@$(BIN)/python -m venv --clear .venv-clients
	@.venv-clients/bin/python -c 'import pathlib, sysconfig; here = pathlib.Path(sysconfig.get_path("purelib")); \
		(here / "engine.pth").write_text(str(here).replace(".venv-clients", ".venv"))'
	@.venv-clients/bin/python -m pip --disable-pip-version-check install --only-binary :all: \
		-r tests/clients/requirements.txt | $(FETCHED)
	@touch $@

.venv-clients/.node: .venv-clients/.clients tests/clients/node/package-lock.json
	@command -v npm >/dev/null || { echo "npm is not on this machine: the tests try a client in" \
		"JavaScript (on Debian: apt-get install npm)." >&2; exit 1; }
	@npm ci --prefix tests/clients/node --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

.venv/.bench: .venv/.engine-$(ENGINE)
	@echo "[setup] installing what the load scripts need"
	@$(PIP) install -e '.[bench]' | $(FETCHED)
	@touch $@
