# Everything from a fresh clone: `make demo` or `make test` make the virtual environment themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: demo test bench install lint types clean

demo: $(STAMP)
	$(BIN)/seqengine demo $(if $(FASTA),--fasta "$(FASTA)") $(SETTINGS)

# Triton decides at its import whether it interprets: its kernels have a session of their own.
test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/kernels/triton
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

bench: $(STAMP)
	$(BIN)/python benchmarks/conv.py --out benchmarks/results/latest

install: $(STAMP)

# Debian ships python3 without the module that makes virtual environments work; root may add it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit("seqengine needs Python 3.11 or 3.12, %s is %d.%d; say make PYTHON=python3.11" % (sys.executable, *v))'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq python3-venv; } \
		|| { echo "python3 cannot make virtual environments: run  apt-get install python3-venv  and make again" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
