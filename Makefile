# Needs Python 3.10 or newer and make; everything else is installed into .venv from PyPI.
#
#   make demo             run the example application (ONCE=1: its checks only, then end)
#   make test             two minutes of tests (ARGS="-k commit": these)
#   make test-all         all tests, with coverage: servers, frameworks, clusters, long ones
#   make lint types       ruff, mypy, pyright
#   make soak             transfers under faults (MINUTES=60: for longer; SOAK_DB=mariadb: there)
#   make bench            measure, 10 minutes (QUICK=1: only see that it runs; ARGS=held: one part)
#   make docs             build the site into build/docs
#   make docs-servers     run the tests of the servers, and write docs/servers.md from what they see
#   make docs-promises    write tests/PROMISES.md from the marks of the tests
#   make tox              those of "make test" on each Python that is here, with each SQLAlchemy
#   make release-check    what must hold before a release (DIST=dist: leave the files there)
#   make clean            remove whatever these have made
#
# PYTHON=python3.12 takes another interpreter than python3 (after "make clean").

PYTHON ?= python3
WORKERS ?=
ARGS ?=
MINUTES ?= 2
SOAK_DB ?= postgres

VENV := .venv
BENCH_VENV := .bench-venv
BIN := $(VENV)/bin

yes = $(filter-out 0 no false,$(1))
# pip 25.1 was the first to know dependency groups.
define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try: make PYTHON=python3.12 ...")'
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
touch $(1)/.made
endef
pip_install = -m pip install --quiet --disable-pip-version-check --editable . --group

.DELETE_ON_ERROR:
.PHONY: help demo test test-all unit-all lint types format soak bench docs docs-servers docs-promises release-check tox clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/demo.py $(if $(call yes,$(ONCE)),--once)

# Without coverage, which takes as long as the tests; and with a worker for when others wait.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -m first -n $(or $(WORKERS),3) --dist loadgroup $(ARGS)

test-all: unit-all lint types

unit-all: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(or $(WORKERS),2) --dist loadgroup $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

soak: $(VENV)/.installed-dev
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --database $(SOAK_DB) $(ARGS)

bench: $(BENCH_VENV)/.installed-bench
	$(BENCH_VENV)/bin/python -m benchmarks $(if $(call yes,$(QUICK)),--quick) $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -n --keep-going -b html docs build/docs

docs-servers: $(VENV)/.installed-dev
	$(BIN)/python -m tests.servers.report

docs-promises: $(VENV)/.installed-dev
	$(BIN)/python -m tests.support.promises

release-check: $(VENV)/.installed-release
	$(BIN)/python -m tests.release.check $(DIST)

tox: $(VENV)/.installed-dev
	$(BIN)/tox run $(ARGS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) .tox .coverage .coverage.* .hypothesis .mypy_cache \
	    .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	$(call make_venv,$(VENV))

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python $(pip_install) $*
	touch $@

$(BENCH_VENV)/.made:
	$(call make_venv,$(BENCH_VENV))

$(BENCH_VENV)/.installed-%: pyproject.toml | $(BENCH_VENV)/.made
	$(BENCH_VENV)/bin/python $(pip_install) $*
	touch $@
