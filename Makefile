# make demo runs the whole loop on real data, make test runs all tests, make down stops what was started.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := cluster feature_jobs jobs serve_apps

.DEFAULT_GOAL := help
.PHONY: help install demo down test integration unit unit-ground unit-features unit-engines unit-serving chaos soak lint format bench lock clean

help:
	@echo "make demo    install, start a local cluster, run the whole loop, write .falaj/demo/report.html"
	@echo "make test    all tests; they start and stop their own clusters"
	@echo "make down    stop what make demo started"
	@echo "make unit    tests without Ray       make integration    tests that need a cluster"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   all benches, or BENCH=<name>      make chaos   crash and property tests with many repetitions"
	@echo "make soak    ten minutes of requests; no request may fail, no process may grow"

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "refused: Falaj needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=…"; exit 2; }
	@command -v c++ >/dev/null || { echo "refused: no C++ compiler (c++) found; DeepSpeed needs one. Install g++."; exit 2; }
	@echo "installing the pinned lock into $(VENV); this takes some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m jobs.pipeline

down: $(STAMP)
	@$(BIN)/python -m cluster.down

test: unit integration

# Two processes with a cluster each share the test files. The tests mostly wait, so two run faster than one.
integration: $(STAMP)
	@$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile

# Four processes, each of which imports only what its tests need. Each uses one thread, because LightGBM and Polars in
# parallel processes would otherwise compete for the cores. Tests that import a model engine run in unit-engines.
# Only an integration test uses schemathesis, and its plugin takes longer to import than pytest, so it is off here.
UNIT := OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 $(BIN)/python -m pytest -p no:schemathesis
unit: $(STAMP)
	@$(MAKE) --silent --jobs=4 --output-sync=target unit-features unit-serving unit-ground unit-engines

unit-ground:
	@$(UNIT) tests/unit/cluster --ignore=tests/unit/cluster/test_runtime.py

unit-features:
	@$(UNIT) tests/unit/feature_jobs

unit-engines:
	@$(UNIT) tests/unit/cluster/test_runtime.py tests/unit/serve_apps/test_engines.py tests/unit/jobs tests/configs

unit-serving:
	@$(UNIT) tests/unit/serve_apps --ignore=tests/unit/serve_apps/test_engines.py

# Crash tests with fifty kills, property tests with forty times the examples, and a longer load on a cluster while
# parts of it are killed.
chaos: $(STAMP)
	@FALAJ_KILLS=50 $(BIN)/python -m pytest tests/unit -k kill
	@HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/unit
	@FALAJ_LOAD_S=20 $(BIN)/python -m pytest -s tests/integration/test_nothing_lost.py

soak: $(STAMP)
	@$(BIN)/python tests/soak.py

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	@for bench in $(if $(BENCH),$(BENCH),$(basename $(notdir $(wildcard tests/bench/[a-z]*.py)))); do \
		$(BIN)/python tests/bench/$$bench.py || exit 1; done

# Creates a new lock from pyproject.toml in an empty environment. Review the difference before you commit it.
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/pip install --quiet '.[dev]'
	@build/lock/bin/pip freeze --exclude falaj | sed 's/+cpu$$//' > requirements.lock

clean: down
	rm -rf .falaj data
