# Three commands, on a machine with Python 3.11 or newer and make:
#   make train    writes demo images into a .beton file and pretrains on it (about five minutes on two CPU cores)
#   make check    lint, types and the tests that are not marked slow: before every commit
#   make test     lint, types and all tests
# Each sets the checkout up first where that is not done yet (scripts/setup: wheels alone, no root). `make test` also
# adds FFCV (scripts/ffcv: a C++ build, system libraries by apt), as make setup FFCV=1 does. PYTHON=python3.12 make test
# chooses the interpreter; ARGS are passed on: make train ARGS="--steps 20", make check ARGS="-k beton".

venv := .venv/bin
pytest := $(venv)/python -m pytest -n logical --maxprocesses 4 --dist worksteal
# torch's waiting threads sleep and do not spin: on a machine that does something else as well, that is twice as fast
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup train check test lint types quick certify docs

setup:
	@scripts/setup
ifneq ($(filter-out 0,$(FFCV)),)
	@scripts/ffcv
endif

train: setup
	@$(venv)/python -m fastpmae.demo.demo $(ARGS)

# the types, which take one core, beside the tests
check: setup
	@$(MAKE) --no-print-directory -j 2 lint types quick

test: setup
	@scripts/ffcv || echo "ffcv: the tests of engine ffcv and of stock FFCV's reader will be skipped; pytest names each of them at its end"
	@scripts/browser
	@$(MAKE) --no-print-directory lint types
	$(pytest) $(ARGS)

lint:
	$(venv)/ruff check .
	$(venv)/ruff format --check .

types:
	$(venv)/pyright

quick:
	$(pytest) -m "not slow" $(ARGS)

# Builds every GPU kernel ahead of time, checks the machine code and renews the tables of kernels/README.md.
certify: setup
	PYTHONPATH=kernels $(venv)/python -m fastpmae_kernels.certify

# Builds the documentation into site/, with warnings as errors; index.html opens from the disk.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(venv)/python -m mkdocs build --strict $(ARGS)
