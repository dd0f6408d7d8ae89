# `make demo` and `make test` do everything that a fresh machine needs: a virtual environment in .venv, the packages, the job.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
CONSTRAINTS ?= /dev/null

# Waiting threads that spin slow a busy machine down by orders of magnitude; torch reads this when it starts.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-newest lint pacs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(INSTALLED)  ## train, score, draw and reload SMEAR on handwritten digits in six domains (2 minutes)
	$(PY) -m recipes.demo $(ARGS)

# Two processes of one thread each: on two cores they take half the time that one of two threads does.
test: $(INSTALLED)  ## run the tests, but for the slow ones; ARGS="tests/recipes -k digits" chooses
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile $(ARGS)

test-oldest:  ## the same with the oldest versions that pyproject.toml admits (tests/oldest.txt), in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt

test-newest:  ## the same with the newest versions that the package index has, in .venv-newest, made anew
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest

lint: $(INSTALLED_DEV)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

pacs: $(INSTALLED)  ## the comparison on real images (an hour; SMEAR_DATA names the folder of the data)
	$(PY) -m recipes.sweep recipes/configs/sweeps/pacs_readme.yaml $(ARGS)
	$(PY) -m recipes.report runs/pacs_readme --out report/pacs_readme

clean:  ## remove the virtual environments
	rm -rf $(VENV) .venv-oldest .venv-newest

# The stamp is written last, so that an installation that was broken off is done again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + sys.version.split()[0] + "; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[vision,recipes,test]' -c $(CONSTRAINTS)
	@echo "promptsource refuses Python 3.10 and newer, but only its template files are read, so it is installed all the same:"
	-$(PY) -m pip install -q --disable-pip-version-check --no-deps --ignore-requires-python promptsource==0.2.3
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@
