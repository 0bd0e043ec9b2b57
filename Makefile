# Two commands, on a machine with Python 3.11 or newer and make:
#   make train    writes demo images into a .beton file and pretrains on it (about five minutes on two CPU cores)
#   make test     lint, types and the whole test suite
# Either sets the checkout up first where that is not done yet (scripts/setup). PYTHON=python3.12 make test chooses
# the interpreter; ARGS are passed on: make train ARGS="--steps 20", make test ARGS="-k beton".

venv := .venv/bin
# torch's waiting threads sleep and do not spin: on a machine that does something else as well, that is twice as fast
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup train test certify docs

setup:
	@scripts/setup

train: setup
	@$(venv)/python -m fastpmae.demo.demo $(ARGS)

test: setup
	@scripts/browser
	$(venv)/ruff check .
	$(venv)/ruff format --check .
	$(venv)/pyright
	$(venv)/python -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

# Builds every GPU kernel ahead of time, checks the machine code and renews the tables of kernels/README.md.
certify: setup
	PYTHONPATH=kernels $(venv)/python -m fastpmae_kernels.certify

# Builds the documentation into site/, with warnings as errors; index.html opens from the disk.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(venv)/python -m mkdocs build --strict $(ARGS)
