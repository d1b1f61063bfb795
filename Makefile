# Two commands on a fresh machine:  make demo   make test
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test test-slow coverage install lint format clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing (torch with CUDA is some 5 GB; about two minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/distcls prepare digits --out $(DEMO)/digits --write-images
	$(BIN)/accelerate launch --config_file launch/one_process.yaml -m distcls.train \
	  --config configs/digits.yaml --data $(DEMO)/digits --out $(DEMO)/run
	$(BIN)/python -m export.onnx --ckpt $(DEMO)/run/best.pth
	$(BIN)/distcls predict --model $(DEMO)/run/best.onnx $(DEMO)/digits/images/test --out $(DEMO)/pre.csv --show 16
	$(BIN)/distcls evaluate --model $(DEMO)/run/best.onnx --data $(DEMO)/digits --split test --out $(DEMO)/evaluation
	@echo
	@echo "trained      $(DEMO)/run/best.pth      curves $(DEMO)/run/curves.png"
	@echo "exported     $(DEMO)/run/best.onnx"
	@echo "predicted    $(DEMO)/pre.csv           pictures $(DEMO)/pre.png"
	@echo "evaluated    $(DEMO)/evaluation        confusion matrix $(DEMO)/evaluation/confusion.png"

# Three at a time on two cores: much of a test is waiting for processes it has started. A worker
# that dies ends the run: its replacement would wait for ever where it died in the last test of a file.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: install lint
	$(PYTEST) -m "not slow"

# what takes minutes: more variants of the faults, two machines in network namespaces
test-slow: install
	$(BIN)/python -m pytest -m slow

coverage: install
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(DEMO) .venv build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
