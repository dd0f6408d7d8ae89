# `make demo` and `make test` do everything that a fresh machine needs: a virtual environment, the installation, the job.

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Waiting threads sleep: with other work on the same cores, spinning ones make torch hundreds of times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-slow lint clean

help:
	@echo "make demo       train SMEAR on handwritten digits in six domains, draw its routes (minutes, no download)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes each"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the virtual environment"
	@echo "Everything lives in $(VENV) (VENV=... for another place, PYTHON=... for another Python, 3.11 to 3.13)."

# The stamp is touched last, so that a broken installation is made again. promptsource cannot be installed the usual way
# on Python 3.10 or newer; only its template files are read, and everything else works without it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -e '.[vision,recipes,dev]'
	-$(PY) -m pip install -q --no-deps --ignore-requires-python promptsource==0.2.3
	touch $@

demo: $(STAMP)
	$(PY) -m recipes.demo

test: $(STAMP)
	$(PY) -m pytest -q

test-slow: $(STAMP)
	$(PY) -m pytest -q -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)
