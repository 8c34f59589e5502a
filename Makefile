# Everything a fresh Debian or Ubuntu machine with python3, make and git needs:
#   make run     set up .venv and train the default preset (alfworld-tiny)
#   make test    set up .venv with the test tools and run the tests
#   make smollm2 fetch SmolLM2-135M-Instruct, a small language model, into models/smollm2-135m (98 MB)
#   make docs    set up .venv with Sphinx and build the documentation into build/docs
#   make test-newest    the same in .venv-newest: the newest Python that is found, the newest release of everything
# Arguments go through ARGS:  make run ARGS="--seed 1"   make test ARGS="-k aem -x"

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
ARGS ?=
# Test processes: one more than two cores, because tests also wait; each file stays in one of them, in the order of tests/conftest.py.
WORKERS ?= 3
# One stamp per set of packages: a second call finds it and starts at once, a changed pin makes it stale.
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs

# Tests in an environment without constraints.txt. The quick part has what a new release breaks first: one test or more
# of each interface of jax that is used (jit, donation, meshes, kernels, random numbers, optax's states) and of compiled
# programs. It leaves out what compares our own computations through interfaces that the others already use.
NEWEST := .venv-newest
QUICK := $(addprefix tests/,test_imports.py test_versions.py test_losses.py advantage/test_aem.py \
	sampler/test_sampler.py::test_greedy_equals_the_cacheless_forward sampler/test_compiled.py \
	sampler/test_sharded.py::test_eight_devices_in_int8_equal_one sampler/test_sharded.py::test_a_decode_step_gathers_no_weights \
	sampler/test_ragged.py::test_one_program_serves_all_windows sampler/test_ragged.py::test_a_cache_that_is_written_in_place_is_donated_and_not_copied \
	sampler/test_sampling.py::test_a_row_is_drawn_by_its_own_numbers learner/test_update.py \
	learner/test_lora_update.py::test_only_the_adapter_changes_and_only_its_state_is_donated learner/test_moments.py \
	learner/test_lora_update.py::test_no_copy_of_the_frozen_weights_is_made_for_an_update learner/test_optimizer.py)
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help run test smollm2 docs newest test-newest test-newest-quick lint format types imports check install clean distclean

help:
	@sed -n '2,7p' $(MAKEFILE_LIST) | sed 's/^# *//'
	@echo "also: test-newest-quick, lint, format, types, imports, check (lint, types, imports, test), install, clean, distclean"

$(BIN)/python:
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh $(VENV)

$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing aem_jax into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(RUN_STAMP)
	@echo "installing Sphinx into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

install: $(DEV_STAMP)

run: $(RUN_STAMP)
	$(BIN)/python -m aem_jax.launch $(ARGS)

test: $(DEV_STAMP)
	$(BIN)/python $(PYTEST) $(ARGS)

smollm2: | $(BIN)/python
	@$(BIN)/python scripts/fetch_smollm2.py

# -n -W: a link or a reference that leads nowhere is an error. -E: every page is read again, so none is stale.
docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx -n -W --keep-going -E -q -b html docs build/docs $(ARGS)
	@echo "open build/docs/index.html"

$(NEWEST)/bin/python:
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh --newest $(NEWEST)

newest: $(NEWEST)/bin/python
	@echo "installing the newest releases into $(NEWEST)"
	@$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[test]'
	@$(NEWEST)/bin/python --version
	@$(NEWEST)/bin/python -m pip freeze --exclude-editable | paste -s -d ' ' | fold -s -w 120

test-newest: newest
	$(NEWEST)/bin/python $(PYTEST) $(ARGS)

test-newest-quick: newest
	@# a run, beside the tests; its output follows theirs
	runs=$$(mktemp -d); trap 'kill $$run 2> /dev/null; rm -rf $$runs' EXIT; \
	$(NEWEST)/bin/python -m aem_jax.launch --preset tests/launch/small.toml --runs-dir $$runs > $$runs/output 2>&1 & run=$$!; \
	$(NEWEST)/bin/python $(PYTEST) -m 'not slow' $(QUICK) $(ARGS); tests=$$?; \
	wait $$run; ran=$$?; cat $$runs/output; exit $$((tests ? tests : ran))

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP)
	$(BIN)/pyright
	$(BIN)/python scripts/type_completeness.py

imports: $(DEV_STAMP)
	$(BIN)/python -m pytest -q tests/test_imports.py

check: lint types imports test

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(NEWEST)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(NEWEST) *.egg-info
