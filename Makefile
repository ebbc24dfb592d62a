# make demo | test | check | clean. The first three set up .venv once and again when the build changes.

# The first Python that is new enough; override with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; \
	done)
VENV ?= .venv
# What pip installs as torch unless .venv has one; may carry pip options, such as --index-url.
TORCH ?= torch==2.13.0
# Test workers. More than the cores, or than 2 GB of memory each, does not help.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.coachhook-installed
NATIVE := setup.py $(wildcard csrc/* csrc/common/* csrc/cpu/*)
CXX_FILES = $$(find csrc tests/csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

.PHONY: demo test check clean

demo: $(STAMP)
	@$(BIN)/coachhook demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" \
		-n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python tools/check_repository.py

clean:
	rm -rf build dist *.egg-info coachhook/_C*.so coachhook/_cpu*.so .pytest_cache .mypy_cache .ruff_cache $(STAMP)

$(STAMP): pyproject.toml coachhook/_version.py $(NATIVE)
	@$(or $(PYTHON),python3) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(1)' 2>/dev/null || { \
		echo "coachhook needs Python >= 3.10; found: $$($(or $(PYTHON),python3) --version 2>&1)."; \
		echo "Install one and name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up $(VENV) for coachhook; the first time takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	@$(BIN)/python -m pip install --quiet 'pip>=23'
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python -c 'import importlib.util as u; found = u.find_spec("coachhook._C"); \
		print("CUDA extension:", "built" if found else "not built; optional, see coachhook doctor")'
	@touch $@
