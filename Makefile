# Everything happens in .venv, which the first target that needs it makes. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint format clean

demo: .venv/installed
	$(BIN)/python -m trsd.train

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: .venv/installed-test
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

# The stamps make an install happen again only when what it depends on changed.
.venv/installed: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch .venv/installed $@

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
