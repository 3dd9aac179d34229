# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers

.PHONY: demo test figures bench bench-peers format clean

demo: $(VENV)/.installed          ## phantom -> pre-train -> fine-tune -> predict -> evaluate -> report
	$(BIN)/glocal demo --out demo

test: $(VENV)/.installed          ## lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto

figures: demo                     ## the pictures of docs/figures, from what the methods do on the phantom; two minutes after the demo
	$(BIN)/python -m figures
	$(BIN)/python -m figures.demo

bench: $(VENV)/.installed         ## what everything costs, beside MONAI, SimpleITK and the bare network; fifteen minutes on a quiet machine
	$(BIN)/python -m benchmarks

bench-peers: $(PEERS)/.installed  ## the rows beside lightly, TorchIO, batchgeneratorsv2, blosc2, which need another PyTorch (6 GB)
	$(PEERS)/bin/python -m benchmarks --peers

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) demo

# The constraints hold every version; a change of them or of pyproject.toml refreshes the environment. What is imported is
# compiled then: to compile all that is installed takes a minute more.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	touch $@

$(PEERS)/.installed: pyproject.toml benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt -e .
	touch $@
