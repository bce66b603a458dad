# Each target works on a fresh machine with Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# accelerate launch computes on one core unless it is told how many there are.
ALL_CORES := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)}

SAMPLE := examples/customer_support/train.csv

.PHONY: help quickstart quickstart-llm quickstart-ko test test-all lint bench clean

help:
	@echo "make quickstart   install, and train a small real model in minutes"
	@echo "make quickstart-llm   install a small language model, and make a sentence encoder of it"
	@echo "make quickstart-ko    the same on Korean data"
	@echo "make test         install what the tests need, and run the quick ones, in minutes"
	@echo "make test-all     run all of them, with coverage"
	@echo "make lint         ruff and mypy"
	@echo "make bench        speed against sentence-transformers and a padded Trainer, in minutes"

quickstart: $(VENV)/.quickstart
	$(ALL_CORES) $(BIN)/accelerate launch train_simcse.py configs/quickstart.yaml --overwrite_output_dir true

quickstart-llm quickstart-ko: quickstart-%: $(VENV)/.gemma
	$(ALL_CORES) $(BIN)/accelerate launch train_simcse.py configs/quickstart_$*.yaml \
		--overwrite_output_dir true

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 4 --dist worksteal --cov=simcse_trainer

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.quickstart
	$(BIN)/python benchmarks/training.py --train_file $(SAMPLE) --steps 4 --rounds 3 --limit
	$(BIN)/python benchmarks/encoding.py --files $(SAMPLE) --sentences 2000 --rounds 3
	$(BIN)/python benchmarks/startup.py --rounds 3
	$(BIN)/python benchmarks/scaling.py --sentences 1000 --rounds 3

clean:
	rm -rf $(VENV) outputs build dist

# One stamp per extra: installed again when the requirements change.
$(VENV)/.%: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable ".[$*]"
	@touch $@
