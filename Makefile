# make demo runs the whole loop on real data, make test runs all tests, make down stops what was started.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Which build of PyTorch to install, cpu or gpu; by default the one that is installed already.
TORCH ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
STAMP := $(VENV)/.installed$(if $(filter gpu,$(TORCH)),-gpu)
PACKAGES := cluster feature_jobs jobs serve_apps
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo demo-nodes down test integration failures image image-test unit unit-ground unit-features unit-engines unit-serving unit-rollouts chaos chaos-nodes chaos-pipeline live-rollouts soak gpu lint lint-types lint-rules format bench lock audit coverage clean

help:
	@echo "make demo    install, start a local cluster, run the whole loop, write .falaj/demo/report.html"
	@echo "make demo-nodes    the same on three nodes in network namespaces, with PostgreSQL, Redis and a double of S3; needs root"
	@echo "make test    all tests; they start and stop their own clusters"
	@echo "make down    stop what make demo started"
	@echo "make install install only; TORCH=gpu installs PyTorch for GPUs, the default is the CPU build"
	@echo "make unit    tests without Ray       make integration    tests that need a cluster"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   all benches, or BENCH=<name>      make chaos   crash and property tests with many repetitions"
	@echo "make failures    five failures under load on three nodes in network namespaces; six minutes; needs root"
	@echo "make chaos-nodes    failures under load on three nodes, compared with Ray Serve; writes docs/reliability.md; needs root"
	@echo "make chaos-pipeline    the demo with kill -9 at every stage gives the results of a demo without failures"
	@echo "make audit   known vulnerabilities of the locked packages       make coverage   lines that unit tests run"
	@echo "make image   the container image localhost/falaj, built with buildah as root; BASE=<image>, TAG=<name>"
	@echo "make image-test    build the image, run it with runc, call it from another network namespace; takes minutes"
	@echo "make gpu     measure a GPU: steps of a 350M decoder, memory, and ONNX on CUDA; at most eight minutes"
	@echo "make live-rollouts    the controller decides about versions of the census model while people are scored; ten minutes"
	@echo "make soak    ten minutes of requests; no request may fail, no process may grow"

install: $(STAMP)

# Installs exactly what the locks name (`--no-deps`). Another requirements.lock, or another build of PyTorch, starts
# with an empty environment: otherwise old packages would stay, and pip would keep the CPU build, because it has the same version.
# pip compiles with one process, so compileall does it, with all cores. Some packages have files for other Pythons: these
# do not compile. Without bytecode, each process would compile what it imports if PYTHONDONTWRITEBYTECODE is set: Ray Serve
# takes 5 s of CPU time then instead of 1.6 s.
$(STAMP): requirements.lock requirements-$(TORCH).lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "refused: Falaj needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=…"; exit 2; }
	@command -v c++ >/dev/null || { echo "refused: no C++ compiler (c++) found; DeepSpeed needs one. Install g++."; exit 2; }
	@echo "installing the pinned lock into $(VENV); this takes some minutes the first time"
	@[ -e $@ ] && cmp -s requirements.lock $(VENV)/requirements.lock || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --no-compile --no-deps --require-hashes --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-compile --no-deps --requirement requirements-$(TORCH).lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib > /dev/null || true
	@cp requirements.lock $(VENV)/
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m jobs.pipeline.census

# Not a part of `make test`: it takes minutes, and needs root for network namespaces.
demo-nodes: $(STAMP)
	@$(BIN)/python tests/nodes/demo.py

down: $(STAMP)
	@$(BIN)/python -m cluster.down

test: unit integration

# Two processes with a cluster each share the test files. They use both cores of a machine with two; with three, tests
# with deadlines failed there.
# tests/integration/conftest.py orders the files; otherwise xdist would start with those that have most tests. The
# durations show where the time goes.
integration: $(STAMP)
	@$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile --no-loadscope-reorder --durations=30

# Five processes, each of which imports only what its tests need. Each uses one thread, because LightGBM and Polars in
# parallel processes would otherwise compete for the cores. Tests that import a model engine run in unit-engines.
# Tests of serving mostly wait, for HAProxy, databases and processes. So they are two of the five, about equally long.
# Only an integration test uses schemathesis, and its plugin takes longer to import than pytest, so it is off here.
UNIT := OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 $(BIN)/python -m pytest -p no:schemathesis
unit: $(STAMP)
	@$(MAKE) --silent --jobs=5 --output-sync=target \
		unit-features unit-serving unit-rollouts unit-ground unit-engines

unit-ground:
	@$(UNIT) tests/unit/cluster --ignore=tests/unit/cluster/runtime/test_runtime.py

unit-features:
	@$(UNIT) tests/unit/feature_jobs

unit-engines:
	@$(UNIT) tests/unit/cluster/runtime/test_runtime.py tests/unit/serve_apps/predictor/test_engines.py tests/unit/jobs tests/configs

unit-serving:
	@$(UNIT) tests/unit/serve_apps --ignore=tests/unit/serve_apps/rollout \
		--ignore=tests/unit/serve_apps/predictor/test_engines.py

unit-rollouts:
	@$(UNIT) tests/unit/serve_apps/rollout

# Crash tests with fifty kills, property tests with forty times the examples, a longer load on a cluster while parts of
# it are killed, and the arms of 100,000 units.
chaos: $(STAMP)
	@FALAJ_KILLS=50 $(BIN)/python -m pytest tests/unit -k kill
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/unit
	@FALAJ_LOAD_S=20 $(BIN)/python -m pytest -s tests/integration/test_nothing_lost.py
	@FALAJ_UNITS=100000 $(BIN)/python -m pytest tests/unit/serve_apps/edge/haproxy/test_config.py -k same_arm

# Needs root for network namespaces, and PostgreSQL, redis-server, iproute2 and a C compiler (Debian: apt-get install).
# Alone, because its requests have deadlines. It needs root for network namespaces, and is skipped loudly without them.
failures: $(STAMP)
	@$(BIN)/python -m pytest -p no:schemathesis tests/nodes/test_node_failures.py

chaos-nodes: $(STAMP)
	@$(BIN)/python -m pytest -p no:schemathesis tests/nodes/test_head_restart.py
	@$(BIN)/python tests/chaos_nodes.py

chaos-pipeline: $(STAMP)
	@$(BIN)/python tests/chaos_pipeline.py

live-rollouts: $(STAMP)
	@$(BIN)/python tests/live_rollouts.py

soak: $(STAMP)
	@$(BIN)/python tests/soak.py

# Not a part of `make test`, because it needs a GPU. Without one it says so, and measures nothing.
gpu: $(STAMP)
	@$(BIN)/python tests/gpu/run.py

# buildah needs no daemon, and mmdebstrap makes the base image from Debian's packages, so no registry is needed.
image:
	@BASE=$(BASE) TAG=$(TAG) TORCH=$(TORCH) $(PYTHON) tests/image/build.py

# Not a part of `make test`, because a build takes minutes and several gigabytes of disk.
image-test: image $(STAMP)
	@FALAJ_IMAGE=$(or $(TAG),localhost/falaj) $(BIN)/python -m pytest -p no:schemathesis tests/image

# mypy takes longest, and uses one core.
lint: $(STAMP)
	@$(MAKE) --silent --jobs=2 --output-sync=target lint-types lint-rules

lint-types:
	@$(BIN)/mypy

lint-rules:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	@for bench in $(if $(BENCH),$(BENCH),$(basename $(notdir $(wildcard tests/bench/[a-z]*.py)))); do \
		$(BIN)/python tests/bench/$$bench.py || exit 1; done

# Tools that the project itself does not need, in an environment of their own.
TOOLS := build/tools/bin
$(TOOLS)/uv:
	@$(PYTHON) -m venv build/tools
	@build/tools/bin/pip install --quiet uv pip-audit

# New locks from pyproject.toml, with the hashes of all files of a release, so of each Python version. Locked versions
# stay where they can; UPGRADE=--upgrade takes the newest. Look at the difference before you commit it.
# NannyML's dependencies declare kaleido and nvidia-nccl-cu12; nothing imports them, and they take 690 MB.
UNUSED := kaleido nvidia-nccl-cu12
COMPILE = $(TOOLS)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header $(UPGRADE) \
	--default-index https://pypi.org/simple
lock: $(TOOLS)/uv
	@cp requirements.lock build/all.lock
	@$(COMPILE) pyproject.toml --extra dev --output-file build/all.lock
	@grep -o 'torch==[0-9.]*' pyproject.toml | $(COMPILE) - --constraint build/all.lock --output-file requirements-gpu.lock
	@$(COMPILE) pyproject.toml --extra dev --constraint build/all.lock --output-file requirements.lock $$( \
		{ printf '%s\n' $(UNUSED); grep -oE '^(torch|triton|nvidia|cuda)[a-z0-9-]*' requirements-gpu.lock; } \
		| sed 's/^/--no-emit-package /')
	@{ echo '--extra-index-url https://download.pytorch.org/whl/cpu'; grep -o 'torch==[0-9.]*' pyproject.toml; } \
		> requirements-cpu.lock

# Known vulnerabilities of the locked packages, by PyPI's data.
audit: $(TOOLS)/uv
	@$(PYTHON) -c 'import urllib.request as r; r.urlopen("https://pypi.org/pypi/pip/json", timeout=10)' 2>/dev/null || \
		{ echo "not audited: PyPI's data on vulnerabilities cannot be reached from here"; exit 2; }
	@$(TOOLS)/pip-audit --require-hashes --disable-pip --requirement requirements.lock

# Lines that the tests without a cluster run. What only a cluster runs (replicas, workers) counts as not covered.
coverage: $(STAMP)
	@$(BIN)/python -m pytest tests/unit tests/configs -n 2 -q $(addprefix --cov=,$(PACKAGES)) --cov-report=html:build/coverage \
		--cov-report=term:skip-covered

clean: down
	rm -rf .falaj data
