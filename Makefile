# The front door. `make help` lists the targets; all of them work from a fresh clone.
#
# `make`, `make demo`, `make test` install the Debian packages that are missing (and say so
# first); OMQ_NO_INSTALL=1 forbids it. JOBS sets the number of parallel compilations.

SHELL := /bin/bash
JOBS ?= $(shell nproc)
export JOBS
PREFIX ?= /usr/local
PYTHON ?= python3
BUILD = cmake --build $(1) --parallel $(JOBS)

.DEFAULT_GOAL := programs
.PHONY: help programs all demo test test-all test-gpu test-neon bench format format-check lint lines \
        golden smollm2 methods ci tiny asan cuda cuda-check embed install clean packages configure

help:
	@echo "make             the programs: build/bin/omq-quant, build/bin/omq-run"
	@echo "make demo        quantise the bundled model to 3 and 2 bits, compare, generate text (< 3 min)"
	@echo "make test        build and run the tests"
	@echo "make test-all    the same with the slow ones, outside projects built against an install, test-neon"
	@echo "make test-neon   the packed kernels of 64-bit ARM, cross-built and run under qemu (build-neon)"
	@echo "make cuda        the programs with CUDA: build-cuda/bin (CUDA_ARCH=90a-real: for one card)"
	@echo "make test-gpu    build the test program that is carried to a machine with a GPU"
	@echo "                 (CUDA_ARCH=90a-real: for one architecture only)"
	@echo "make bench       run the benchmarks"
	@echo "make methods     every method on the real model: docs/methods.md (IDS=… TEXT=… FLAGS=\"--device cuda\")"
	@echo "make smollm2     fetch the real model (SmolLM2-135M, 98 MB) to .cache/smollm2"
	@echo "make golden      write tests/golden again (PYTHON=… with torch and transformers)"
	@echo "make format      clang-format everything;  make lint: clang-tidy;  make lines: lines per folder"
	@echo "make tiny        small static programs and libomq.a in build-tiny, and what they weigh"
	@echo "make asan        build with sanitizers and run the fast tests"
	@echo "make ci          what .ci/run does: format, test, tiny, embed, CUDA compile check, asan"
	@echo "make embed       build and run the C example; make cuda-check: compile the CUDA code"
	@echo "make install     to PREFIX=$(PREFIX) (DESTDIR is honoured);  make clean"

packages:
	@scripts/install-packages.sh build

configure: packages
	@scripts/configure.sh cpu

programs: configure
	@$(call BUILD,build) --target programs

all: configure
	@$(call BUILD,build)

demo: programs
	@scripts/demo.sh build/bin

test: all
	@scripts/run-tests.sh build -LE slow

# ctest's summary comes last.
test-all: all
	@status=0; scripts/test-neon.sh || status=1; scripts/run-tests.sh build || status=1; exit $$status

test-neon:
	@scripts/test-neon.sh

embed: all
	@scripts/run-tests.sh build -L install

cuda: packages
	@command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || \
	  { echo "cuda: no nvcc here; NVIDIA's CUDA toolkit brings it" >&2; exit 1; }
	@scripts/configure.sh cuda $(if $(CUDA_ARCH),-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH))
	@$(call BUILD,build-cuda) --target programs
	@ls -l build-cuda/bin/omq-quant build-cuda/bin/omq-run

test-gpu: packages
	@if ls cuda/*.cu >/dev/null 2>&1; then \
	  scripts/configure.sh cuda \
	    $(if $(CUDA_ARCH),-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCH)) && \
	  $(call BUILD,build-cuda) --target omq-test-gpu omq-bench-device && \
	  ls -l build-cuda/bin/omq-test-gpu build-cuda/bin/omq-bench-device && \
	  echo "carry both to the machine with the GPU; there: scripts/test-gpu.sh"; \
	else echo "test-gpu: SKIPPED, there is no cuda/*.cu in this tree yet"; fi

bench: all
	@for b in build/bin/omq-bench-*; do \
	  [ -x "$$b" ] || { echo "no benchmarks built"; break; }; echo "== $$b"; "$$b" || exit 1; \
	done

format:
	@scripts/install-packages.sh format
	@scripts/format.sh fix

format-check:
	@scripts/install-packages.sh format
	@scripts/format.sh check

lint: all
	@scripts/install-packages.sh lint
	@find tensor autograd nn quant models tools -name '*.cpp' | \
	  while read -r f; do grep -qF "/$$f\"" build/compile_commands.json && echo "$$f"; done | \
	  xargs -r -n 4 -P $(JOBS) clang-tidy -p build --quiet

lines:
	@scripts/lines.sh

golden:
	$(PYTHON) tests/golden/make_golden.py

smollm2:
	@scripts/fetch-smollm2.sh

methods: programs
	@scripts/methods.sh build/bin "$(IDS)" "$(TEXT)" $(FLAGS)

tiny: packages
	@scripts/configure.sh tiny
	@$(call BUILD,build-tiny) --target programs
	@ls -l build-tiny/bin 2>/dev/null | awk 'NF > 8 { printf "%-14s %6.2f MB\n", $$9, $$5 / 1e6 }'
	@for p in build-tiny/bin/omq-*; do [ ! -x "$$p" ] || "$$p" --help >/dev/null || exit 1; done
	@scripts/tiny-sizes.sh build-tiny

asan: packages
	@scripts/configure.sh asan
	@$(call BUILD,build-asan)
	@ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  scripts/run-tests.sh build-asan -LE slow

# Compile only, one architecture: CI has no GPU.
cuda-check: packages
	@if ! ls cuda/*.cu >/dev/null 2>&1; then \
	  echo "cuda-check: SKIPPED, there is no cuda/*.cu in this tree yet"; \
	elif ! command -v nvcc >/dev/null && ! [ -x /usr/local/cuda/bin/nvcc ]; then \
	  echo "cuda-check: SKIPPED, no nvcc here"; \
	else OMQ_BUILD=build-cuda-check scripts/configure.sh cuda \
	    -DCMAKE_CUDA_ARCHITECTURES=90a-real -DOMQ_TESTS=OFF && \
	  $(call BUILD,build-cuda-check) --target omq_cuda; fi

# In order, stopping at the first failure; ends in ctest's summary of the sanitizer run.
ci:
	@scripts/ci.sh

install: programs
	@cmake --install build --prefix "$(PREFIX)" >/dev/null && echo "installed to $(DESTDIR)$(PREFIX)"

clean:
	rm -rf build build-tiny build-asan build-cuda build-cuda-check build-neon
