# mmagic_tome: `make help` lists what there is.
# A machine with its own MMagic (a CUDA machine, say) needs none of this: `pip install -e .` there.

PYTHON ?= python3
VENV ?= .venv
OUT ?= work_dirs/demo
# A process for each core, four at most: every one of them loads torch and diffusers.
PYTEST_ARGS ?= -n logical --maxprocesses 4
BENCHMARK_ARGS ?= small

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
PINNED := $(sort $(wildcard requirements/pinned/*.txt))
# Set-up runs again when, and only when, one of these changes.
SETUP_FILES := $(PINNED) setup.py pyproject.toml mmagic_tome/version.py
STAMP := $(VENV)/.installed-$(firstword $(shell cat $(SETUP_FILES) | cksum))

# Everything below works without a model hub; nothing may wait for one.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-dit test lint format benchmark figures docs wheel clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) PYTEST_ARGS='$(PYTEST_ARGS)'"

venv: $(STAMP) ## create .venv with the pinned versions (only when they changed)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The pinned versions need Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.11 ..." >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "[1/5] torch" && $(PIP) -r requirements/pinned/1-torch.txt
	@echo "[2/5] torchvision" && $(PIP) --no-deps -r requirements/pinned/2-torchvision-no-deps.txt
	@echo "[3/5] other libraries" && $(PIP) -r requirements/pinned/3-libraries.txt
	@echo "[4/5] OpenMMLab" && $(PIP) --no-deps -r requirements/pinned/4-openmmlab-no-deps.txt
	@echo "[5/5] mmagic_tome itself, editable" && $(PIP) --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-* && touch $@

demo: $(STAMP) ## generate images, the baseline's and faster ones side by side
	$(PY) tools/infer.py configs/demo/sd-emoji_cache-balanced.py --compare --work-dir $(OUT) $(DEMO_ARGS)

demo-dit: $(STAMP) ## the same with the demo diffusion transformer
	$(PY) tools/infer.py configs/demo/sd3-emoji_cache-balanced.py --compare --work-dir $(OUT)-dit $(DEMO_ARGS)

test: lint ## lint and all tests
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff check and ruff format --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP) ## mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

benchmark: $(STAMP) ## time baseline, merging and tomesd (BENCHMARK_ARGS='...')
	$(PY) tools/benchmark.py $(BENCHMARK_ARGS)

figures: $(STAMP) ## write all tables and plots of the pages from benchmarks/data
	$(PY) benchmarks/figures.py

docs: $(STAMP) ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir site

wheel: $(STAMP) ## build dist/*.whl
	rm -rf build dist
	$(PY) -m pip --disable-pip-version-check wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist
	@ls -l dist

clean: ## remove build products and outputs (.venv stays)
	rm -rf build dist outputs site work_dirs *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
