# `make demo` and `make test` set everything up themselves: Python >= 3.11, git and make are all they need.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# A process of tests takes up to 2 GB. Each gets neighbouring files, and a part of what another one has left once it is done:
# fixtures of modules are rarely made twice. On one core: make test PARALLEL=
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal

# `demo` and `test` install into one folder.
.NOTPARALLEL:
.PHONY: demo test test-slow check format wheel-check clean

demo: .venv/installed  ## render the demo world, extract it, train three heads, print the table
	$(BIN)/vcache demo

test: .venv/installed-dev  ## the tests, on up to four cores: CPU only, no network
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: .venv/installed-dev  ## the minutes-long tests too
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" --timeout 3600

check: .venv/installed-dev  ## lint, format, types, and the import rule of the islands
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: .venv/installed-dev  ## the built wheel, alone in a fresh environment, answers
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --wheel --outdir dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --no-compile dist/*.whl
	cd .venv-wheel && bin/vcache --help && bin/vcache heads && bin/vcache datasets

clean:
	rm -rf .venv .venv-wheel build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

.venv/installed: pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml
	$(make_venv)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch .venv/installed $@

define make_venv
@test -n "$(PYTHON)" || { echo "vcache needs Python >= 3.11; none found. Install one, or say make PYTHON=/path/to/python3"; exit 1; }
test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "python3 -m venv failed: install your system's python3-venv package"; exit 1; }
endef
