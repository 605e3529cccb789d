# Everything a user or contributor types. Each target makes the environment it needs from the lock files first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export HPC_CIFAR_DATA ?= $(CURDIR)/data
export HPC_CIFAR_RUNS ?= $(CURDIR)/runs
export PYTHON
CLUSTER := slurm/testbed/cluster.py

.PHONY: help run test unit lint format lock slurm-up slurm-down soak clean env env-dev

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

run: env ## prepare data, train jobs/quickstart.yaml with two processes, print the result
	@dataset=$$(.venv/bin/hpc-cifar prepare --or-digits --print-dataset); \
	case $$dataset in \
	  cifar10) job=jobs/quickstart.yaml ;; \
	  digits) job=jobs/quickstart-digits.yaml ;; \
	  *) echo "run: prepare named the dataset '$$dataset', neither cifar10 nor digits" >&2; exit 1 ;; \
	esac; \
	exec .venv/bin/hpc-cifar submit "$$job" --cluster local --follow

test: ## every test; ARGS="-k name" passes options to pytest
	@scripts/system_packages.sh
	@scripts/environment.sh dev
	.venv/bin/python -m pytest $(ARGS)

unit: env-dev ## the fast tests: CPU, no root, no network, under two minutes
	.venv/bin/python -m pytest -m "not slow and not component" $(ARGS)

lint: env-dev ## ruff, ruff format, mypy --strict
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: env-dev ## rewrite the code as ruff wants it
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: ## regenerate the lock files (UPGRADE=1: newest versions)
	@scripts/lock.sh

slurm-up: env ## start a three-node Slurm cluster on this machine (root; says how to use it); ARGS=--accounting
	@.venv/bin/python $(CLUSTER) up $(ARGS)

slurm-down: ## stop it
	@.venv/bin/python $(CLUSTER) down

soak: env ## jobs under random preemption, cancels and node losses on a test cluster (root); ARGS="--minutes 5 --jobs 20"
	.venv/bin/python slurm/testbed/soak.py $(ARGS)

clean: ## remove the environment and caches; data and runs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +

env: # the environment of the base lock
	@scripts/environment.sh base

env-dev: # the environment of the tests
	@scripts/environment.sh dev
