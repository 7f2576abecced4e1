PYTHON ?= python3
PIP = .venv/bin/python -m pip
# The oldest supported versions are defined in pyproject.toml.
OLDEST_TORCH := $(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_TIMM := $(shell sed -n 's/.*"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test lint types format coverage dist compat clean

demo: .venv/installed
	.venv/bin/timm-sknet predict

test: .venv/installed-tests
	REQUIRE_ECOSYSTEM=1 .venv/bin/pytest

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
	tools/try_wheel.sh $(PYTHON) -c constraints.txt

# Tests the supported versions in pyproject.toml. `make test` tests only one combination.
compat: dist
	TESTS=1 tools/try_wheel.sh python3.11 torch==$(OLDEST_TORCH).* timm==$(OLDEST_TIMM)
	TESTS=1 tools/try_wheel.sh python3.12 -c constraints.txt
	TESTS=1 tools/try_wheel.sh python3.13 -c constraints.txt

clean:
	rm -rf .cache .venv build dist *.egg-info

# These files record an installation. It is repeated when a file that defines its versions has changed.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e .
	touch $@

# Also downloads what the tests need, because they run without a network: the tests in timm's sdists, and the oldest
# supported release of timm in a separate folder. From an sdist, only the tests are extracted: Python would import the
# timm in it.
.venv/installed-tests: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[test,ecosystem]'
	rm -rf .cache/timm
	$(PIP) install --no-deps --target .cache/timm/oldest timm==$(OLDEST_TIMM)
	set -e; for version in $(OLDEST_TIMM) $$(.venv/bin/python -c 'from timm import __version__; print(__version__)'); do \
	    $(PIP) download --no-deps --no-binary timm -d .cache/timm timm==$$version; \
	    tar -xzf .cache/timm/timm-$$version.tar.gz -C .cache/timm timm-$$version/tests timm-$$version/pyproject.toml; \
	done
	touch $@
