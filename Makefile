# `make demo` and `make test` need Python >= 3.11 with pip, and make. They set everything up by themselves.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY  := $(VENV)/.ready
# Two test processes of one thread each are faster on two cores than one process of two threads.
WORKERS ?= 2
# worksteal gives each worker one stretch of files, so that a module's fixtures are made once. A worker that is done takes
# tests from the other.

.PHONY: help setup docs dist demo test lint format slow coverage vllm mutants bench gpu gpu-rehearsal studies clean

help:
	@echo "make demo    train the three ensembles of the demo and look at runs/demo/demo.png (minutes)"
	@echo "make docs    build the documentation site into build/site"
	@echo "make dist    build wheel and sdist, check them, and try the wheel in a fresh environment (minutes)"
	@echo "make test    lint, type-check and test"
	@echo "make lint    ruff, import-linter and mypy alone"
	@echo "make slow    the tests that take minutes: real data, three seeds of the demo"
	@echo "make coverage  the tests again, and which lines none of them runs (a figure to look at, not a goal)"
	@echo "make vllm    the tests against a real vLLM, VLLM_PYTHON=… (minutes)"
	@echo "make mutants change one thing at a time in the library, and show what no test notices (SAMPLE=20: 20 mutants of each file)"
	@echo "make bench   what training and decoding cost, beside their peers (minutes)"
	@echo "make gpu     on a machine with a GPU: equalities, speed, memory and a short run, beside their goals (8 minutes)"
	@echo "make studies the longer experiments of the docs (hours)"

setup: $(READY)

# The library alone, which is all that the demo needs.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.11 …')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes the first time, because torch is large"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $(INSTALLED)

# And what tests and checks need.
$(READY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

# A broken link or a misspelt word is an error. The site is build/site/index.html.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/codespell README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md docs src examples
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html; for its search: $(BIN)/python -m http.server --directory build/site"

# Builds wheel and sdist in dist/. Checks their metadata and content, and runs the wheel in a fresh environment.
dist: $(READY)
	rm -rf dist build/fresh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/check_dist.py dist
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/fresh && bin/renyi demo --quick --output_dir demo

demo: $(INSTALLED)
	$(BIN)/renyi demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	MYPY_NUM_WORKERS=$(WORKERS) $(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# How much of the library the quick tests run. A figure to look at: a line that is run may still be tested by nothing.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist worksteal --cov renyi --cov-report term:skip-covered

slow: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

# vLLM needs an environment of its own; docs/serving.md says how to make one.
VLLM_PYTHON ?= build/vllm/bin/python

vllm: $(READY)
	@$(VLLM_PYTHON) -c "import vllm" 2>/dev/null || { echo "$(VLLM_PYTHON) has no vLLM. Make an environment for it as docs/serving.md says, and name its Python: make vllm VLLM_PYTHON=…"; exit 1; }
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) $(BIN)/python -m pytest -m slow tests/vllm_plugin -v -s

# Mutation testing; CONTRIBUTING.md explains it. ARGS has more arguments of tests/mutants.py.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutants]'
	$(BIN)/python tests/mutants.py --workers $(WORKERS) $(if $(SAMPLE),--sample $(SAMPLE)) $(ARGS)

# Time and memory, in minutes. On a GPU, run each file by hand with --gpu. Only tables are shown: no progress bars, no
# warnings of libraries to each other.
bench: export PYTHONWARNINGS := ignore
bench: export TQDM_DISABLE := 1
bench: export TRANSFORMERS_VERBOSITY := error
bench: export KINETO_LOG_LEVEL := 99
bench: $(READY)
	$(BIN)/python benchmarks/head.py --rounds 3
	$(BIN)/python benchmarks/joint_step.py --fastest --rounds 1 --leave_out "one member" vmap "one, compiled"
	$(BIN)/python benchmarks/memory.py --tokens 64
	$(BIN)/python benchmarks/ragged.py
	$(BIN)/python benchmarks/decoding.py --batch_sizes 1 --repeats 1
	$(BIN)/python benchmarks/member_parallel.py
	$(BIN)/python benchmarks/dpo_step.py --rounds 1

# On a machine with a GPU, in about eight minutes. ARGS has more arguments of benchmarks/gpu.py.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# The same on the CPU with tiny shapes, in about two minutes; `make slow` does it, too.
gpu-rehearsal: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu.py --rehearsal $(ARGS)

# What ensembles learn, choose and know. Takes hours.
studies: $(READY)
	$(BIN)/python benchmarks/demo_seeds.py
	$(BIN)/python benchmarks/alpha_schedule.py
	$(BIN)/python benchmarks/four_domains.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/critical_alpha.py
	$(BIN)/python benchmarks/alpha_auto.py
	$(BIN)/python benchmarks/annotators.py
	$(BIN)/python benchmarks/conflicted_preferences.py
	$(BIN)/python benchmarks/contested_or_rare.py
	$(BIN)/python benchmarks/powerflow_exact.py
	$(BIN)/python benchmarks/powerflow_answers.py
	$(BIN)/python benchmarks/powerflow_stories.py
	$(BIN)/python benchmarks/mmlu.py --questions 10
	$(BIN)/python benchmarks/translation_words.py
	$(BIN)/python benchmarks/translations.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
