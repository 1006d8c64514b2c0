# make demo       the whole job on a small model: converts, trains, judges, writes runs/demo/report.html
# make test       format, lint and tests (minutes);  make test-all adds the slow tests
# Each sets up .venv first (Python 3.11 or later, pinned versions) and does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo
# Installing compiles these; Python files need no second install.
NATIVE := $(wildcard openmsa/native/*.cpp openmsa/native/*.h openmsa/native/*.cmake) openmsa/native/CMakeLists.txt
# One thread in each of a few workers: tiny tensors lose more to threads than they gain.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all lint format clean

demo: $(STAMP)
	$(BIN)/openmsa demo --out $(OUT) $(DEMO_FLAGS)

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or later: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	@$(BIN)/python -c 'from openmsa import native; print("Native kernels:", native.unavailable() or ", ".join(native.instruction_sets()))'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
