# The tasks of the project. `make train` and `make test` set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
# PyTorch version of `make test-torch`.
TORCH ?= 2.11.0
OTHER := .venv-torch-$(TORCH)
# transformers versions of `make test-hf`: the oldest supported one, and the minor versions up to the newest.
TRANSFORMERS ?= 5.16.1 5.23.0 5.24.0
# The native CPU kernel; without a C++ compiler, attention uses the tiled backend.
NATIVE := sightline/native/libsightline.$(if $(filter Darwin,$(shell uname)),dylib,so)

.PHONY: setup train test test-all test-torch test-hf check bench clean

setup: .venv/ready
	@# a second make, because the installation has built the library since the first one looked
	@$(MAKE) --no-print-directory $(NATIVE)
	@$(BIN)/python -m sightline.native

$(NATIVE): setup.py $(wildcard sightline/native/csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sightline needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first and alone, so that no other package pulls in a different build of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: setup
	$(BIN)/sightline train llama3-tiny --output-dir runs/llama3-tiny

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: setup
	$(BIN)/python -m pytest

test-torch: $(OTHER)/ready
	$(OTHER)/bin/python -m pytest -m "not slow"

test-hf: $(TRANSFORMERS:%=test-hf-%)

# Each version and what it requires (not torch) lie in a folder of their own, which comes first on the path.
test-hf-%: .venv-transformers-%/ready setup
	PYTHONPATH=$(CURDIR)/.venv-transformers-$* $(BIN)/python -m pytest -m "not slow" tests/hf

.PRECIOUS: .venv-transformers-%/ready
.venv-transformers-%/ready: | .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(@D) transformers==$*
	touch $@

$(OTHER)/ready: pyproject.toml constraints.txt
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OTHER)/constraints.txt torch
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OTHER)/constraints.txt -e '.[dev]'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@if command -v node >/dev/null; then for script in sightline/plots/mask_page/*.js; do node --check $$script || exit 1; done; fi

bench: setup
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv .venv-torch-* .venv-transformers-* runs build $(NATIVE) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
