# make demo: the whole loop on real data. make test: every check. make down: end what was started.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := cluster feature_jobs jobs serve_apps

.DEFAULT_GOAL := help
.PHONY: help install demo down test integration unit unit-ground unit-features unit-engines unit-serving chaos soak lint format bench lock clean

help:
	@echo "make demo    install, start a local cluster, run the whole loop, open .falaj/demo/report.html"
	@echo "make test    every test; starts and ends its own cluster"
	@echo "make down    end what make demo started"
	@echo "make unit    tests without Ray       make integration    tests that need a cluster"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   all benches, or BENCH=<name>      make chaos   crash and property tests, thoroughly"
	@echo "make soak    ten minutes of requests: no failure, no growing process"

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

# Two clusters side by side, each for the test files that one process takes: the tests mostly wait.
integration: $(STAMP)
	@$(BIN)/python -m pytest tests/integration -n 2 --dist loadfile

# Four processes that each import only what their part needs, with one thread each, because LightGBM and Polars would
# otherwise take all cores several times over and hold each other up. The engines' tests go where they are imported.
# Only an integration test uses schemathesis, whose plugin takes longer to import than pytest.
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

# The crash tests killed fifty times, the property tests with forty times the examples, and longer load on a cluster
# of which parts are killed.
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

# A new lock from pyproject.toml: resolve in an empty environment, then look at the difference before committing.
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/pip install --quiet '.[dev]'
	@build/lock/bin/pip freeze --exclude falaj | sed 's/+cpu$$//' > requirements.lock

clean: down
	rm -rf .falaj data
