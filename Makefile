# Each target sets up .venv by itself: once, and again when what it is made of changes.
PYTHON ?= python3
PROTOCOL ?= quick
TABLES_cpu := pilot,schedules,constant,gamma
TABLES_folds := tuning,budget,half,quarter,rivals,others,precision,scale_tuning,scale
TABLE ?= $(or $(TABLES_$(PROTOCOL)),overview)
LAUNCHER ?= joblib
ARGS ?= # overrides for every run of a table, such as epochs=1
SHARPNESS ?= # 1: also measure the sharpness of the runs
REUSE ?= # 1: runs recorded in results/<protocol>/runs.csv count as complete and stay as they are
PRINT ?= # 1: also write the tables as LaTeX and the figures as PDF
RATE ?= # images a second of one propagation, for the plan; by default it is measured
JOBS ?= # processes at once, with joblib; by default one a core
BIN := .venv/bin

WHICH = --protocol $(PROTOCOL) --table $(TABLE)

.PHONY: data reproduce-tables tables plan readme test test-slow test-all test-examples crash-test bit-for-bit benchmark \
	theory lint format clean

# Runs what is missing and writes the tables. Interrupted, it goes on when it is repeated.
reproduce-tables: .venv/stamp
	$(BIN)/python scripts/reproduce.py $(WHICH) $(if $(filter-out 0,$(REUSE)),--reuse) $(if $(filter-out 0,$(SHARPNESS)),--sharpness) $(if $(filter-out 0,$(PRINT)),--print) --launcher $(LAUNCHER) $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

# CIFAR-10 as JPEG files, for protocol=cpu, folds and gpu: unpacked from ARCHIVE where data/cifar10 is not there, and verified.
data: .venv/stamp
	$(BIN)/python scripts/data.py $(if $(ARCHIVE),--archive $(ARCHIVE))

# Writes the tables of what has run so far, also while make reproduce-tables is running.
tables: .venv/stamp
	$(BIN)/python scripts/reproduce.py $(WHICH) --collect $(if $(filter-out 0,$(PRINT)),--print) $(ARGS)

# Prints what runs, propagations and hours the tables still need.
plan: .venv/stamp
	$(BIN)/python scripts/plan.py $(WHICH) $(if $(filter-out 0,$(REUSE)),--reuse) $(if $(RATE),--images-per-second $(RATE)) $(ARGS)

readme: .venv/stamp
	$(BIN)/python scripts/readme.py

test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

# What kills drivers, starts two of them, or goes through a cluster's launcher.
test-slow: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Both together: less than one after the other, as what they share is made once. The next target, too, where it was made.
test-all: .venv/stamp $(if $(wildcard .venv-examples),test-examples)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# RST in Lightning, transformers and Accelerate, with the examples of each.
test-examples: .venv-examples/stamp
	OMP_NUM_THREADS=1 .venv-examples/bin/python -m pytest tests/frameworks

# Does the same short runs with the code of a commit and of HEAD, and compares weights and metrics: AGAINST=COMMIT.
bit-for-bit: .venv/stamp
	$(BIN)/python scripts/bit_for_bit.py $(AGAINST)

# Kills 78 small runs at 20 random points each: 40 minutes on one core.
crash-test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python scripts/crash_test.py

# Training's cost against its arithmetic limit and other implementations: 10 minutes on two cores.
# ARGS="--sections steps" for a part, "--sections steps --against COMMIT" for the optimizer before and after,
# "--device cuda" on a GPU.
benchmark: .venv/stamp
	$(BIN)/python -m scripts.benchmark $(ARGS)

# Tests the predictions of docs/theory.md and remakes results/theory, in a quarter of an hour; interrupted, it goes on
# when repeated, if nothing is changed. ARGS=--collect remakes its figures and tables from the records.
theory: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.theory $(ARGS)

lint: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Hydra caps Python; the optimizer alone (pip install .) does not.
.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Has the packages of .venv, and its own before them.
.venv-examples/stamp: .venv/stamp examples/requirements.txt
	$(BIN)/python -m venv .venv-examples
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(.venv-examples/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	.venv-examples/bin/python -m pip install --quiet --requirement examples/requirements.txt
	@touch $@

clean: # all but the runs
	rm -rf .venv .venv-examples
