# Everything installs into .venv; each target may be run first, again, and in any order.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: help demo demo-amplification test test-all coverage faults lint docs bench bench-page gpu optimizers-page licences-page lock audit clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/pip: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the versions in constraints.txt need Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip==26.3'
	touch $@

.venv/lab: .venv/pip pyproject.toml
	@echo "installing into .venv (about a minute the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	touch $@

# First what is locked with hashes, then the rest: PyTorch, whose builds differ from place to place, and this package.
.venv/dev: .venv/pip pyproject.toml requirements-dev.lock
	@echo "installing into .venv (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements-dev.lock
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]' --group dev
	touch .venv/lab $@

demo: .venv/lab ## train LeNet on real digits, with and without per-layer rates, and write runs/report.html
	$(BIN)/layerwise demo

demo-amplification: .venv/lab ## train a narrow ResNet with and without amplified gradients, and write runs/report.html
	$(BIN)/layerwise demo amplification

test: .venv/dev ## run the tests without their long matrices, documents and faults (five minutes on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: .venv/dev ## run all tests but the long part of the fault suite (twenty minutes on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --full

# In one process: pytest-xdist kills workers that take more than ten seconds to end, and with them what they measured.
coverage: .venv/dev ## print which lines and branches of the core `make test` does not reach; below 90 % it fails
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest --ignore tests/lab --ignore tests/process/lab --ignore src/layerwise/lab
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

faults: .venv/dev ## the long part of the fault suite too: kills, full disks, mutated files, 100,000 steps (hours)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --faults --full tests/faults

lint: .venv/dev ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/docs: .venv/pip pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

# Not --quiet: it would keep the warnings from --strict, too.
docs: .venv/docs .venv/dev ## build the documentation into site/ (to read it: python -m http.server -d site), and test it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --full tests/docs

.venv/bench: .venv/lab
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	touch $@

bench: .venv/bench ## measure what attaching and the lab cost (PARTS="steps peers" for some of it)
	$(BIN)/python -m benchmarks $(PARTS)

bench-page: .venv/bench ## the same, and write docs/benchmarks
	$(BIN)/python -m benchmarks $(PARTS) --page docs/benchmarks

# Installs nothing, since a build of PyTorch for the GPU is there already.
gpu: ## with PYTHON, whose torch must find a GPU: test and measure on it, and write docs/benchmarks/accelerator.md
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --page docs/benchmarks

optimizers-page: .venv/dev ## try the optimizers of other packages and write docs/optimizers.md
	$(BIN)/python tests/optimizers_page.py

licences-page: .venv/dev ## write docs/licences.md
	$(BIN)/python tests/licences_page.py

.venv/supply: .venv/pip
	$(PYTHON) -m venv .venv/supply-chain
	.venv/supply-chain/bin/python -m pip install --quiet 'pip-audit==2.10.1' 'uv==0.13.9'
	touch $@

lock: .venv/supply ## write requirements-dev.lock: constraints.txt with hashes
	UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/supply-chain/bin/uv pip compile --quiet --no-deps --no-annotate --generate-hashes \
		--no-emit-package torch --output-file requirements-dev.lock constraints.txt

audit: .venv/supply ## ask the registry for known vulnerabilities of what constraints.txt pins
	.venv/supply-chain/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

clean: ## remove what was installed and built; runs/ stays
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis .grimp_cache .coverage .coverage.*
