# make quickstart  sets up a virtual environment, trains on the embedded faces and shows where they are
# make test        sets up and runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test setup

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

quickstart: setup
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train_unet.py --config configs/quickstart.yaml
	@echo "The faces: $$(ls runs/quickstart/samples/*.png | tail -n 1)"

test: setup
	$(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile
