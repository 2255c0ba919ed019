# One word each: demo, test, bench, lint. `make demo` and `make test` need Python >= 3.11, pip and a C++
# compiler, nothing else: they make .venv, install torch, build the extension, and run.

PYTHON ?= python3
VENV ?= .venv
# Pinned, so that pip does not choose a CUDA build of several gigabytes. On an index without CPU builds of
# this version: make TORCH_SPEC="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= 2.13.0
TORCH_SPEC ?= torch==$(TORCH)
# Where CMake keeps its objects; tests/test_install.py builds a wheel from them.
BUILD ?= build/dev
export CFL_OPS_BUILD_DIR = $(BUILD)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt pyproject.toml
# Processes that share the tests, a thread each.
WORKERS ?= 2
PYTEST ?= $(BIN)/python -m pytest

.PHONY: demo test test-torch test-slow bench bench-gpu gpu-check fuzz lint imports format clean help
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("cfl_ops needs Python >= 3.11, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH_SPEC)
	$(PIP) install -q "cmake>=3.26" ninja "pybind11>=2.13" "scikit-build-core>=0.11" build
	touch $@

# A second run rebuilds only what changed: $(BUILD) keeps the objects.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q --no-build-isolation -e . -Cbuild-dir=$(BUILD)
	touch $@

$(VENV)/.demo: $(VENV)/.built
	$(PIP) install -q --no-build-isolation -e ".[demo]" -Cbuild-dir=$(BUILD)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q --no-build-isolation -e ".[demo,test,bench]" -Cbuild-dir=$(BUILD)
	@# For its interpreter, where torch brought none of its own; where there is no such wheel those tests skip.
	-$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install -q "triton==3.6.0"
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install -q "ruff==0.17.6" "mypy==2.4.1" "import-linter==2.17" "clang-format==23.1.5" pre-commit
	touch $@

demo: $(VENV)/.demo ## train closed-form heads beside their rivals on real images, write an HTML report
	$(BIN)/python -m cfl_ops demo $(DEMO_ARGS)

test: $(VENV)/.test ## all quick tests (under 15 minutes on two cores)
	OMP_NUM_THREADS=1 $(PYTEST) tests -n $(WORKERS) $(TEST_ARGS)

test-torch: ## the same tests on another torch, in a venv and a build of its own: make test-torch TORCH=2.11.0
	@# Where that torch has CUDA its kernels are built for one architecture, to save minutes: none of them runs.
	CUDAARCHS=90 $(MAKE) test VENV=.venv-torch-$(TORCH) BUILD=build/torch-$(TORCH)

test-slow: $(VENV)/.test ## the long tests: streams of 10^6 updates, a thousand seeds
	$(PYTEST) tests -m slow --timeout 7200 $(TEST_ARGS)

bench: $(VENV)/.test ## ratios to the strongest peers, with FLOP and byte floors
	$(BIN)/python -m pytest benches -q --benchmark-disable-gc --timeout 3600 $(BENCH_ARGS)

bench-gpu: ## ceilings, each op over its floor and its peers, T1; with the Python that holds the CUDA torch (PYTHON=...)
	$(PYTHON) benches/gpu_table.py $(BENCH_ARGS)
	$(PYTHON) benches/paper/t1_gpu.py $(T1_ARGS)

gpu-check: ## on a CUDA machine, no network: build, GPU tests, tables, sanitizer; LIMIT=320 RUN=first (or second)
	PYTHON=$(PYTHON) bash benches/gpu_first.sh $(or $(LIMIT),320) $(or $(RUN),first)

lint: $(VENV)/.lint ## ruff, mypy --strict, the directions of imports, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory imports
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

imports: $(VENV)/.lint ## which folder imports which (docs/architecture.md)
	@# -S: the finder of the editable install would give it the whole repository as cfl_ops.
	PYTHONPATH=python:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(BIN)/python -S $(BIN)/lint-imports --no-cache --no-logo

format: $(VENV)/.lint ## what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

FUZZ_RUNS ?= 1000000
FUZZ_CALLS ?= 100000
FUZZ_FILES ?= 1000000
FUZZ_DELTAS ?= 100000
FUZZ_SEED ?= 0
fuzz: $(VENV)/.test ## a million mutated payloads (ASan, UBSan) and files into the codec's readers, 10^5 calls of all ops at guard pages
	bash csrc/fuzz/run.sh $(FUZZ_RUNS)
	bash csrc/fuzz/run.sh $(FUZZ_RUNS) delta
	$(BIN)/python -m tests.fuzz.files --runs $(FUZZ_FILES) --seed $(FUZZ_SEED) --workers $(WORKERS)
	$(BIN)/python -m tests.fuzz.deltas --runs $(FUZZ_DELTAS) --seed $(FUZZ_SEED)
	$(BIN)/python -m tests.fuzz.run --calls $(FUZZ_CALLS) --seed $(FUZZ_SEED) --workers $(WORKERS)

clean: ## remove what was built
	rm -rf build dist $(VENV) .venv-torch-* report
