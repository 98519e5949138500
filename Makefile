# Every target sets up what it needs; a second run starts at once. Works from a path with spaces.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
REPORT ?= hasten-report

.PHONY: demo test check format lint types table clean

demo: .venv/run
	$(BIN)/hasten compare --out "$(REPORT)"

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: .venv/dev lint types test

format: .venv/dev
	$(BIN)/ruff format src tests training benchmarks scripts
	$(BIN)/ruff check --fix src tests training benchmarks scripts

lint: .venv/dev
	$(BIN)/ruff format --check src tests training benchmarks scripts
	$(BIN)/ruff check src tests training benchmarks scripts

types: .venv/dev
	$(BIN)/pyright

# Runs every pair of techniques on every architecture and regenerates the tables that ship and appear in docs/.
table: .venv/dev
	$(BIN)/python -m tests.contract.composition

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch .venv/run

.venv/dev: .venv/run
	$(PIP) -e '.[dev]'
	@touch .venv/dev

clean:
	rm -rf .venv "$(REPORT)" .pytest_cache .ruff_cache
