# Everything a user or contributor types. Each target makes the environment it needs from the lock files first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export HPC_CIFAR_DATA ?= $(CURDIR)/data
export HPC_CIFAR_RUNS ?= $(CURDIR)/runs
export PYTHON
# where `make systems` trains: beside the checkout, so that no other checkout and no clean has to do with it
SYSTEMS_RUNS ?= $(abspath $(CURDIR)/../systems-runs)
# trainings in the background wait meanwhile, by the lock HPC_CIFAR_BUSY_FILE
QUIET := .venv/bin/python benchmarks/quiet.py
CLUSTER := slurm/testbed/cluster.py
# two test clusters: their jobs wait for much else than a processor
CLUSTERS := -n 2 --dist loadfile --no-loadscope-reorder
# one worker a processor, eight at most: each imports torch
PARALLEL := -n $(shell n=$$(nproc); echo $$((n < 8 ? n : 8))) --dist worksteal

OLDEST_WANDB = $(shell sed -nE 's/^ *"wandb>=([0-9.]+)",/\1/p' pyproject.toml)

.PHONY: help run test test-full test-slurm test-wandb unit unit-all coverage lint format lock ffcv-wheel container-base container \
  container-test container-apptainer slurm-up slurm-down soak faults histories fuzz systems figures clean env env-dev

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 21

run: env ## prepare data, train jobs/quickstart.yaml with two processes, print the result
	@dataset=$$(.venv/bin/hpc-cifar prepare --or-digits --print-dataset); \
	case $$dataset in \
	  cifar10) job=jobs/quickstart.yaml ;; \
	  digits) job=jobs/quickstart-digits.yaml ;; \
	  *) echo "run: prepare named the dataset '$$dataset', neither cifar10 nor digits" >&2; exit 1 ;; \
	esac; \
	exec .venv/bin/hpc-cifar submit "$$job" --cluster local --follow

test: ## every test, those of Slurm on several versions of it; ARGS="-k name" passes options to pytest
	@scripts/system_packages.sh
	@scripts/environment.sh dev
ifneq ($(strip $(ARGS)),)
	$(QUIET) .venv/bin/python -m pytest $(ARGS)
else
	@$(QUIET) .venv/bin/python scripts/run_tests.py
endif

test-full: ## every test, all those of Slurm on every version; writes docs/results/test-full.json; ARGS='--only "slurm 24.11"'
	@scripts/system_packages.sh
	@scripts/environment.sh dev
	@$(QUIET) .venv/bin/python scripts/run_tests.py --full $(ARGS)

test-slurm: ## the tests of Slurm on VERSION=24.11 (or 22.05, 26.05), in a Debian root that holds it (root); ARGS="-k name"
	@scripts/system_packages.sh
	@scripts/environment.sh dev
	$(QUIET) .venv/bin/python slurm/testbed/roots.py within $(or $(VERSION),24.11) \
	  .venv/bin/python -m pytest tests/slurm $(or $(ARGS),-m "not alone" $(CLUSTERS))

test-wandb: env-dev ## the tests of W&B with the oldest client that pyproject.toml allows
	.venv/bin/python -m pip install --quiet --upgrade --no-deps --target build/oldest-wandb "wandb==$(OLDEST_WANDB)" "protobuf<7" sentry-sdk
	PYTHONPATH=$(CURDIR)/build/oldest-wandb PYTHONWARNINGS=ignore $(QUIET) .venv/bin/python -m pytest \
	  tests/track tests/report/test_wandb_report.py $(PARALLEL) $(ARGS)

unit: env-dev ## the fast tests: CPU, no root, no network, under two minutes
	.venv/bin/python -m pytest -m "not slow and not component" $(ARGS)

unit-all: ## the fast tests on Python 3.11, 3.12 and 3.13, each in a copy of this checkout; PYTHONS=, TORCH=2.11
	@scripts/unit_all.sh

lint: env-dev ## ruff, ruff format, mypy --strict, hadolint, known vulnerabilities of the lock files
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy --config-file tests/mypy.ini tests
	.venv/bin/hadolint Containerfile
	@scripts/audit.sh

coverage: ## branches of the package that the tests take, as far as they run here; fails below 90 % (COVERED=90)
	@scripts/system_packages.sh
	@scripts/environment.sh dev
	.venv/bin/coverage erase
	HPC_CIFAR_REQUIRE= $(QUIET) .venv/bin/coverage run -m pytest tests/slurm -m "not alone" $(CLUSTERS)
	HPC_CIFAR_REQUIRE= $(QUIET) .venv/bin/coverage run -m pytest --ignore tests/slurm -m "not alone" $(PARALLEL)
	.venv/bin/coverage combine --quiet
	.venv/bin/coverage report
	@mkdir -p build
	.venv/bin/coverage json --quiet -o build/coverage.json
	@.venv/bin/python scripts/check_coverage.py build/coverage.json $(or $(COVERED),90)

format: env-dev ## rewrite the code as ruff wants it
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: ## regenerate the lock files (UPGRADE=1: newest versions)
	@scripts/lock.sh

ffcv-wheel: env-dev ## an FFCV wheel for this Python that needs no root and no OpenCV, in dist/
	@PYTHON=.venv/bin/python scripts/ffcv_wheel.sh dist

container-base: ## a Debian base image where none can be pulled (root, mmdebstrap)
	@scripts/container.sh base

container: ## build the container image with podman; BASE_IMAGE=, IMAGE=, CA_FILE=, BUILD_OPTIONS=
	@scripts/container.sh build

container-test: ## build it twice, compare, train in it with FFCV and DALI as a cluster would; ONCE=1: one build
	@scripts/container.sh test

container-apptainer: env ## the image as a SIF file, checked by Apptainer, which then runs a job that submit has written
	@scripts/container.sh apptainer

slurm-up: env ## start a three-node Slurm cluster on this machine (root; says how to use it); ARGS=--accounting
	@.venv/bin/python $(CLUSTER) up $(ARGS)

slurm-down: ## stop it
	@.venv/bin/python $(CLUSTER) down

soak: env ## jobs under random preemption, cancels and node losses on a test cluster (root); ARGS="--minutes 5 --jobs 20"
	$(QUIET) .venv/bin/python slurm/testbed/soak.py $(ARGS)

faults: env-dev ## runs killed at 200 random moments, compared with one that was not (KILLS=200)
	HPC_CIFAR_KILLS=$(or $(KILLS),200) $(QUIET) .venv/bin/python -m pytest tests/train/test_faults.py -s $(ARGS)

systems: env-dev ## train every published system that needs no downloaded weights, in the background of other work; ARGS=--list
	HPC_CIFAR_RUNS="$(SYSTEMS_RUNS)" .venv/bin/python benchmarks/systems.py --background $(ARGS)

histories: env-dev ## 100,000 histories of runs in virtual time, 2,000 of them again over real run directories (HISTORIES=100000)
	HPC_CIFAR_HISTORIES=$(or $(HISTORIES),100000) HPC_CIFAR_HISTORIES_ON_DISK=2000 .venv/bin/python -m pytest tests/life $(PARALLEL) $(ARGS)

fuzz: env-dev ## 10,000 damaged files met by commands in process, 200 by real ones; writes docs/results/fuzz.json (CASES=, COMMANDS=)
	HPC_CIFAR_FUZZ=$(or $(CASES),10000) HPC_CIFAR_FUZZ_COMMANDS=$(or $(COMMANDS),200) HPC_CIFAR_FUZZ_RESULTS=docs/results/fuzz.json \
	  $(QUIET) .venv/bin/python -m pytest tests/fuzz -n0 $(ARGS)

figures: env-dev ## make every table and plot of the docs again from the JSON in docs/results
	.venv/bin/python benchmarks/figures.py

clean: ## remove the environment and caches; data and runs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './data/*' -not -path './runs/*' -prune -exec rm -rf {} +

env: ## the environment of the base lock
	@scripts/environment.sh base

env-dev: ## the environment of the tests
	@scripts/environment.sh dev
