# Everything a person does here, by name. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The first Python on the PATH that the project supports; name another with PYTHON=...
supported = import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python; do $$p -c '$(supported)' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
BIN := .venv/bin
# Tests side by side; tests/conftest.py says which stay together
JOBS ?= 2
# More arguments for `make run`, `make test`, `make test-long` and `make preview`: make test ARGS='-k spec'
ARGS ?=

# A busy machine must not slow training down
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: help setup run test test-long docs preview readme export clean-nbs lock

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: ## Make or renew the environment .venv
	@$(PYTHON) tools/setup_env.py

run: setup ## Fine-tune the embedded model on the built-in set: the main job
	$(BIN)/unsloth-nb run finetune --preset smollm2-135m $(ARGS)

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup ## Run the tests (make test ARGS='-k spec' for some)
	$(PYTEST) -m 'not long' $(ARGS)

test-long: setup ## Run the campaigns that the tests leave out
	$(PYTEST) -m long $(ARGS)

docs: setup ## Render the site into _docs and check its links
	$(BIN)/python tools/docs.py

preview: setup ## Serve the site on this machine, rendered again after each change
	$(BIN)/python tools/docs.py --preview $(ARGS)

readme: setup ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

export: setup ## Write the modules from the notebooks
	$(BIN)/nbdev-export

clean-nbs: setup ## Strip the notebooks of what git should not see
	$(BIN)/nbdev-clean

lock: setup ## Write requirements.lock for installing without uv
	$(BIN)/python tools/lock.py
