# One word for each job; `make help` lists them. Everything real lives in scripts/ and in the tools' own files.
.DEFAULT_GOAL := help
.PHONY: help setup demo lint test test-cgroup2 bench clean
.NOTPARALLEL:

BIN := .venv/bin

help: ## Say what each target does
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 15

setup: ## Install what is missing; afterwards .venv/bin/ringfence works (the second time does nothing)
	@scripts/setup

demo: ## Set up what running needs, then run an untrusted program and show its proof
	@scripts/setup --run-only
	@scripts/demo

lint: setup ## Style, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## Everything: lint, all tests once with coverage, and nothing left behind
	scripts/leftovers > .venv/leftovers-before
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage report
	scripts/leftovers | diff .venv/leftovers-before - || { echo 'left behind by the tests: the lines with >' >&2; exit 1; }

test-cgroup2: setup ## The tests of limits, proofs and rootless use, in a virtual machine that has cgroup v2 alone
	scripts/test-cgroup2

bench: setup ## Run the benchmarks and print their tables
	@set -e; for bench in benches/*.py; do $(BIN)/python "$$bench"; done

clean: ## Remove what setup and the tests wrote into this directory (not the system's packages or images)
	rm -rf .venv .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache agent/build src/ringfence/_agent
	find src tests -name __pycache__ -prune -exec rm -r {} +
