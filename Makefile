# A fresh machine needs Python 3.11 or newer, git and make. PYTHON=... picks another interpreter.
PYTHON ?= python3
VENV := .venv
UPSTREAM := .venv-upstream
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help install quickstart demo test test-slow test-real test-upstream test-damage fuzz lint docs

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

demo: install ## train a small real model (SmolLM2-135M) on this machine's CPU and ask it a question
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	$(RUN) scripts/get_smollm2.py
	$(RUN) -m intern.train experiment=smollm2_cpu model.pretrained_model_name_or_path=data/smollm2_135m
	$(RUN) -m intern.query run_dir=latest question="How much did Uber's gross bookings grow in 2024?"

test: install lint ## lint, types, the whole test suite
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: install ## the tests that `make test` leaves out: every family of models, kills, several devices (minutes)
	$(RUN) -m pytest -n 2 -m "slow and not real"

test-real: install ## train SmolLM2-135M here and in a plain loop, and compare losses and answers (minutes)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	$(RUN) scripts/get_smollm2.py
	$(RUN) -m pytest -q -s -m real tests/real

# Every library at its newest release, whatever pyproject.toml allows; torch first, for the reason above.
test-upstream: install ## what the newest release of every library would break, in an environment of its own
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch
	$(RUN) scripts/unbounded.py | xargs $(UPSTREAM)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade
	$(UPSTREAM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@echo "newer than this project's bounds:"
	@$(UPSTREAM)/bin/python -m pip check || true
	@$(UPSTREAM)/bin/python -m pytest -q tests/test_upstream.py; names=$$?; \
	$(UPSTREAM)/bin/python -m pytest -q -n 2 --dist loadfile --ignore tests/test_upstream.py; suite=$$?; \
	echo "private names: $$names, suite: $$suite (0: nothing breaks)"; test $$names -eq 0 -a $$suite -eq 0

test-damage: install ## damage the checkpoints of a toy run in every way, and resume each of them (about half an hour)
	$(RUN) scripts/damage_checkpoints.py

MINUTES ?= 10
fuzz: install ## random inputs to the readers of untrusted files for MINUTES=10
	PYTHONPATH=. $(RUN) scripts/fuzz.py --minutes $(MINUTES)

docs: install ## the documentation as a site in build/docs
	$(RUN) scripts/source_tree.py
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

lint: install ## ruff, mypy and the direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache
