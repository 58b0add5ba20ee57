# Every target sets up what it needs in .venv. From outside:
#   PYTHON        the interpreter to start from (3.11 or newer)
#   TORCH         torch's pin; TORCH_INDEX the package index to take it from (say, that of CPU builds)
#   VENV          where the environment lives; EXTRAS which extras of megarlx come along
#   PINNED        how other versions than torch's are pinned; LOCK their wheels' hashes
#   PYTEST        further arguments for pytest
#   OLDEST_TESTS     what test-oldest runs; OLDEST_PYTEST further arguments, say --share 0.2
#   PREBUILT_PYTHON  for cuda-prebuilt: the Python of the machine that the native code is for
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,data,hf,mpi
TORCH_INDEX ?=
# With an NVIDIA driver: the torch that the tested pins of .[cuda] go with.
TORCH ?= $(if $(shell command -v nvidia-smi),torch==2.11.0,torch==2.13.0)
PYTEST ?=
# The versions that the tests ran with; empty: the newest that setup.py allows.
PINNED ?= --constraint tools/constraints.txt
# Where there is such a file for this Python and machine, only wheels of its hashes are installed.
LOCK ?= $(wildcard tools/locked-$(shell $(PYTHON) -c "import platform as p, sys; \
  print('cp%d%d-%s-%s' % (*sys.version_info[:2], p.system().lower(), p.machine()))").txt)
PREBUILT_PYTHON ?= python3.12
OLDEST_TESTS ?= tests/distributed $(addprefix tests/unit/,ops parallel planning model generation)
OLDEST_PYTEST ?=
OLDEST := build/oldest

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
NATIVE := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: help demo study test test-all test-instruction-sets test-oldest check format bench \
  cuda-check cuda-emulate cuda-prebuilt clean
help:
	@echo "make demo | study | test | test-all | test-instruction-sets | test-oldest | check | format | bench | cuda-check | cuda-emulate | cuda-prebuilt | clean"

# torch first: megarlx is compiled against the one that will run.
$(INSTALLED): setup.py pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(LOCK))
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PINNED) "setuptools>=77" wheel pybind11 ninja packaging
	$(BIN)/python -m pip install $(PINNED) --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $(INSTALLED) $(BUILT)

# The installation has just built all of it: then there is nothing to do.
$(BUILT): $(INSTALLED) $(NATIVE)
	@if [ ! -e $@ ] || [ -n "$$(find $(NATIVE) -newer $@ -print -quit)" ]; then \
	  echo "$(BIN)/python setup.py --quiet build_ext --inplace"; \
	  $(BIN)/python setup.py --quiet build_ext --inplace || exit 1; \
	fi
	@touch $@

# Both go on where they were stopped, and reuse what is there.
demo: $(BUILT)
	$(BIN)/megarlx demo

study: $(BUILT)
	$(BIN)/megarlx demo --study

# Tests start many processes: with more than one OpenMP thread each they would wait for each other.
# A file's tests stay together, as they share what is dear to set up.
test test-all test-instruction-sets: export OMP_NUM_THREADS ?= 1
RUN_TESTS = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test: $(BUILT)
	$(RUN_TESTS) -m "not slow" $(PYTEST)

test-all: $(BUILT)
	$(RUN_TESTS) $(PYTEST)

# The ops under every CPU path this machine can run, whichever it would choose by itself.
test-instruction-sets: $(BUILT)
	for isa in default avx2; do \
	  echo "== instruction set: $$isa"; \
	  ATEN_CPU_CAPABILITY=$$isa $(RUN_TESTS) -q -m "not slow" tests/unit/ops $(PYTEST) || exit 1; \
	done

# The oldest torch that setup.py installs, which is the one beside an NVIDIA driver; it runs on a CPU.
# The native code of one tree is built against one torch, so this is a copy of the tree.
test-oldest: export MEGARLX_CUDA ?= 0
test-oldest:
	mkdir -p $(OLDEST)/tree
	find $(OLDEST)/tree -name '*.py' -delete
	git ls-files --cached --others --exclude-standard | tar --create --files-from - \
	  | tar --extract --directory $(OLDEST)/tree
	$(MAKE) --directory $(OLDEST)/tree VENV=../environment TORCH=torch==2.11.0 EXTRAS=dev,data,hf \
	  PYTEST="$(OLDEST_TESTS) $(OLDEST_PYTEST)" test

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_import_order.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# Each alone on the machine: its timings are ratios of what runs in turn in one process.
bench: export PYTHONPATH = $(CURDIR)
bench: $(BUILT)
	$(BIN)/python benchmarks/ops.py --markdown benchmarks/results/ops-cpu.md
	$(BIN)/python benchmarks/training.py --markdown benchmarks/results/training-cpu.md

cuda-check:
	$(PYTHON) tools/cuda_check.py

# The CUDA kernels on this CPU: the tests of ops, and a case for each kernel under the sanitizers.
cuda-emulate: export PYTHONPATH = $(CURDIR):$(CURDIR)/tools
cuda-emulate: $(BUILT)
	$(BIN)/python -m cuda_emulation $(PYTEST)

# The native code for another machine with a card, on this one without.
cuda-prebuilt:
	@$(PREBUILT_PYTHON) -c "" || { \
	  echo "cuda-prebuilt: $(PREBUILT_PYTHON) does not run. Install CPython 3.12 (Debian: apt-get" \
	    "install python3.12-venv python3.12-dev), or name yours: make cuda-prebuilt PREBUILT_PYTHON=…"; \
	  exit 1; }
	$(PREBUILT_PYTHON) tools/cuda_prebuilt.py

clean:
	rm -rf build $(VENV) megarlx/*.so megarlx/_build.json
