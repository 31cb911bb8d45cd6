# What a user types. Everything happens inside .venv, which tools/setup_venv.py makes and keeps whole.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test venv check lock core dev

# PYTHON       the interpreter for .venv (default: the newest of python3.14 to python3.11, python3)
# TORCH_INDEX  where torch alone comes from, e.g. https://download.pytorch.org/whl/cpu
# VENV_ARGS    for `python -m venv`; --system-site-packages reuses a torch that is installed
# ARGS         for `flashgpt demo`, e.g. make demo ARGS="my.txt"
# PYTEST_ARGS  for pytest, e.g. make test PYTEST_ARGS="tests/model -x"
PYTHON ?=
TORCH_INDEX ?=
VENV_ARGS ?=
ARGS =
PYTEST_ARGS ?= -n logical --maxprocesses=4 --dist=worksteal

BIN := .venv/bin

# Without PYTHON=: the first that runs and is new enough, else python3, whose version is then named.
define setup
@python="$(PYTHON)"; \
for name in python3.14 python3.13 python3.12 python3.11 python3; do \
  [ -n "$$python" ] && break; \
  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && python=$$name; \
done; \
python=$${python:-python3}; \
command -v "$$python" >/dev/null || { \
  echo "setup: no $$python here: install Python 3.11 or newer, or name one with PYTHON=" >&2; exit 1; }; \
"$$python" tools/$(1) --torch-index="$(TORCH_INDEX)" $(2)
endef

into_venv = --python="$(PYTHON)" --venv-args="$(VENV_ARGS)"

help:  ## these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'
	@echo
	@sed -n 's/^# \([A-Z_]*\)   */  \1=|/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '{ printf "%-16s%s\n", $$1, $$2 }'

demo: core  ## train a small GPT on text this machine has, sample from it, prove the switch
	$(BIN)/flashgpt demo $(ARGS)

# One torch thread a worker: the workers share the cores, and small tensors gain little from threads.
test: dev  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict flashgpt

venv: dev  ## .venv with everything a developer needs

lock:  ## renew constraints.txt from a fresh install of all extras but fa4
	$(call setup,lock.py)

core:
	$(call setup,setup_venv.py core,$(into_venv))

dev:
	$(call setup,setup_venv.py dev,$(into_venv))
