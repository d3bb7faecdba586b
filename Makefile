# A fresh machine needs Python 3.11 or newer, git and make. PYTHON=... picks another interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make the environment in .venv

# torch goes first and alone: resolved together with the rest, a newer build than the pinned one may be chosen.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install ## train a tiny model on this machine's CPU, score it against its base, ask it a question
	$(RUN) -m intern.train experiment=tiny_cpu
	$(RUN) -m intern.evaluate run_dir=latest
	$(RUN) -m intern.query run_dir=latest question="How much did Uber's gross bookings grow in 2024?"

test: install lint ## lint, types, the whole test suite
	$(RUN) -m pytest -n 2 --dist loadfile

lint: install ## ruff, mypy and the direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache
