# make experiment   the whole experiment, on a GPU or a CPU: outputs/latest/README.md
# make check        lint, types and the tests that take no training and no server
# make test         all tests and lint
# make mutants      faults at random places of the code: which do tests see?
# make flagship     the reference experiment on a GPU, 23 minutes: outputs/flagship/README.md
PYTHON ?= python3
BIN := .venv/bin

experiment: .venv/installed
	$(BIN)/python experiment.py

check: TESTS = -n 2 -m "not slow"
test: TESTS = -n 3  # of two cores: many tests wait for agents and servers
check test: .venv/installed-tests starter/data/test.jsonl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist worksteal $(TESTS)

mutants: .venv/installed-tests starter/data/test.jsonl
	$(BIN)/python -m pip install --disable-pip-version-check -q --target .venv/mutants cosmic-ray==8.7.0
	PYTHONPATH=$(CURDIR)/.venv/mutants $(BIN)/python tests/mutants.py

flagship: .venv/installed
	PATH=$(CURDIR)/$(BIN):$$PATH recipes/flagship.sh

.venv/installed: requirements.txt local_wandb/requirements.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r tests/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps sweeps==0.3.0
	touch $@

starter/data/test.jsonl: starter/docstrings.py | .venv/installed
	$(BIN)/python -m starter.docstrings

.PHONY: check experiment flagship mutants test
