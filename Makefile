# Every target works as the first command on a fresh machine: the virtual environment is made when it is missing or when
# what it is made from has changed.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

# Waiting threads sleep. If they spin, two programs on the same cores slow each other down many times over.
export OMP_WAIT_POLICY ?= passive

# Processes that run tests side by side
WORKERS ?= 2

VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

# Lies over the environment: bitsandbytes alone
QUANTIZATION ?= .venv-quantization
QUANTIZATION_STAMP := $(QUANTIZATION)/.installed

# The same, with Triton alone
TRITON ?= .venv-triton
TRITON_STAMP := $(TRITON)/.installed

# The lower bounds of pyproject.toml
OLDEST ?= .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed

# Lies over the environment, too: what the documentation is built with
DOCS ?= .venv-docs
DOCS_STAMP := $(DOCS)/.installed

.PHONY: help install test test-slow test-vllm test-quantization test-triton test-oldest test-newest test-matrix docs docs-serve package lint format demo figure2 frontier clean

help:
	@echo "make test      run the tests, in minutes (ARGS=... goes to pytest, WORKERS=... is the number of processes)"
	@echo "make test-slow run the slow tests: many ranks, notebooks"
	@echo "make test-vllm run the tests on vLLM's CPU build, in an environment of their own (4 GB)"
	@echo "make test-quantization run the tests of QLoRA, with bitsandbytes' CPU build"
	@echo "make test-triton run the tests with TRL's Triton kernels, in Triton's interpreter (1 GB)"
	@echo "make test-oldest run the core tests (tests/core.txt) with the oldest versions that pyproject.toml allows"
	@echo "make test-newest run them with the newest versions on the registry, whatever pyproject.toml allows"
	@echo "make test-matrix run them with each release of TRL in the range, and write docs/compatibility.md's table"
	@echo "make demo      warm-start a small policy and improve it with PROMA, on CPU, in minutes (ARGS=... goes to the demo)"
	@echo "make figure2   compare PROMA with GRPO and REINFORCE on CPU, in under 20 minutes on 2 cores (ARGS=... goes to the recipe)"
	@echo "make frontier  make the comparison of docs/protocol.md, in some 8 hours on 2 cores (ARGS=--quick: 10 minutes)"
	@echo "make docs      build the documentation in site/; a warning is an error"
	@echo "make docs-serve build it and serve it on this machine, again after each change"
	@echo "make package   build the sdist and the wheel, check them, and use the wheel in an environment of its own (1 GB)"
	@echo "make lint      check style and formatting"
	@echo "make format    repair style and formatting"
	@echo "make install   only make the virtual environment"
	@echo "make clean     remove the virtual environment, caches and runs"

$(STAMP): requirements/tested.txt pyproject.toml scripts/install.sh scripts/environment.sh
	PYTHON="$(PYTHON)" bash scripts/install.sh "$(VENV)"
	@touch $@

install: $(STAMP)

# The tests of a file stay together, as they share what takes long to make
PYTEST := $(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

$(VLLM_STAMP): requirements/tested_vllm.txt pyproject.toml scripts/install_vllm.sh scripts/environment.sh
	PYTHON="$(PYTHON)" bash scripts/install_vllm.sh "$(VLLM_VENV)"
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/engine $(ARGS)

# A directory with a pin set that lies over the environment
overlay = $(RUN) -m pip --disable-pip-version-check install --no-deps --upgrade --target "$(1)" --requirement $(2)

$(QUANTIZATION_STAMP): $(STAMP) requirements/tested_quantization.txt
	$(call overlay,$(QUANTIZATION),requirements/tested_quantization.txt)
	@touch $@

test-quantization: $(QUANTIZATION_STAMP)
	PYTHONPATH="$(QUANTIZATION)" $(RUN) -m pytest tests/trainer/test_quantization.py $(ARGS)

$(TRITON_STAMP): $(STAMP) requirements/tested_triton.txt
	$(call overlay,$(TRITON),requirements/tested_triton.txt)
	@touch $@

test-triton: $(TRITON_STAMP)
	PYTHONPATH="$(TRITON)" TRITON_INTERPRET=1 $(RUN) -m pytest tests/trainer/test_triton.py $(ARGS)

$(OLDEST_STAMP): requirements/tested_oldest.txt pyproject.toml scripts/install.sh scripts/environment.sh
	PYTHON="$(PYTHON)" bash scripts/install.sh "$(OLDEST)" requirements/tested_oldest.txt
	@touch $@

# Tests that run on every version of what is extended
test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest @tests/core.txt $(ARGS)

test-newest: $(STAMP)
	$(RUN) scripts/test_matrix.py newest

test-matrix: $(STAMP)
	$(RUN) scripts/test_matrix.py releases $(ARGS)

$(DOCS_STAMP): $(STAMP) requirements/tested_docs.txt
	$(call overlay,$(DOCS),requirements/tested_docs.txt)
	@touch $@

MKDOCS := PYTHONPATH="$(DOCS)" NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs

docs: $(DOCS_STAMP)
	$(MKDOCS) build --strict $(ARGS)

docs-serve: $(DOCS_STAMP)
	$(MKDOCS) serve $(ARGS)

package:
	PYTHON="$(PYTHON)" bash scripts/check_package.sh $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

demo: $(STAMP)
	$(RUN) recipes/demo.py $(ARGS)

figure2: $(STAMP)
	$(RUN) recipes/figure2.py --config recipes/configs/figure2_cpu.yaml --output_dir runs/figure2_cpu $(ARGS)

# It goes on from where it was
frontier: $(STAMP)
	$(RUN) recipes/frontier.py --output_dir $(if $(findstring --quick,$(ARGS)),runs/frontier_quick,runs/frontier) $(ARGS)

clean:
	rm -rf "$(VENV)" "$(VLLM_VENV)" "$(QUANTIZATION)" "$(TRITON)" "$(DOCS)" "$(OLDEST)" .venv-matrix .venv-package site .pytest_cache .ruff_cache build dist *.egg-info runs
