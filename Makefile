# make setup       .venv with everything that the other targets need
# make quickstart  raw text -> tokens -> training on two processes -> Hugging Face -> text, in a few minutes;
#                  interrupted, it continues; FRESH=1 starts over
# make test        the tests
# make check       style, types, layers, spelling, the C++ tests under sanitizers
#
# Each works alone on a fresh clone: it needs Python >= 3.12, a C++ compiler, make, and a package index.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format clean

BIN := .venv/bin
# Byte code is worth writing even where the environment forbids it: importing torch without takes 20 seconds, not 4.
unexport PYTHONDONTWRITEBYTECODE
# Test processes; each runs its ranks with one thread. More than 4 only fight over memory.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
# make test PYTEST_ARGS="tests/data -k blend"
PYTEST_ARGS ?=

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed -n '1,7p'

setup:
	@tools/dev/setup.sh test dev prepare
	@echo "ready: $(BIN)/megatron-7b --help, or 'source $(BIN)/activate' and megatron-7b --help"

quickstart:
	@tools/dev/setup.sh
	@examples/quickstart.sh $(if $(FRESH),--fresh)

test:
	@tools/dev/setup.sh test prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check:
	@tools/dev/setup.sh test dev prepare
	@tools/dev/check.sh

# Rewrite what `make check` would complain of, where a tool can.
format:
	@tools/dev/setup.sh test dev
	@tools/dev/check.sh --fix

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis quickstart_run
	find megatron_7b tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f megatron_7b/data/_index*.so megatron_7b/runtime/_kernels*.so
