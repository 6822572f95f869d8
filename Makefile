# Two commands on a fresh machine: `make demo` aligns the small model that comes along, `make test` runs the tests.
# Both make a virtual environment in .venv first; PYTHON and TORCH may be set, as in `make demo PYTHON=python3.12`.
# `make docs` turns docs/ into pages in docs/_build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test check docs clean

demo: .venv/ready
	$(BIN)/python -m lit_align fit --config configs/eps_dpo.yaml

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not longer"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m longer

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx --quiet --fail-on-warning docs docs/_build

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
