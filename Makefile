# Every target that needs the environment sets it up first; that takes a blink when it is done.
# Paths are relative, so the checkout may lie anywhere.

PYTHON := .venv/bin/python
ARGS :=

.DEFAULT_GOAL := help
.PHONY: help ready setup demo test lint matrix fuzz bench clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

ready:
	@.ci/setup

setup: ready ## Install what is missing, build the native core and the test guest
	@echo "Set up. Next: make demo, make test"

demo: ready ## Run the main job on a real guest; options: make demo ARGS="--action kill"
	@$(PYTHON) -m pyscan demo $(ARGS)

lint: ready ## Check style, types and import contracts
	$(PYTHON) -m ruff check --quiet .
	$(PYTHON) -m ruff format --check --quiet .
	$(PYTHON) -m mypy --strict -p pyscan
	.venv/bin/lint-imports --no-logo

test: lint ## Check everything, then run all tests; options: make test ARGS="-k lab"
	@$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

matrix: ready ## Validate every boot of the matrix; options: make matrix ARGS="--only NAME"
	@PYTHONPATH=tests $(PYTHON) -m matrix.examine $(ARGS)

fuzz: ready ## Fuzz what reads hostile bytes; options: make fuzz ARGS="--seconds 600 elf"
	@$(PYTHON) tests/fuzz/run.py $(ARGS)

bench: ## Measure; options: make bench ARGS="--quick --json FILE"
	@.ci/setup bench
	@$(PYTHON) -m pyscan bench $(ARGS)
	@$(PYTHON) bench/sources.py
	@$(PYTHON) bench/response.py
	@$(PYTHON) -m pytest bench --override-ini "python_files=bench_*.py" \
		--override-ini "python_functions=bench_*" --benchmark-min-rounds=20 \
		--benchmark-max-time=0.2 --benchmark-columns=min,median,max,rounds \
		--benchmark-sort=name --benchmark-disable-gc

clean: ## Remove everything that set-up and the checks made
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf .benchmarks pyscan.egg-info pyscan/digest/*.so pyscan/sources/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
