# The commands of this repository. Each one sets up what it needs; nothing here asks a question.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench bench-serving bench-backup test-long test-gpu bench-gpu clean
PY := .venv/bin/python

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## the virtual environment, from constraints.txt; quick when it is there
	@scripts/bootstrap

demo: setup  ## the main job on real data, from nothing
	@.venv/bin/modelkeep demo

test: setup  ## system packages where it may, lint, all tests but the long ones and those that need a GPU
	@scripts/system-packages
	@scripts/lint
	@$(PY) scripts/run_tests.py unit integration mariadb postgresql e2e

test-long: setup  ## soaks and repetitions, hours allowed
	@scripts/system-packages
	@$(PY) scripts/run_tests.py long

test-gpu: setup  ## tests that need an NVIDIA device
	@$(PY) scripts/run_tests.py gpu

lint: setup  ## ruff and mypy
	@scripts/lint

format: setup  ## what ruff can put right by itself
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup  ## speed, side by side; figures are printed, never asserted
	@$(PY) scripts/run_benchmarks.py

bench-serving: setup  ## our server beside Triton and others, in turns: up to 12 minutes (OPTIONS=--quick: 3)
	@scripts/system-packages
	@$(PY) -m benchmarks.serving_compare $(OPTIONS)

bench-backup: setup  ## backup and recovery beside mariadb-dump, tar and restic: a long time (OPTIONS=--quick: a minute)
	@scripts/system-packages
	@$(PY) -m benchmarks.backup $(OPTIONS)

bench-gpu: setup  ## the same on an NVIDIA device
	@$(PY) scripts/run_benchmarks.py --gpu

clean:  ## everything that setup and tests made here
	rm -rf .venv .setup.lock build dist *.egg-info .test-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
