# make demo    plan Llama-3.1-8B for 8 GPUs, then run a small one on 2 CPU ranks
# make test    what CI runs: ruff, mypy --strict, the layer contract, pytest
# make bench   planning time and step overhead against their ceilings
# make fuzz    2,000 random modules, planned, rewritten and compared; goes on where it stopped
# make bench-links   predicted against measured steps on 2 gloo ranks, at full speed and (root) on slow links
# make bench-costs   predicted against measured times: collectives, matmuls, published runs
# make bench-memory  predicted against measured bytes of a rank: 4 models, 2 sizes, training and prefill
# make bench-peers   transformers' own tensor parallelism beside colrow, on 2 gloo ranks: docs/PEER_PLANS.md (resumes)
# make coverage  every model type of transformers, traced, planned and verified: docs/COVERAGE.md (hours; resumes)
# make coverage-check   a dozen rows of docs/coverage.json that this code made, chosen by the commit, run again
# Each makes .venv first, from constraints.txt. A PYTHON of your own: make test PYTHON=/path/to/python3.11

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
# One thread per process: the suite starts several ranks at a time, and CPU seconds are only comparable that way.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test coverage coverage-check bench bench-costs bench-links bench-memory bench-peers fuzz clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy -p colrow
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

coverage: $(STAMP)
	$(BIN)/colrow coverage --jobs 2

coverage-check: $(STAMP)
	$(BIN)/python -m colrow.rewrite.coverage_check

bench: $(STAMP)
	$(BIN)/python tests/bench/run.py

bench-links: $(STAMP)
	$(BIN)/python tests/bench/links.py

bench-memory: $(STAMP)
	$(BIN)/python tests/bench/memory.py

bench-peers: $(STAMP)
	$(BIN)/python tests/bench/peer_plans.py

bench-costs: $(STAMP)
	$(BIN)/python tests/bench/costs.py

fuzz: $(STAMP)
	cd tests && ../$(BIN)/python -m fuzz.run --modules 2000

# torch is asked for by its exact version: pip then takes a CPU build of it (2.13.0+cpu) where one is at hand.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "colrow needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0 -e '.[hf,plot,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
