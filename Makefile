# Every target makes the environment that it needs; PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# On Linux, the package index has torch as a CUDA build of several gigabytes. A machine without nvidia-smi takes PyTorch's
# own CPU build instead, unless pip is told of other places (PIP_..., pip.conf). TORCH_INDEX=URL names one, TORCH_INDEX=
# takes what pip's index has.
TORCH := $(shell grep ^torch== constraints.txt)
CPU_BUILDS := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(shell [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
	&& ! $(PYTHON) -m pip config list 2>/dev/null | grep -Eq 'index-url|find-links' && echo $(CPU_BUILDS))

.PHONY: run test gpu lint notebooks docs deepspeed reasoning-gym wheel env
run: env
	$(BIN)/python -m espo_lightning.fit

test: env
	$(BIN)/python -m pytest

# what differs on a GPU, tested on one; then an 8B policy, timed in ten minutes at most. Without one, a sentence
gpu: env
	@if $(BIN)/python benchmarks/gpu.py --found; then \
		$(BIN)/python -m pytest -n 0 -m gpu && $(BIN)/python benchmarks/gpu.py; \
	else echo "make gpu: torch sees no GPU on this machine, so that nothing was tested or measured"; fi

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# all of them at full scale, in place; NOTEBOOKS="--name=01" runs one, --reduced=true a quick check
notebooks: env
	$(BIN)/python -m espo_lightning.notebooks $(NOTEBOOKS)

# the documentation, as a site in build/site, and its test: every link, and in a Chromium if there is one every page
docs: env
	$(PIP) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -m slow tests/test_site.py tests/test_front.py

# the tests of an optional package, which stays in the environment; it builds only where torch is
deepspeed: env
	$(PIP) 'setuptools>=77'
	$(PIP) -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pytest tests/test_deepspeed.py

# the tests of another optional package; its pycosat, of which there is no wheel, needs a C compiler
reasoning-gym: env
	$(PIP) -c constraints.txt -e '.[reasoning-gym]'
	$(BIN)/python -m pytest tests/test_reasoning_gym.py

# dist/espo_lightning-VERSION-py3-none-any.whl, with assets, experiments and notebooks
wheel: env
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

env: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "torch: from $(if $(TORCH_INDEX),$(TORCH_INDEX); TORCH_INDEX= takes that of )pip's own index"
	$(if $(TORCH_INDEX),$(PIP) --retries 1 --no-deps --index-url $(TORCH_INDEX) $(TORCH) || echo "not there; from pip's index",)
	$(PIP) -c constraints.txt -e '.[test,notebooks,wandb]'
	touch $@
