# Every target makes the environment that it needs; PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test lint notebooks docs deepspeed reasoning-gym env
run: env
	$(BIN)/python -m espo_lightning.fit

test: env
	$(BIN)/python -m pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# all of them at full scale, in place; NOTEBOOKS="--name=01" runs one, --reduced=true a quick check
notebooks: env
	$(BIN)/python -m espo_lightning.notebooks $(NOTEBOOKS)

# the documentation, as a site in build/site, and its test: every link, and in a Chromium if there is one every page
docs: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest -m slow tests/test_site.py tests/test_front.py

# the tests of an optional package, which stays in the environment; it builds only where torch is
deepspeed: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pytest tests/test_deepspeed.py

# the tests of another optional package; its pycosat, of which there is no wheel, needs a C compiler
reasoning-gym: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[reasoning-gym]'
	$(BIN)/python -m pytest tests/test_reasoning_gym.py

env: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,notebooks,wandb]'
	touch $@
