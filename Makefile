# make demo    four small continual-pretraining runs and the page that compares them
# make test    the tests
# make lint    ruff and mypy
# Each installs what it needs into $(VENV) first.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUNS ?= runs
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CPT := $(BIN)/deepspeed launch/cpt.py --config ds_configs/zero2.json

.PHONY: install demo test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(CPT) --runs $(RUNS) name=demo_ft mask.enabled=false
	$(CPT) --runs $(RUNS) name=demo_ft_half_lr mask.enabled=false optimizer.lr=5.0e-4
	$(CPT) --runs $(RUNS) name=demo_random mask.criterion=random
	$(BIN)/deepspeed launch/cpt.py --config ds_configs/zero2.json --runs $(RUNS)
	$(BIN)/python launch/report.py $(RUNS)/demo_ft $(RUNS)/demo_ft_half_lr $(RUNS)/demo_random \
		$(RUNS)/demo --out $(RUNS)/demo_comparison

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
