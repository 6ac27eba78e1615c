# make demo, make test and make lint do the set-up themselves; it runs once and again when the pins change.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
            $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; \
          done)
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.set-up
PIP    := -m pip --disable-pip-version-check install -q
MATRIX ?= 5.23 5.22 5.21

.PHONY: setup demo test test-slow test-matrix lint format bench docs clean

setup: $(STAMP)

# torch first and by itself: the build that pip is set up to find (CPU or GPU) is then the one that stays.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer with venv found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) -c constraints.txt torch hatchling editables
	$(PY) $(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: setup
	@$(VENV)/bin/easyedit demo
	@echo; echo "The command is in $(VENV): . $(VENV)/bin/activate"

test: setup
	$(PY) -m pytest -n 2 --dist loadgroup

test-slow: setup
	$(PY) -m pytest --runslow -n 2 --dist loadgroup

# The fast lane on the newest minor version of transformers and the two before it, each in its own environment.
test-matrix: setup
	@for v in $(MATRIX); do \
	    e=.venv-transformers-$$v; echo "transformers $$v"; \
	    test -f $$e/.set-up || { $(PYTHON) -m venv $$e \
	        && $$e/bin/python $(PIP) -c constraints.txt torch hatchling editables \
	        && $$e/bin/python $(PIP) --no-build-isolation -e ".[dev]" "transformers==$$v.*" \
	        && touch $$e/.set-up; } || exit 1; \
	    $$e/bin/python -m pytest -n 2 --dist loadgroup || exit 1; \
	done

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) tools/make_docs.py --check

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Speed on this machine, and two runs with their pages: build/bench/single/report.html and .../sequential/report.html.
bench: setup
	$(PY) benchmarks/run.py
	rm -rf build/bench
	$(VENV)/bin/easyedit bench --methods FT,GRACE,ICE,MEMIT,AlphaEdit --n 10 --out build/bench/single
	$(VENV)/bin/easyedit bench --methods FT,AlphaEdit,GRACE --n 20 --schedule sequential:2 --out build/bench/sequential

docs: setup
	$(PY) tools/make_docs.py

clean:
	rm -rf $(VENV) .venv-transformers-* build dist .pytest_cache .ruff_cache .mypy_cache
