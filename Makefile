# SPDX-License-Identifier: Apache-2.0
# make cuda-check compiles the CUDA sources and needs nvcc only; make cuda-shim runs them without a
# device, on the CPU; make bench-cuda builds for, tests on and measures a CUDA device, with a Python
# whose torch sees it, and installs nothing.
# make demo, test, bench, quality, lint: each makes .venv, installs torch and what it needs, builds
# pyseq, and runs. A second call does again only what a change of the sources asks for.
# Set on the command line: PYTHON (makes .venv), TORCH (what pip installs as torch), MAX_JOBS,
# DEVICE (where the demo's model is: cpu or cuda), BENCH (options of the benchmark, such as
# BENCH='--only scan-training --threads 2'), QUALITY (those of the quality page, such as
# QUALITY='--only attention'), CASES (of cuda-shim: few or all).

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEVICE ?= cpu
BENCH ?=
QUALITY ?=
CASES ?= few

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
# One file for each wish of torch, so that another wish installs anew.
TORCH_STAMP := $(VENV)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1).stamp

.PHONY: demo test bench quality lint bench-cuda cuda-check cuda-shim clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/demo.stamp
	$(PY) -m pyseq.demo --device $(DEVICE)

test: $(VENV)/test.stamp
	$(PY) -m pytest -q

bench: $(VENV)/bench.stamp
	$(PY) -m benchmarks.report $(BENCH)

quality: $(VENV)/demo.stamp
	$(PY) -m benchmarks.quality $(QUALITY)

bench-cuda:
	PYTHON='$(PYTHON)' .ci/bench-cuda

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror \
	  $$(find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu')

cuda-check:
	.ci/cuda-check

# The whole way from Python to the CUDA kernels on a device made of the host's threads, with some
# cases that meet everything once, or with CASES=all, which takes some twenty minutes; then pyseq is
# built again as it was.
cuda-shim: $(VENV)/test.stamp
	PYSEQ_CUDA=shim $(PIP) install -q -e '.[test]'
	status=0; PYSEQ_CUDA=shim PYSEQ_CUDA_CASES=$(CASES) $(PY) -m pytest -q \
	  tests/test_cuda.py tests/test_cuda_loss.py tests/test_routes.py tests/test_scan_both.py \
	  tests/test_attention_history.py tests/test_benchmarks_cuda.py || status=$$?; \
	  $(PIP) install -q -e '.[test]'; exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info pyseq/_build.py pyseq/_C.*.so

# The stamp of an extra of pyproject.toml: pyseq is built and installed in place with it.
# Ninja compiles only what changed, also when another extra is asked for later.
$(VENV)/%.stamp: $(TORCH_STAMP) $(SOURCES)
	$(PIP) install -q -e '.[$*]'
	touch $@

$(TORCH_STAMP):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/*.stamp
	$(PIP) install -q $(TORCH)
	touch $@
