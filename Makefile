PYTHON ?= python3
PIP = .venv/bin/python -m pip
# The oldest supported versions of torch and timm are defined in pyproject.toml.
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_TIMM := $(shell sed -n 's/.*"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST := python3.10 torch==$(OLDEST_TORCH).* torchvision==0.21.* timm==$(OLDEST_TIMM)

.PHONY: demo test lint types format coverage dist oldest compat integrations clean

demo: .venv/installed
	.venv/bin/timm-sknet predict

test: .venv/installed-tests
	REQUIRE_ECOSYSTEM=1 OMP_NUM_THREADS=1 .venv/bin/pytest -n 2

lint: .venv/installed-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-tests
	.venv/bin/mypy

format: .venv/installed-tests
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

coverage: .venv/installed-tests
	.venv/bin/coverage run -m pytest -m 'not slow'
	.venv/bin/coverage report

dist: .venv/installed-tests
	rm -rf dist
	.venv/bin/python -m build
	.venv/bin/python tools/check_archives.py
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt tools/try_wheel.sh $(PYTHON)

# Installs the wheel into an environment with the oldest supported versions, and runs the shorter checks there.
oldest: .venv/installed-tests
	rm -rf dist
	.venv/bin/python -m build --wheel
	CHECKS=few tools/try_wheel.sh $(OLDEST)

# Installs the wheel into environments as users have them, and runs all checks there. `make test` tests only one.
compat: dist
	CHECKS=all tools/try_wheel.sh $(OLDEST)
	CHECKS=all tools/try_wheel.sh python3.11 torch==2.8.* torchvision==0.23.* timm==1.0.26
	CHECKS=all tools/try_wheel.sh python3.12 torch==2.11.* torchvision==0.26.* timm==1.0.31
	CHECKS=all tools/try_wheel.sh python3.12 torch torchvision timm
	CHECKS=all tools/try_wheel.sh python3.13 torch torchvision timm

# Tools that are too large for the tests. IMAGENETTE is a folder with train/ and val/.
integrations:
	tools/integrations.sh $(PYTHON) $(IMAGENETTE)

clean:
	rm -rf .cache .venv build dist *.egg-info

# These files record an installation. It is repeated when a file that defines its versions has changed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e .
	touch $@

# Also downloads the tests in timm's sdist, because our tests run without a network. Only the tests are extracted:
# Python would import the timm beside them.
.venv/installed-tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[test,ecosystem]'
	rm -rf .cache/timm
	tools/timm_tests.sh .venv/bin/python .cache/timm
	touch $@
