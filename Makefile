# `make demo` and `make test` do all the set-up they need; `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin
SUITES := core lab trl
# Adapters whose pins clash with the others': each has an environment of its own, .venv-NAME.
APART  := verl openrlhf
ADAPTERS := trl $(APART)
# Suites with tests that need megatron-core.
SPREAD := core+megatron verl+megatron
# How long `make fuzz` runs.
MINUTES ?= 5

# Small models run many times faster on one thread; nothing here may reach for a model hub.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE  := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup environments demo test test-versions test-megatron compatibility fuzz lint format bench bench-gpu gpu-wheels gpu-trainer-wheels gpu-results paper paper-results docs policy clean clean-runs $(APART:%=test-%)
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## Create the virtual environment (all others do it when needed)

$(READY): constraints.txt pyproject.toml integrations/lab/pyproject.toml integrations/trl/pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed to run the adapters") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable '.[capture,report,test,lint,docs]' \
		--editable integrations/lab --editable 'integrations/trl[test]'
	@touch $@

.venv-%/.ready: integrations/%/constraints.txt integrations/%/pyproject.toml pyproject.toml
	@echo "Setting up .venv-$* (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit("Python 3.11 or 3.12 is needed for .venv-$*, this is {}.{}: name one, as in PYTHON=python3.12".format(*sys.version_info))'
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/pip install --quiet --constraint integrations/$*/constraints.txt \
		--editable . --editable integrations/lab --editable 'integrations/$*[test]'
	@if test -e integrations/$*/no-deps.txt; then .venv-$*/bin/pip install --quiet --no-deps \
		--no-build-isolation --requirement integrations/$*/no-deps.txt; fi
	@touch $@

# What a trainer brings along on a machine with a GPU, laid over the adapter's environment.
build/versions/trl/.ready: $(READY)
build/versions/verl/.ready: .venv-verl/.ready
build/versions/openrlhf/.ready: .venv-openrlhf/.ready
# Megatron-core, laid over the library's and VeRL's environments for the tests marked `megatron`.
build/versions/megatron/.ready: constraints-megatron.txt $(READY)
	@echo "Setting up build/versions/megatron"
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --no-deps --target $(@D) --requirement $<
	@touch $@

build/versions/%/.ready: integrations/%/constraints-gpu.txt
	@echo "Setting up build/versions/$*"
	@rm -rf $(@D)
	@PATH="$(abspath .venv-$*/bin):$(abspath $(BIN)):$$PATH" python -m pip install --quiet --no-deps \
		--target $(@D) --requirement $<
	@touch $@

demo: $(READY)  ## Train the embedded policy with TRL under Low2High and write runs/demo
	@$(BIN)/python integrations/trl/examples/demo.py

# All that `make test` runs in; with --jobs they are made side by side.
environments: $(READY) $(APART:%=.venv-%/.ready) $(ADAPTERS:%=build/versions/%/.ready) build/versions/megatron/.ready

test: environments  ## Run every test suite and count what passed, failed and was skipped
	@PATH="$(abspath $(BIN)):$$PATH" sh .ci/suites $(SUITES) $(APART) $(ADAPTERS:%=%+gpu) $(SPREAD)

test-versions: $(ADAPTERS:%=build/versions/%/.ready)  ## Run only the adapters' tests with their GPU extras' versions
	@PATH="$(abspath $(BIN)):$$PATH" sh .ci/suites $(ADAPTERS:%=%+gpu)

compatibility:  ## Write what the last tests ran with into docs/compatibility.md
	@$(PYTHON) .ci/compatibility.py table build/tests

test-megatron: $(READY) .venv-verl/.ready build/versions/megatron/.ready  ## Run only the tests with megatron-core
	@PATH="$(abspath $(BIN)):$$PATH" sh .ci/suites $(SPREAD)

test-verl:  ## Run only the suite of the VeRL adapter, in its own environment
test-openrlhf:  ## Run only the suite of the OpenRLHF adapter, in its own environment
$(APART:%=test-%): test-%: .venv-%/.ready
	@PATH="$(abspath .venv-$*/bin):$$PATH" sh .ci/suites $*

fuzz: $(READY)  ## Run the property tests with fresh random seeds for MINUTES=5
	@$(BIN)/python .ci/fuzz.py $(MINUTES)

lint: $(READY)  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(READY)  ## Rewrite the code in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)  ## Run the benchmarks on this machine
	@$(BIN)/python -m pytest benchmarks --benchmark-only -o filterwarnings=default

bench-gpu: $(READY)  ## Check, tune and time the attention kernels on this GPU, and record it
	@$(BIN)/python benchmarks/kernels/report.py --device cuda --all \
		--record benchmarks/kernels/RESULTS.md

# What a machine with a GPU lacks beside torch, triton, numpy and transformers, and for ten steps of
# TRL. Wheels of pure Python serve every version of it, the others the one named here.
GPU_PYTHON ?= 3.12
WHEELS := build/gpu/wheels
TRAINER_WHEELS := build/gpu/trainer-wheels
CARRIED := einops jaxtyping wadler-lindig beartype pytest pytest-xdist execnet pluggy iniconfig \
	hypothesis sortedcontainers packaging pygments
TRAINER := trl accelerate datasets dill multiprocess psutil xxhash
# TRL imports these as well; they are too large for a folder that has to stay small.
LARGE := pyarrow pandas python-dateutil six tzdata
CARRY = $(PYTHON) -m pip download --quiet --no-deps --only-binary :all:
BINARY := --python-version $(GPU_PYTHON) --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64

gpu-wheels:  ## Fill build/gpu/wheels with all that benchmarks/gpu.sh needs on a strange machine
	@rm -rf $(WHEELS)
	@$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) . integrations/lab integrations/trl
	@$(CARRY) --platform any --implementation py --abi none --dest $(WHEELS) $(CARRIED)
	@$(CARRY) $(BINARY) --constraint constraints.txt --dest $(WHEELS) $(TRAINER)
	@printf '%s\n' tokenweights tokenweights-lab tokenweights-trl $(CARRIED) $(TRAINER) > $(WHEELS)/carried.txt
	@du -sh $(WHEELS)

gpu-trainer-wheels:  ## Fill build/gpu/trainer-wheels with what only the step with TRL needs, 65 MiB
	@rm -rf $(TRAINER_WHEELS)
	@$(CARRY) $(BINARY) --constraint constraints.txt --dest $(TRAINER_WHEELS) $(LARGE)
	@printf '%s\n' $(LARGE) > $(TRAINER_WHEELS)/carried.txt
	@du -sh $(TRAINER_WHEELS)

gpu-results:  ## Put what benchmarks/gpu.sh left in runs/gpu into the tables
	@$(PYTHON) benchmarks/gpu/results.py runs/gpu --record benchmarks/kernels/RESULTS.md

docs: $(READY)  ## Build the documentation site into site/, warnings being errors
	@PYTHONPATH=docs/extensions $(BIN)/zensical build --clean --strict

paper: $(READY)  ## Run the paper's experiments that have no record yet (QUICK=1: a smoke test)
	@$(BIN)/python benchmarks/paper run $(if $(QUICK),--quick)

paper-results: $(READY)  ## Write benchmarks/paper/RESULTS.md and its figures from the records
	@$(BIN)/python benchmarks/paper results

policy: $(READY)  ## Train the embedded policy anew, from nothing
	@$(BIN)/python -m tokenweights_lab.warm_start

clean:  ## Remove the virtual environments and everything that was built, but no run
	rm -rf $(VENV) $(APART:%=.venv-%) build site .cache .pytest_cache .ruff_cache .hypothesis .benchmarks

clean-runs:  ## Remove runs/, with every run and checkpoint in it
	rm -rf runs
