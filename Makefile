VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check fix docs bench compat zoo fuzz

demo: $(READY)  ## compress a real model and show what was kept and lost
	$(BIN)/fasc demo

test: $(READY)  ## the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)  ## format, lint, types, layering, spelling, freshness of docs/cli.md
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell src tests benchmarks docs README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/python docs/write_cli.py --check

fix: $(READY)  ## what can be mended without thinking
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks

docs: $(READY)  ## regenerate docs/cli.md and build the site
	$(BIN)/python docs/write_cli.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## cost of measuring, against a plain forward and backward pass
	$(BIN)/python benchmarks/collect.py

zoo: $(READY)  ## every causal architecture of the installed transformers; writes docs/architectures.md
	$(BIN)/python benchmarks/zoo.py

fuzz: $(READY)  ## thousands of damaged inputs, kill points of every verb; writes the tables of docs/security.md
	$(BIN)/python benchmarks/fuzz.py

compat: $(READY)  ## every tool that can use a checkpoint, in fresh environments; VLLM=python adds vLLM
	$(BIN)/python benchmarks/compat.py $(VLLM)

$(READY): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)
