# Everything runs in .venv, which `setup` makes. To use an environment of your own: make demo PYTHON=path/to/python

VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# vLLM's own environment: it pins other versions than ours.
VLLM_VENV ?= .venv-vllm

# The Python that makes .venv: the first that is new enough.
BASE_PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Where the CPU build of torch comes from. For the CUDA build: make setup TORCH_INDEX=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Nothing to set up for an interpreter that was given.
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)

.PHONY: help setup demo test test-compiled test-slurm test-vllm clients test-all bench guard lint docs release clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## make .venv with the versions in constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 or newer is needed; make setup BASE_PYTHON=path/to/python"; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --no-deps -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PYTHON) -m pip install -c constraints.txt -e '.[train,client,private,detectors,eval,harness,dev]'
	touch $@

demo: $(READY) ## train an SGT on the shipped trunk, export it, print before and after (FRESH=1: start over)
	$(PYTHON) -m sgt_titan.demo.run $(if $(FRESH),--fresh)

test: $(READY) ## unit, parity and distributed tests on the CPU
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not slurm and not gpu and not vllm and not inductor"

test-compiled: $(READY) ## tensor parallelism under torch's compiler (minutes)
	$(PYTHON) -m pytest -m inductor tests/distributed

test-slurm: $(READY) ## what a cluster does to a run, on a real Slurm of four virtual nodes (root; installs Slurm)
	$(PYTHON) -m pytest -m slurm tests/slurm

test-vllm: $(READY) $(VLLM_VENV)/.ready ## client and proxy against a real vLLM on the CPU, set up in .venv-vllm
	$(PYTHON) -m pytest -m vllm tests/vllm

$(VLLM_VENV)/.ready: tests/vllm/install.py
	$(BASE_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python tests/vllm/install.py --torch-index '$(TORCH_INDEX)'
	touch $@

clients: $(READY) .venv-clients/.ready ## the table of clients in docs/SERVING.md, by running them (needs node and npm)
	$(PYTHON) tests/clients/table.py --write
	$(PYTHON) tests/prose.py --write docs/SERVING.md

.venv-clients/.ready: tests/clients/requirements.txt tests/clients/package.json
	$(BASE_PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q -r tests/clients/requirements.txt
	mkdir -p .venv-clients/node && cp tests/clients/package.json .venv-clients/node/
	npm install --silent --prefix .venv-clients/node
	touch $@

test-all: $(READY) ## also the tests that need a GPU, a Slurm cluster or vLLM
	$(PYTHON) -m pytest

bench: $(READY) ## one page of ratios: steps, loss, starts, memory, tokenizing; 6 minutes (GPU=1: steps of Llama shapes)
	$(if $(GPU),OMP_NUM_THREADS=1 $(PYTHON) benchmarks/training.py --gpu,$(PYTHON) benchmarks/page.py)

guard: $(READY) ## time and memory as ratios, against limits: fails where something has become slower (a minute)
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/guard.py

lint: $(READY) ## ruff (errors, imports, format), spelling, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m codespell_lib
	$(PYTHON) -m mypy

docs: $(READY) ## build the documentation site into site/, with every link checked (needs the extra docs)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

release: $(READY) ## build wheel and sdist into dist/, and try the wheel in empty environments (minutes)
	$(PYTHON) tests/release.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

clean: ## delete .venv (outputs/ stays)
	rm -rf $(VENV)
