# Two commands for a newcomer: `make quickstart` and `make test`. Everything lives in .venv; a GPU machine sets
# CONSTRAINTS to nothing and gets the newest torch with CUDA (see README).
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
constrain = $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# The stamp is named by what was installed: a changed pin installs again, an unchanged one costs nothing.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-$(subst /,_,$(CONSTRAINTS))

# Where Python may write no bytecode, pytest would rewrite all tests again in each process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test test-long check format clean

help:
	@echo "make quickstart  install, then run the whole river on the Unicode character names (minutes, 2 cores)"
	@echo "make test        install, then run the tests"
	@echo "make test-long   the slow proofs"
	@echo "make check       ruff, mypy --strict, import-linter"
	@echo "make format      let ruff format the sources"
	@echo "make clean       remove .venv and caches (runs stay)"

install: $(STAMP)

# torch goes first and through pip: the pin then holds for every package that asks for a torch. All is compiled now: a
# cluster is many processes, and where Python may not write bytecode each compiles Ray again (7.4 s for 2.1 s).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(constrain) torch uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(constrain) -e '.[dev]'
	$(BIN)/python -m compileall -q dllm_core workflows
	@rm -f $(VENV)/.installed-*
	@touch $@

quickstart: $(STAMP)
	$(BIN)/dllm run workflows/recipes/quickstart.yaml

# The endpoint has the machine to itself. All else runs in two processes, which share it: with as many threads each as
# there are cores, torch would wait for its own: 279 s for 25 (two runs of test_canvases.py at once). What starts
# clusters goes first, since it waits more than it computes: 142 s beside each other, 200 s one after another.
SLOWEST := --durations=15 --durations-min=5
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" $(SLOWEST) -n 2 --dist loadfile --no-loadscope-reorder \
		tests/e2e tests/cluster tests/integration tests/reliability tests/architecture tests/unit
	$(BIN)/pytest -m "not long" $(SLOWEST) tests/endpoint

test-long: $(STAMP)
	DLLM_ALL_DRAWS=1 $(BIN)/pytest -m "long or not long" tests/unit
	$(BIN)/pytest -m long --ignore=tests/unit

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
