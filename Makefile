# Each command makes the environment it needs (.venv-demo, .venv-test, .venv-docs) on its first run; see scripts/env.py.
#
#   PYTHON=python3.12   which interpreter                NO_VENV=1      install nothing, use what PYTHON has
#   TORCH_SPEC=...      what to install as torch         ARGS="..."     further arguments for the command
PYTHON ?= python3
ARGS ?=
IN_DEMO = @"$(PYTHON)" scripts/env.py demo
IN_TEST = @"$(PYTHON)" scripts/env.py test
IN_DOCS = @"$(PYTHON)" scripts/env.py docs

.PHONY: help demo test test-all test-gpu lint bench docs clean python
help:
	@echo "make demo      install into .venv-demo and run the demonstration"
	@echo "make test      install into .venv-test and run the linters and tests (up to 10 minutes)"
	@echo "make test-all  the same with the heavy tests"
	@echo "make test-gpu  the tests that need a GPU, in several processes"
	@echo "make lint      ruff and mypy only"
	@echo "make bench     run the benchmarks: the rows of the tables of this device"
	@echo "make docs      build the documentation into docs/_build; every warning is an error"
	@echo "make clean     remove the environments and all caches"
	@echo "settings: PYTHON=python3.12  NO_VENV=1  TORCH_SPEC='torch==2.9.1'  ARGS='...'"

demo: python
	$(IN_DEMO) -m flash_sparse_attn demo $(ARGS)

test: python
	$(IN_TEST) scripts/test.py $(ARGS)

test-all: python
	$(IN_TEST) scripts/test.py --heavy $(ARGS)

test-gpu: python
	$(IN_TEST) scripts/test.py --gpu $(ARGS)

lint: python
	$(IN_TEST) scripts/test.py --lint-only

bench: python
	$(IN_DEMO) -m flash_sparse_attn bench run $(ARGS)

docs: python
	$(IN_DOCS) -m sphinx -W --keep-going -q -b html docs docs/_build $(ARGS)
	@echo "documentation: docs/_build/index.html"

clean:
	rm -rf .venv-demo .venv-test .venv-docs docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info

# Says what is wrong with PYTHON in words that any version of Python can print.
python:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "make: no '$(PYTHON)' here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit("make: Python 3.10 or newer is needed, and %s is %d.%d; name another: make PYTHON=/path/to/python" % ((sys.executable,) + v) if v < (3, 10) else 0)'
