# Everything from a fresh clone: `make demo` or `make test` make the virtual environment themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

# The GPU targets need no installation: a Python with torch, Triton and pytest, which may have nothing of ours.
GPU_PYTHON ?= python3
OUT        ?= benchmarks/results/gpu-latest

.PHONY: demo test bench gpu gpu-test gpu-bench gpu-device install lint types docs clean

demo: $(STAMP)
	$(BIN)/seqengine demo $(if $(FASTA),--fasta "$(FASTA)") $(SETTINGS)

# Triton decides at its import whether it interprets: its kernels have a session of their own.
test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q tests/kernels/triton
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

bench: $(STAMP)
	$(BIN)/python benchmarks/conv.py --out benchmarks/results/latest
	$(BIN)/python benchmarks/short_conv.py --out benchmarks/results/latest
	$(BIN)/python benchmarks/recurrence.py --out benchmarks/results/latest
	$(BIN)/python benchmarks/recurrence.py --operators lstm gru elman --heads 1 --name recurrence-one-head --out benchmarks/results/latest
	$(BIN)/python benchmarks/attention.py --out benchmarks/results/latest
	$(BIN)/python benchmarks/loss.py --out benchmarks/results/latest
	$(BIN)/python benchmarks/parallel.py --out benchmarks/results/latest

# Both parts run, whatever the first finds; each command ends in time. Records and the table of errors go to OUT.
gpu: gpu-device
	@status=0; for part in gpu-test gpu-bench; do $(MAKE) --no-print-directory $$part || status=1; done; exit $$status

gpu-device:
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs a CUDA device: torch %s of %s sees none" % (torch.__version__, sys.executable))'

GPU_ENV     = PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONUNBUFFERED=1 OUT="$(OUT)"
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import importlib.util as u; print("-n 6" if u.find_spec("xdist") else "")')

# -c /dev/null: the options of pyproject.toml are for plugins that may be missing here.
gpu-test: gpu-device
	mkdir -p "$(OUT)"
	$(GPU_ENV) timeout -s INT -k 10 210 $(GPU_PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib -p no:cacheprovider \
		-o 'markers=gpu: needs a CUDA device' -q -rfEs $(GPU_WORKERS) tests/gpu

GPU_CONV = benchmarks/conv.py --device cuda --out "$(OUT)" --no-picture --channels 256 --backend torch triton
gpu-bench: gpu-device
	mkdir -p "$(OUT)"
	@status=0; run() { limit=$$1; shift; $(GPU_ENV) timeout $$limit $(GPU_PYTHON) "$$@" || { echo "exit code $$?: $$*" >&2; status=1; }; }; \
	run 90 $(GPU_CONV) --name conv-gated-8 --gated --dtype bfloat16 --lengths 2^10:2^14 --taps T --batch 8 --opponents fft flash-fft-conv; \
	run 100 $(GPU_CONV) --name conv-gated-1 --gated --dtype bfloat16 --lengths 2^15:2^20 2^22 --taps T --batch 1 \
		--most-elements 2^28 --opponents fft flash-fft-conv; \
	run 50 $(GPU_CONV) --name conv-short-filters --dtype bfloat16 --lengths 2^13 2^16 --taps 4 128 512 --batch 4; \
	run 50 $(GPU_CONV) --name conv-float32 --lengths 2^11 2^16 --taps T T/8 --batch 1 --opponents fft; \
	run 30 $(GPU_CONV) --name conv-bidirectional --bidirectional --dtype bfloat16 --lengths 2^14 2^18 --taps T --batch 1 --opponents fft; \
	run 30 benchmarks/short_conv.py --device cuda --out "$(OUT)" --no-picture --dtype bfloat16 --lengths 2^14 2^20 --taps 4 --backend torch triton; \
	run 30 benchmarks/recurrence.py --device cuda --out "$(OUT)" --no-picture --dtype bfloat16 --operators gla simple_gla delta_rule \
		--lengths 2^11 2^14 --loop-most 2^11 --check-most 2^11 --repetitions 3 --backend auto torch triton; \
	run 30 benchmarks/recurrence.py --device cuda --out "$(OUT)" --no-picture --name recurrence-cells --dtype bfloat16 --operators slstm lstm \
		--heads 4 --batch 8 --lengths 2^10 --loop-most 2^10 --repetitions 2 --backend torch triton; \
	run 30 benchmarks/attention.py --device cuda --out "$(OUT)" --no-picture --dtype bfloat16 --lengths 2^12 2^14; \
	run 20 benchmarks/loss.py --device cuda --out "$(OUT)" --no-picture --dtype bfloat16 --width 1024 --lengths 2^13 2^15; \
	exit $$status

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

# Pages made from code and records are written anew; tests compare them.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/config_page.py
	$(BIN)/python docs/commands_page.py
	$(BIN)/python docs/benchmarks_page.py
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
