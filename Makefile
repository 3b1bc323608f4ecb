PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORPUS := runs/corpora/stdlib
OLDEST := .venv-oldest
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' requirements-oldest.txt)
OLDEST_TESTS := core/test_torch_compat.py data_pipeline/corpus/test_remote.py data_pipeline/corpus/test_shards.py \
	data_pipeline/readers data_pipeline/sources/test_sources.py distributed/engines/test_deepspeed.py \
	end_to_end/commands/test_commands.py end_to_end/runs/test_tracking.py launchers pretrain/checkpoint/test_checkpoint.py \
	pretrain/checkpoint/test_checkpoint_remote.py pretrain/config/test_config.py pretrain/engines/test_engine.py \
	pretrain/evaluation/test_curves.py
STDLIB := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

# The tests start hundreds of processes, each of which would compile the modules again.
unexport PYTHONDONTWRITEBYTECODE
# Two workers for two cores. A test of ranks or commands starts processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo corpus test test-again test-fast test-long test-oldest faults slurm soak gpu check recipes docs bench lock clean

help: ## list what make can do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

setup: $(VENV)/.ready ## make .venv with everything pinned in requirements.lock

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Downloading the packages of requirements.lock: about 3 GB where torch is a CUDA build (PyPI's for Linux),"
	@echo "0.5 GB where it is a CPU build. What pip has in its cache is not downloaded again."
	DS_BUILD_OPS=0 $(BIN)/pip install --disable-pip-version-check --progress-bar on --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

corpus: $(CORPUS)/train/manifest.json ## prepare Python's own standard library as a corpus

$(CORPUS)/train/manifest.json: | $(VENV)/.ready
	$(BIN)/byteloom prepare $(STDLIB) --include '*.py' --exclude site-packages --exclude dist-packages \
		--holdout 0.01 --out $(CORPUS)

demo: setup corpus ## train a small model on it for a few minutes and let it write
	$(BIN)/byteloom inspect $(CORPUS)/train
	$(BIN)/byteloom train demo
	@echo; echo "The model continues 'def ':"; echo
	@$(BIN)/byteloom generate runs/demo --prompt 'def ' --bytes 400 --temperature 0.7
	@$(BIN)/byteloom report runs/demo --out runs/demo/report.html
	@echo
	@echo "Corpus:       $(CORPUS)        byteloom inspect $(CORPUS)/train"
	@echo "Run:          runs/demo        config.yaml, train.log, metrics.jsonl, checkpoints/"
	@echo "Samples:      runs/demo/samples, what the model wrote during training; they are in the report too"
	@echo "Report:       runs/demo/report.html, a page for your browser"
	@echo "By document:  $(BIN)/byteloom eval runs/demo"
	@echo "MLflow page:  $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   then open http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning"
	@echo "Continue:     $(BIN)/byteloom train demo train.steps=5000"

test: setup ## run the tests
	$(PYTEST)

test-again: setup ## run the tests that failed last time once more, one at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest --last-failed --last-failed-no-failures none

test-fast: setup ## run the tests that start no process and no server, in a minute
	$(PYTEST) --fast -r fE

test-long: setup ## run the tests that take minutes: full products, real clusters, soaks
	$(PYTEST) -m long --hypothesis-profile=random

test-oldest: ## run a quick part of the tests with the oldest supported versions, in .venv-oldest
	@echo "Downloads the oldest supported versions into $(OLDEST), torch $(OLDEST_TORCH) among them: up to 4 GB."
	$(PYTHON) -m venv $(OLDEST)
	sed 's/^torch==.*/torch==$(OLDEST_TORCH)/' requirements-oldest.txt > $(OLDEST)/constraints.txt
	DS_BUILD_OPS=0 $(OLDEST)/bin/pip install --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -n 2 --dist loadfile $(addprefix tests/,$(OLDEST_TESTS))

faults: setup ## kill the ranks of 200 small runs, and look whether each goes on
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --rounds 200

slurm: setup ## submit runs to a real Slurm cluster on this machine, and bring every fault on them
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long tests/slurm -s

MINUTES ?= 60
soak: setup ## bring random faults on one run of a Slurm cluster for an hour (MINUTES=60)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.slurm.soak --minutes $(MINUTES)

gpu: ## check and measure everything that needs a GPU, in ten minutes; on a CPU, toy sizes (PYTHON=python3 needs torch)
	$(PYTHON) benchmarks/gpu.py

check: setup ## lint, formatting, types, and the walls between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

recipes: setup ## write the recipes debug again, with the comments and fields of the config
	$(BIN)/python -m pretrain.config.annotation

docs: setup ## build the documentation site, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/site. Read it with: $(BIN)/python -m http.server --directory build/site 8000"

bench: setup ## quick benchmarks; docs/lab/benchmarks.md has full ones
	$(BIN)/python benchmarks/training.py --quick
	$(BIN)/python benchmarks/models.py --quick
	$(BIN)/python benchmarks/attention.py --quick
	$(BIN)/python benchmarks/checkpointing.py --quick
	$(BIN)/python benchmarks/checkpoint.py --quick
	$(BIN)/python benchmarks/initial.py --quick
	$(BIN)/python benchmarks/engines.py --quick
	$(BIN)/python benchmarks/generation.py --quick
	$(BIN)/python benchmarks/prepare.py --quick
	$(BIN)/python benchmarks/loader.py --quick
	$(BIN)/python benchmarks/scale.py --quick
	$(BIN)/python benchmarks/shuffle.py --quick

lock: ## pin what pyproject.toml allows today into requirements.lock
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet torch==2.13.0
	DS_BUILD_OPS=0 .lock-venv/bin/pip install --quiet --editable '.[dev,docs]'
	{ echo "# Every package of the environment, pinned; made by 'make lock', installed by 'make setup'."; \
		echo "# Where torch is a CUDA build, it pins its own CUDA packages."; \
		.lock-venv/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//'; } > requirements.lock
	rm -rf .lock-venv

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(OLDEST) .lock-venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
