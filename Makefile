# Developer loop: `make dev` builds the C++ module into engine/ and makes the symlink through which the packages are
# imported as ktransformers.* from the checkout (PYTHONPATH=build/ns).
PY ?= python3
dev:
	mkdir -p build/ns && ln -sfn ../.. build/ns/ktransformers
	cmake -S csrc -B build/dev -G Ninja -DCMAKE_CXX_COMPILER_LAUNCHER=$$(command -v ccache) \
	  -DPython_EXECUTABLE=$$($(PY) -c 'import sys; print(sys.executable)') -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/engine > /dev/null
	cmake --build build/dev
.PHONY: dev
